"""The GPU kernels: float32, bfloat16 and float16, contiguous and channels_last, one launch each way or a few.

Where registers hold the whole tensor (`_triton.resident`), or the L2 some of its channels (`_triton.rounds`), one
launch does it all and reads memory once. Else two launches are passes over memory: the first reduces parts of each
channel (`_triton.reductions`), the second applies the result (`_triton.passes`) and merges the parts, unless they are
so many that a launch in between does. Parts are merged in their order: results are the same
every time. Statistics, rstd and sums are float32. Nothing waits for the device. Written in Triton, which is imported
at the first call.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.contract import Count, Epilogue, Forward, GradSums, InputGrads, Kernel
from batchnorm.kernels.gpu.launch import Launcher, Work, loaded
from batchnorm.kernels.gpu.plan import TYPES
from batchnorm.kernels.layout import dense
from batchnorm.moments import Moments
from batchnorm.running_stats import Moving


class GpuKernel(Kernel):
    """The contract in Triton, for one device's tensors on its current stream."""

    name: ClassVar[str] = "gpu"
    types: ClassVar[frozenset[torch.dtype]] = TYPES
    activations: ClassVar[frozenset[str | None]] = frozenset({None, *ACTIVATIONS})

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.launcher = Launcher() if launcher is None else launcher

    def accumulation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32: wider sums are slow on many GPUs."""
        return torch.float32

    def statistics(self, x: Tensor) -> Moments:
        return _Forward(self.launcher, x, Epilogue()).statistics()

    def normalize(self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
        return _Forward(self.launcher, x, epilogue).normalize(mean, rstd)

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue, moving: Moving | None = None) -> Forward:
        return _Forward(self.launcher, x, epilogue).both(eps, moving)

    def reduce_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, *, energy: bool
    ) -> GradSums:
        return _Backward(self.launcher, grad_y, x, mean, rstd, epilogue, energy).reduce()

    def input_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, sums: GradSums | None, m: Count
    ) -> InputGrads:
        return _Backward(self.launcher, grad_y, x, mean, rstd, epilogue, False).input_grad(sums, m)

    def backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        return _Backward(self.launcher, grad_y, x, mean, rstd, epilogue, energy).both(m)


class _Forward(Work):
    def statistics(self) -> Moments:
        mean, m2 = self.room(self.channels), self.room(self.channels)
        self._merge(self._reduced(), mean, m2, None, 0.0)
        return Moments(self.plan.values, mean, m2)

    def normalize(self, mean: Tensor, rstd: Tensor) -> Tensor:
        y, residual = self._output()
        self._apply(y, residual, dense(mean, torch.float32), None, dense(rstd, torch.float32), None, 0.0, None)
        return y

    def both(self, eps: float, moving: Moving | None) -> Forward:
        y, residual = self._output()
        found = mean, m2, rstd = self.room(self.channels), self.room(self.channels), self.room(self.channels)
        tensors = 1 if residual is None else 2
        given = self.x, y, residual, self.gamma, self.beta, *found, *_finish(eps, moving), self.slope
        if not (
            self.held(loaded().resident.forward, tensors, 2, *given, ACT=self.act)
            or self.in_rounds(loaded().rounds.forward, 1, 2, *given, ACT=self.act)
        ):
            partials: Tensor | None = self._reduced()
            if not self.plan.merged_inside:
                self._merge(partials, *found, eps)
                partials = None
            self._apply(y, residual, *found, partials, eps, moving)
        if moving is not None:
            moving.moved_in_place()
        return Forward(y, Moments(self.plan.values, mean, m2), rstd)

    def _reduced(self) -> Tensor:
        partials = self.room(2, self.plan.parts, self.channels)
        self.over_x(loaded().reductions.reduce_moments, self.x, partials)
        return partials

    def _merge(self, partials: Tensor | None, mean: Tensor, m2: Tensor, rstd: Tensor | None, eps: float) -> None:
        self.over_channels(loaded().reductions.merge_moments, self.x, partials, mean, m2, rstd, float(eps))

    def _apply(
        self,
        y: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        m2: Tensor | None,
        rstd: Tensor,
        partials: Tensor | None,
        eps: float,
        moving: Moving | None,
    ) -> None:
        given = self.x, y, residual, self.gamma, self.beta, mean, m2, rstd, partials
        self.over_x(loaded().passes.apply, *given, *_finish(eps, moving), self.slope, ACT=self.act)

    def _output(self) -> tuple[Tensor, Tensor | None]:
        """Room for y, and the residual laid out alike."""
        residual = self.epilogue.residual
        return torch.empty_like(self.x), None if residual is None else self.alike(residual)


def _finish(eps: float, moving: Moving | None) -> tuple[object, ...]:
    """What whole channels' moments are for, in the kernels' order: the averages that they move, eps, the momentum."""
    return (None, None, float(eps), 0.0) if moving is None else (moving.mean, moving.var, float(eps), moving.momentum)


class _Backward(Work):
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
        self.mean, self.rstd = dense(mean, torch.float32), dense(rstd, torch.float32)
        self.grad_y = self.alike(grad_y)
        self.y = None if epilogue.y is None else self.alike(epilogue.y)
        self.read = self.grad_y, self.x, self.y
        self.vectors = self.gamma, self.beta, self.mean, self.rstd
        self.variant = {"ACT": self.act, "SOURCE": "x" if self.y is None else "y", "ENERGY": energy}

    def reduce(self) -> GradSums:
        sums = self._sums()
        self._merge(self._reduced(), sums)
        return sums

    def input_grad(self, sums: GradSums | None, m: Count) -> InputGrads:
        dx, dresidual = self._outputs()
        level = tilt = None
        share = 1.0
        if sums is not None:
            level, tilt = (dense(total, torch.float32) for total in (sums.dbeta, sums.dgamma))
            if isinstance(m, Tensor):  # whose number is the device's alone
                level, tilt = (dense(total / m, torch.float32) for total in (level, tilt))
            else:
                share /= m
        self._apply(dx, dresidual, None, level, tilt, None, share)
        return self._grads(dx, dresidual)

    def both(self, m: int) -> tuple[InputGrads, GradSums]:
        sums, (dx, dresidual) = self._sums(), self._outputs()
        held, read = (2, 2) if self.y is None else (4, 3)
        given = *self.read, dx, dresidual, *self.vectors, *sums, 1 / m, self.slope
        if not (
            self.held(loaded().resident.backward, held, 3, *given, **self.variant)
            or self.in_rounds(loaded().rounds.backward, read, 3, *given, **self.variant)
        ):
            partials: Tensor | None = self._reduced()
            if not self.plan.merged_inside:
                self._merge(partials, sums)
                partials = None
            self._apply(dx, dresidual, partials, *sums, 1 / m)
        return self._grads(dx, dresidual), sums

    def _reduced(self) -> Tensor:
        partials = self.room(3 if self.energy else 2, self.plan.parts, self.channels)
        self.over_x(loaded().reductions.reduce_sums, *self.read, *self.vectors, partials, self.slope, **self.variant)
        return partials

    def _merge(self, partials: Tensor | None, sums: GradSums) -> None:
        self.over_channels(loaded().reductions.merge_sums, partials, self.rstd, *sums, ENERGY=self.energy)

    def _apply(
        self,
        dx: Tensor,
        dresidual: Tensor | None,
        partials: Tensor | None,
        dbeta: Tensor | None,
        dgamma: Tensor | None,
        energy: Tensor | None,
        share: float,
    ) -> None:
        given = dx, dresidual, *self.vectors, partials, dbeta, dgamma, energy, share, self.slope
        self.over_x(loaded().passes.apply_gradient, *self.read, *given, **self.variant)

    def _sums(self) -> GradSums:
        """Room for them."""
        dbeta, dgamma = self.room(self.channels), self.room(self.channels)
        return GradSums(dbeta, dgamma, self.room(self.channels) if self.energy else None)

    def _outputs(self) -> tuple[Tensor, Tensor | None]:
        """Room for dx, and for dresidual where it differs from grad_y."""
        return torch.empty_like(self.x), None if self.y is None else torch.empty_like(self.x)

    def _grads(self, dx: Tensor, dresidual: Tensor | None) -> InputGrads:
        if dresidual is None and self.epilogue.residual is not None:
            dresidual = self.grad_y
        return InputGrads(dx, dresidual)
