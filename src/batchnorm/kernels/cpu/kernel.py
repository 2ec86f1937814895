"""The CPU kernels: float32, bfloat16 and float64, contiguous and channels_last, one pass over memory where it fits.

A channel's values (x forward; x and the gradient backward) that fit in cache are read from main memory once: reduced,
then normalized while they are there. Otherwise two passes, the second in the reverse order.

Statistics, rstd and a channel's sums are float64. Partial sums, one of each for every tile and cell of it, are float64
as well, but for bfloat16: there they are accumulated, and merged tile by tile, in float32, whose last digit is 65,536
times as fine; what is lost over millions of values is some hundredths of bfloat16's last digit. A channel's cells are
added in float64 in any case.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.contract import Count, Epilogue, Forward, GradSums, InputGrads, Kernel
from batchnorm.kernels.cpu import compiler, threads
from batchnorm.kernels.cpu.plan import APPLY, KINDS, MERGE, PREPARE, REDUCE, SLOPES, Job, Tiling, past_caches, plan
from batchnorm.kernels.layout import alike, dense, memory_format
from batchnorm.moments import Moments
from batchnorm.running_stats import Moving

# What a tile is computed in, and what partial sums are, as `_codegen.tiles` says.
_COMPUTED = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
_SUMMED = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float64: torch.float64}


class CpuKernel(Kernel):
    """The contract by compiled loops (`_codegen`), on PyTorch's own threads."""

    name: ClassVar[str] = "cpu"
    types: ClassVar[frozenset[torch.dtype]] = frozenset(KINDS)
    activations: ClassVar[frozenset[str | None]] = frozenset(
        {None, *(act for act, row in ACTIVATIONS.items() if row.on_cpu)}
    )

    def accumulation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float64: what the sums of a channel's cells are added in, and rstd is computed in."""
        return torch.float64

    def statistics(self, x: Tensor) -> Moments:
        return _Forward(x, Epilogue()).statistics()

    def normalize(self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
        return _Forward(x, epilogue).normalize(mean, rstd)

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue, moving: Moving | None = None) -> Forward:
        return _Forward(x, epilogue).both(eps, moving)

    def reduce_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, *, energy: bool
    ) -> GradSums:
        return _Backward(grad_y, x, mean, rstd, epilogue, energy).reduce()

    def input_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, sums: GradSums | None, m: Count
    ) -> InputGrads:
        return _Backward(grad_y, x, mean, rstd, epilogue, False).input_grad(sums, int(m))

    def backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        return _Backward(grad_y, x, mean, rstd, epilogue, energy).both(m)


class _Work:
    """One call: the matrix, the job under construction, and the buffers that it points to."""

    def __init__(self, x: Tensor, epilogue: Epilogue) -> None:
        self.format = memory_format(x)
        self.x = x.contiguous(memory_format=self.format)
        self.epilogue = epilogue
        channels, values = x.shape[1], math.prod(x.shape[2:])
        self.count = x.shape[0] * values
        rows, span = (x.shape[0], values) if self.format is torch.contiguous_format else (self.count, 1)
        self.plan = plan(rows, channels, span, x.element_size(), torch.get_num_threads())
        form = self.matrix = self.plan.matrix
        by_columns = form.by_columns
        self.computed = _COMPUTED[x.dtype]
        self.constants = torch.empty(5 * form.cells, dtype=self.computed)
        self.gamma, self.beta = self._parameter(epilogue.gamma), self._parameter(epilogue.beta)
        self.job = Job(
            rows=form.rows,
            channels=channels,
            span=form.span,
            fold=form.fold,
            cell_span=form.span if by_columns else 1,
            weight=1 if by_columns else form.span,
            x=self.x.data_ptr(),
            gamma=_address(self.gamma),
            beta=_address(self.beta),
            constants=self.constants.data_ptr(),
            slope=epilogue.slope,
        )

    def _parameter(self, vector: Tensor | None) -> Tensor | None:
        return None if vector is None else dense(vector, self.computed)

    def alike(self, tensor: Tensor) -> Tensor:
        """A tensor of x's shape, laid out in memory as x."""
        return alike(tensor, self.x.dtype, self.format)

    def given(self, mean: Tensor, rstd: Tensor) -> None:
        """Normalize by these."""
        self.mean, self.rstd = dense(mean, torch.float64), dense(rstd, torch.float64)
        self.job.mean, self.job.rstd = self.mean.data_ptr(), self.rstd.data_ptr()

    def divide(self, tiling: Tiling) -> None:
        """Make room for the partial sums of these tiles, three for each cell."""
        self.partials = torch.zeros(tiling.parts * 3 * self.matrix.cells, dtype=_SUMMED[self.x.dtype])
        self.job.partials = self.partials.data_ptr()
        self.job.parts, self.job.part_rows = tiling.parts, tiling.tile_rows

    def run(self, code: int, phases: int, tiling: Tiling, *, reverse: bool = False) -> None:
        job = self.job
        job.ticket, job.tiles, job.reverse, job.phases = 0, tiling.tiles, reverse, phases
        job.tile_rows, job.tile_channels = tiling.tile_rows, tiling.tile_channels
        threads.run(code, job, tiling.tiles)


