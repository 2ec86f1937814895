"""The GPU kernels: float32, bfloat16 and float16, contiguous and channels_last, one launch or a few in each direction.

Where registers hold the whole tensor, or the L2 some of its channels, one launch does everything and reads memory once
(`_triton.fused`). Otherwise two launches are passes over memory: the first reduces parts of each channel
(`_triton.reductions`), the second applies the result (`_triton.passes`). The second also merges the parts, or a launch
in between does where they are many. Parts are merged in their order, so that every run returns the same bits.
Statistics, rstd and sums are float32. Nothing waits for the device. Triton is imported at the first call.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.contract import Count, Epilogue, Forward, GradSums, InputGrads
from batchnorm.kernels.gpu.launch import GpuCall, Launcher, load_modules
from batchnorm.kernels.gpu.plan import TYPES
from batchnorm.kernels.layout import PreparedKernel, dense
from batchnorm.moments import Moments
from batchnorm.running_stats import RunningUpdate

Outputs: TypeAlias = tuple[Tensor, Tensor | None]
Vectors: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class GpuKernel(PreparedKernel):
    """The contract in Triton, for tensors of one device on its current stream."""

    name: ClassVar[str] = "gpu"
    types: ClassVar[frozenset[torch.dtype]] = TYPES
    activations: ClassVar[frozenset[str | None]] = frozenset({None, *ACTIVATIONS})

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.launcher = Launcher() if launcher is None else launcher

    def accumulation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32: wider sums are slow on many GPUs."""
        return torch.float32

    def prepare_forward(self, x: Tensor, epilogue: Epilogue) -> _Forward:
        return _Forward(self.launcher, x, epilogue)

    def prepare_backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, energy: bool
    ) -> _Backward:
        return _Backward(self.launcher, grad_y, x, mean, rstd, epilogue, energy)


class _Forward(GpuCall):
    def statistics(self) -> Moments:
        mean, m2 = self.empty(self.channels), self.empty(self.channels)
        self._merge(self._reduce(), mean, m2, None, 0.0)
        return Moments(self.count, mean, m2)

    def normalize(self, mean: Tensor, rstd: Tensor) -> Tensor:
        outputs = self._outputs()
        statistics = dense(mean, torch.float32), None, dense(rstd, torch.float32)
        self._apply(outputs, statistics, None, (None, None, 0.0, 0.0))
        return outputs[0]

    def forward(self, eps: float, moving: RunningUpdate | None) -> Forward:
        outputs = y, residual = self._outputs()
        averages = (None, None, 0.0) if moving is None else moving
        running = *averages[:2], float(eps), averages[2]
        rows = self.empty(3, self.channels)
        mean, m2, rstd = rows.unbind()
        arguments = self.x, *outputs, self.gamma, self.beta, mean, m2, rstd, *running, self.slope
        fused, resident_tensors = load_modules().fused, 1 if residual is None else 2
        if not (
            self.try_resident(fused.resident_forward, resident_tensors, 2, *arguments, ACT=self.act)
            or self.try_rounds(fused.rounds_forward, 1, 2, *arguments, ACT=self.act)
        ):
            partials: Tensor | None = self._reduce()
            if not self.plan.merges_inline:
                self._merge(partials, mean, m2, rstd, eps)
                partials = None
            self._apply(outputs, (mean, m2, rstd), partials, running)
        if moving is not None:
            moving.moved_in_place()
        return Forward(y, self.count, (rows,))

    def _reduce(self) -> Tensor:
        partials = self.empty(2, self.plan.parts, self.channels)
        self.launch_pass(load_modules().reductions.reduce_moments, self.x, partials)
        return partials

    def _merge(self, partials: Tensor | None, mean: Tensor, m2: Tensor, rstd: Tensor | None, eps: float) -> None:
        self.launch_merge(load_modules().reductions.merge_moments, self.x, partials, mean, m2, rstd, float(eps))

    def _apply(
        self, outputs: Outputs, statistics: Vectors, partials: Tensor | None, running: tuple[object, ...]
    ) -> None:
        """`statistics`: mean, m2 (None without running statistics), rstd; `running`: the averages, eps and momentum."""
        arguments = self.x, *outputs, self.gamma, self.beta, *statistics, partials, *running, self.slope
        self.launch_pass(load_modules().passes.apply, *arguments, ACT=self.act)

    def _outputs(self) -> Outputs:
        """An uninitialized y, and the residual in the same layout."""
        residual = self.epilogue.residual
        return torch.empty_like(self.x), None if residual is None else self.like_x(residual)


