"""The CPU kernels: float32, bfloat16 and float64, contiguous and channels_last, one pass over memory where it fits.

Values of a channel (x in forward; x and the gradient in backward) that fit in the cache are read from main memory once:
reduced, then normalized while they are there. Otherwise there are two passes, the second in reverse order.

Statistics, rstd and sums per channel are float64. So are partial sums, one per tile and cell. For bfloat16, partial
sums are float32, whose last digit is 65,536 times as fine; over millions of values the loss is some hundredths of
bfloat16's last digit. The cells of a channel are always added in float64.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.contract import Count, Epilogue, Forward, GradSums, InputGrads
from batchnorm.kernels.cpu import compiler, threads
from batchnorm.kernels.cpu.plan import APPLY, KINDS, MERGE, PREPARE, REDUCE, SLOPES, Job, Tiling, exceeds_caches, plan
from batchnorm.kernels.layout import PreparedCall, PreparedKernel, dense
from batchnorm.moments import Moments
from batchnorm.running_stats import RunningUpdate

# The types of computed values and of partial sums, as in `_codegen.tiles`.
_COMPUTED = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
_SUMMED = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float64: torch.float64}


class CpuKernel(PreparedKernel):
    """The contract in compiled loops (`_codegen`), on PyTorch's own threads."""

    name: ClassVar[str] = "cpu"
    types: ClassVar[frozenset[torch.dtype]] = frozenset(KINDS)
    activations: ClassVar[frozenset[str | None]] = frozenset(
        {None, *(act for act, row in ACTIVATIONS.items() if row.on_cpu)}
    )

    def accumulation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float64: the type in which cells are added and rstd is computed."""
        return torch.float64

    def prepare_forward(self, x: Tensor, epilogue: Epilogue) -> _Forward:
        return _Forward(x, epilogue)

    def prepare_backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, energy: bool
    ) -> _Backward:
        return _Backward(grad_y, x, mean, rstd, epilogue, energy)


class _CpuCall(PreparedCall):
    """One call: the matrix, the job, and the buffers that it points to."""

    def __init__(self, x: Tensor, epilogue: Epilogue, source: str, backward: bool, energy: bool = False) -> None:
        super().__init__(x, epilogue)
        self.plan = plan(self.slices, self.channels, self.span, x.element_size(), torch.get_num_threads())
        matrix = self.matrix = self.plan.matrix
        by_columns = matrix.by_columns
        self.computed = _COMPUTED[x.dtype]
        self.constants = torch.empty(5 * matrix.cells, dtype=self.computed)
        self.gamma, self.beta = (
            None if v is None else dense(v, self.computed) for v in (epilogue.gamma, epilogue.beta)
        )
        self.job = Job(
            rows=matrix.rows,
            channels=self.channels,
            span=matrix.span,
            fold=matrix.fold,
            cell_span=matrix.span if by_columns else 1,
            weight=1 if by_columns else matrix.span,
            x=self.x.data_ptr(),
            gamma=_address(self.gamma),
            beta=_address(self.beta),
            constants=self.constants.data_ptr(),
            slope=epilogue.slope,
        )
        variant = compiler.Variant(backward, KINDS[x.dtype], epilogue.act, source, by_columns, energy)
        self.code = compiler.address(variant)

    def set_statistics(self, mean: Tensor, rstd: Tensor) -> None:
        """Normalize with these."""
        self.mean, self.rstd = dense(mean, torch.float64), dense(rstd, torch.float64)
        self.job.mean, self.job.rstd = self.mean.data_ptr(), self.rstd.data_ptr()

    def allocate_partials(self, tiling: Tiling) -> None:
        """Allocate the partial sums of these tiles, three per cell."""
        self.partials = torch.zeros(tiling.parts * 3 * self.matrix.cells, dtype=_SUMMED[self.x.dtype])
        self.job.partials = self.partials.data_ptr()
        self.job.parts, self.job.part_rows = tiling.parts, tiling.tile_rows

    def run(self, phases: int, tiling: Tiling, *, reverse: bool = False) -> None:
        job = self.job
        job.ticket, job.tiles, job.reverse, job.phases = 0, tiling.tiles, reverse, phases
        job.tile_rows, job.tile_channels = tiling.tile_rows, tiling.tile_channels
        threads.run(self.code, job, tiling.tiles)


class _Forward(_CpuCall):
    def __init__(self, x: Tensor, epilogue: Epilogue) -> None:
        super().__init__(x, epilogue, "x" if epilogue.residual is None else "residual", backward=False)

    def statistics(self) -> Moments:
        mean, m2, _ = self._allocate_statistics(self.plan.streamed, 1.0)
        self.run(REDUCE, self.plan.streamed)
        self.run(MERGE, self.plan.channels)
        return Moments(self.count, mean, m2)

    def normalize(self, mean: Tensor, rstd: Tensor) -> Tensor:
        self.set_statistics(mean, rstd)
        y = self._allocate_y()
        self.run(PREPARE, self.plan.channels)
        self.run(APPLY, self.plan.streamed)
        return y

    def forward(self, eps: float, moving: RunningUpdate | None) -> Forward:
        is_moved_by_job = moving is not None and self._move_in_job(moving)
        resident = self.plan.resident[1 if self.epilogue.residual is None else 2]
        mean, m2, rstd = self._allocate_statistics(resident or self.plan.streamed, eps)
        y = self._allocate_y()
        if resident:
            self.run(REDUCE | MERGE | PREPARE | APPLY, resident)
        else:
            self.run(REDUCE, self.plan.streamed)
            self.run(MERGE | PREPARE, self.plan.channels)
            self.run(APPLY, self.plan.streamed, reverse=True)
        moments = Moments(self.count, mean, m2)
        if moving is not None:
            moving.moved_in_place() if is_moved_by_job else moving.move(moments)
        return Forward(y, moments, rstd)

    def _move_in_job(self, moving: RunningUpdate) -> bool:
        """Let the job update the running statistics; False where they are of another type than it computes in."""
        mean, var, momentum = moving
        if any(average.dtype != self.computed or not average.is_contiguous() for average in (mean, var)):
            return False
        self.job.running_mean, self.job.running_var = mean.data_ptr(), var.data_ptr()
        self.job.momentum = momentum
        return True

    def _allocate_statistics(self, tiling: Tiling, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        self.allocate_partials(tiling)
        mean, m2, rstd = torch.empty(3, self.channels, dtype=torch.float64).unbind()
        self.job.mean, self.job.m2, self.job.rstd = mean.data_ptr(), m2.data_ptr(), rstd.data_ptr()
        self.job.eps = eps
        return mean, m2, rstd

    def _allocate_y(self) -> Tensor:
        y = torch.empty_like(self.x)
        self.job.y, self.job.stream = y.data_ptr(), exceeds_caches(self.matrix, 2)
        if self.epilogue.residual is not None:
            self.residual = self.like_x(self.epilogue.residual)
            self.job.other = self.residual.data_ptr()
        return y


class _Backward(_CpuCall):
    def __init__(self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, energy: bool) -> None:
        super().__init__(x, epilogue, "x" if epilogue.y is None else "y", backward=True, energy=energy)
        self.energy = energy
        self.set_statistics(mean, rstd)
        self.grad_y, self.y = self.like_x(grad_y), None if epilogue.y is None else self.like_x(epilogue.y)
        self.job.grad_y, self.job.other = self.grad_y.data_ptr(), _address(self.y)

    def reduce_grad(self) -> GradSums:
        sums = self._allocate_sums(self.plan.streamed)
        self.run(PREPARE, self.plan.channels)
        self.run(REDUCE, self.plan.streamed)
        self.run(MERGE, self.plan.channels)
        return self._grad_sums(sums)

    def input_grad(self, sums: GradSums | None, m: Count) -> InputGrads:
        if sums is None:
            totals = torch.zeros(2, self.channels, dtype=torch.float64)
        else:
            totals = torch.stack((sums.dbeta, sums.dgamma)).double()
        self.job.sums, self.job.count = totals.data_ptr(), int(m)
        grads = self._allocate_grads()
        self.run(PREPARE | SLOPES, self.plan.channels)
        self.run(APPLY, self.plan.streamed)
        return grads

    def backward(self, m: int) -> tuple[InputGrads, GradSums]:
        resident = self.plan.resident[2 if self.y is None else 3]
        sums = self._allocate_sums(resident or self.plan.streamed)
        self.job.count = m
        grads = self._allocate_grads()
        if resident:
            self.run(PREPARE | REDUCE | MERGE | SLOPES | APPLY, resident)
        else:
            self.run(PREPARE, self.plan.channels)
            self.run(REDUCE, self.plan.streamed)
            self.run(MERGE | SLOPES, self.plan.channels)
            self.run(APPLY, self.plan.streamed, reverse=True)
        return grads, self._grad_sums(sums)

    def _grad_sums(self, sums: Tensor) -> GradSums:
        dbeta, dgamma, grad_energy = sums.unbind()
        return GradSums(dbeta, dgamma, grad_energy if self.energy else None)

    def _allocate_sums(self, tiling: Tiling) -> Tensor:
        self.allocate_partials(tiling)
        sums = torch.empty(3, self.channels, dtype=torch.float64)
        self.job.sums = sums.data_ptr()
        return sums

    def _allocate_grads(self) -> InputGrads:
        grads = self.empty_input_grads(self.grad_y, self.y)
        self.job.dx, self.job.stream = grads.dx.data_ptr(), exceeds_caches(self.matrix, 3)
        self.job.dresidual = 0 if self.y is None else _address(grads.dresidual)
        return grads


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