class _Forward(_Work):
    def __init__(self, x: Tensor, epilogue: Epilogue) -> None:
        super().__init__(x, epilogue)
        source = "x" if epilogue.residual is None else "residual"
        self.code = compiler.address(
            compiler.Variant(False, KINDS[x.dtype], epilogue.act, source, self.matrix.by_columns)
        )

    def statistics(self) -> Moments:
        mean, m2, _ = self._measured(self.plan.streamed, 1.0)
        self.run(self.code, REDUCE, self.plan.streamed)
        self.run(self.code, MERGE, self.plan.channels)
        return Moments(self.count, mean, m2)

    def normalize(self, mean: Tensor, rstd: Tensor) -> Tensor:
        self.given(mean, rstd)
        y = self._output()
        self.run(self.code, PREPARE, self.plan.channels)
        self.run(self.code, APPLY, self.plan.streamed)
        return y

    def both(self, eps: float, moving: Moving | None) -> Forward:
        moved = moving is not None and self._moves(moving)
        resident = self.plan.resident[1 if self.epilogue.residual is None else 2]
        mean, m2, rstd = self._measured(resident or self.plan.streamed, eps)
        y = self._output()
        if resident:
            self.run(self.code, REDUCE | MERGE | PREPARE | APPLY, resident)
        else:
            self.run(self.code, REDUCE, self.plan.streamed)
            self.run(self.code, MERGE | PREPARE, self.plan.channels)
            self.run(self.code, APPLY, self.plan.streamed, reverse=True)
        moments = Moments(self.count, mean, m2)
        if moving is not None:
            moving.moved_in_place() if moved else moving.move(moments)
        return Forward(y, moments, rstd)

    def _moves(self, moving: Moving) -> bool:
        """Have the job move the running statistics, where they are of the type that it computes in."""
        mean, var, momentum = moving
        if mean.dtype != self.computed or var.dtype != self.computed:
            return False
        if not (mean.is_contiguous() and var.is_contiguous()):
            return False
        self.job.running_mean, self.job.running_var = mean.data_ptr(), var.data_ptr()
        self.job.momentum = momentum
        return True

    def _measured(self, tiling: Tiling, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        self.divide(tiling)
        mean, m2, rstd = torch.empty(3, self.matrix.channels, dtype=torch.float64).unbind()
        self.job.mean, self.job.m2, self.job.rstd = mean.data_ptr(), m2.data_ptr(), rstd.data_ptr()
        self.job.eps = eps
        return mean, m2, rstd

    def _output(self) -> Tensor:
        y = torch.empty_like(self.x)
        self.job.y = y.data_ptr()
        self.job.stream = past_caches(self.matrix, 2)
        if self.epilogue.residual is not None:
            self.residual = self.alike(self.epilogue.residual)
            self.job.other = self.residual.data_ptr()
        return y


class _Backward(_Work):
    def __init__(self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, energy: bool) -> None:
        super().__init__(x, epilogue)
        self.energy = energy
        self.given(mean, rstd)
        self.grad_y = self.alike(grad_y)
        self.job.grad_y = self.grad_y.data_ptr()
        self.y = None if epilogue.y is None else self.alike(epilogue.y)
        self.job.other = _address(self.y)
        source, kind = "x" if self.y is None else "y", KINDS[x.dtype]
        self.code = compiler.address(compiler.Variant(True, kind, epilogue.act, source, self.matrix.by_columns, energy))

    def reduce(self) -> GradSums:
        sums = self._sums(self.plan.streamed)
        self.run(self.code, PREPARE, self.plan.channels)
        self.run(self.code, REDUCE, self.plan.streamed)
        self.run(self.code, MERGE, self.plan.channels)
        return self._told(sums)

    def input_grad(self, sums: GradSums | None, m: int) -> InputGrads:
        if sums is None:
            given = torch.zeros(2, self.matrix.channels, dtype=torch.float64)
        else:
            given = torch.stack((sums.dbeta, sums.dgamma)).double()
        self.job.sums, self.job.count = given.data_ptr(), m
        grads = self._output()
        self.run(self.code, PREPARE | SLOPES, self.plan.channels)
        self.run(self.code, APPLY, self.plan.streamed)
        return grads

    def both(self, m: int) -> tuple[InputGrads, GradSums]:
        resident = self.plan.resident[2 if self.y is None else 3]
        sums = self._sums(resident or self.plan.streamed)
        self.job.count = m
        grads = self._output()
        if resident:
            self.run(self.code, PREPARE | REDUCE | MERGE | SLOPES | APPLY, resident)
        else:
            self.run(self.code, PREPARE, self.plan.channels)
            self.run(self.code, REDUCE, self.plan.streamed)
            self.run(self.code, MERGE | SLOPES, self.plan.channels)
            self.run(self.code, APPLY, self.plan.streamed, reverse=True)
        return grads, self._told(sums)

    def _told(self, sums: Tensor) -> GradSums:
        dbeta, dgamma, energy = sums.unbind()
        return GradSums(dbeta, dgamma, energy if self.energy else None)

    def _sums(self, tiling: Tiling) -> Tensor:
        self.divide(tiling)
        sums = torch.empty(3, self.matrix.channels, dtype=torch.float64)
        self.job.sums = sums.data_ptr()
        return sums

    def _output(self) -> InputGrads:
        dx = torch.empty_like(self.x)
        self.job.dx = dx.data_ptr()
        self.job.stream = past_caches(self.matrix, 3)
        dresidual = None
        if self.y is not None:
            dresidual = torch.empty_like(self.x)
            self.job.dresidual = dresidual.data_ptr()
        elif self.epilogue.residual is not None:
            dresidual = self.grad_y
        return InputGrads(dx, dresidual)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