class _Backward(GpuCall):
    def __init__(
        self,
        launcher: Launcher,
        grad_y: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        epilogue: Epilogue,
        energy: bool,
    ) -> None:
        super().__init__(launcher, x, epilogue)
        self.energy = energy
        self.rstd = dense(rstd, torch.float32)
        self.grad_y = self.like_x(grad_y)
        self.y = None if epilogue.y is None else self.like_x(epilogue.y)
        self.inputs = self.grad_y, self.x, self.y
        self.vectors = self.gamma, self.beta, dense(mean, torch.float32), self.rstd
        self.variant = {"ACT": self.act, "SOURCE": "x" if self.y is None else "y", "ENERGY": energy}

    def reduce_grad(self) -> GradSums:
        sums = self._empty_sums()
        self._merge(self._reduce(), sums)
        return sums

    def input_grad(self, sums: GradSums | None, m: Count) -> InputGrads:
        grads = self.empty_input_grads(self.grad_y, self.y)
        dbeta = dgamma = None
        inverse_count = 1.0
        if sums is not None:
            dbeta, dgamma = (dense(total, torch.float32) for total in (sums.dbeta, sums.dgamma))
            if isinstance(m, Tensor):  # only the device knows its number
                dbeta, dgamma = (dense(total / m, torch.float32) for total in (dbeta, dgamma))
            else:
                inverse_count /= m
        self._apply(grads, None, (dbeta, dgamma, None), inverse_count)
        return grads

    def backward(self, m: int) -> tuple[InputGrads, GradSums]:
        sums, grads = self._empty_sums(), self.empty_input_grads(self.grad_y, self.y)
        resident_tensors, read_tensors = (2, 2) if self.y is None else (4, 3)
        arguments = *self.inputs, *self._written(grads), *self.vectors, *sums, 1 / m, self.slope
        fused = load_modules().fused
        if not (
            self.try_resident(fused.resident_backward, resident_tensors, 3, *arguments, **self.variant)
            or self.try_rounds(fused.rounds_backward, read_tensors, 3, *arguments, **self.variant)
        ):
            partials: Tensor | None = self._reduce()
            if not self.plan.merges_inline:
                self._merge(partials, sums)
                partials = None
            self._apply(grads, partials, sums, 1 / m)
        return grads, sums

    def _reduce(self) -> Tensor:
        partials = self.empty(3 if self.energy else 2, self.plan.parts, self.channels)
        arguments = *self.inputs, *self.vectors, partials, self.slope
        self.launch_pass(load_modules().reductions.reduce_sums, *arguments, **self.variant)
        return partials

    def _merge(self, partials: Tensor | None, sums: GradSums) -> None:
        self.launch_merge(load_modules().reductions.merge_sums, partials, self.rstd, *sums, ENERGY=self.energy)

    def _apply(self, grads: InputGrads, partials: Tensor | None, sums: Vectors, inverse_count: float) -> None:
        """`sums`: dbeta, dgamma and grad_energy."""
        arguments = *self.inputs, *self._written(grads), *self.vectors, partials, *sums, inverse_count, self.slope
        self.launch_pass(load_modules().passes.apply_gradient, *arguments, **self.variant)

    def _written(self, grads: InputGrads) -> Outputs:
        """dx, and dresidual where it differs from grad_y."""
        return grads.dx, None if self.y is None else grads.dresidual

    def _empty_sums(self) -> GradSums:
        dbeta, dgamma = self.empty(self.channels), self.empty(self.channels)
        return GradSums(dbeta, dgamma, self.empty(self.channels) if self.energy else None)
