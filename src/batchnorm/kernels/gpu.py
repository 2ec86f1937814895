"""The GPU kernels: float32, bfloat16 and float16, contiguous and channels_last, one or two launches each way.

Where a program can hold all values of its channels, one launch does it all (`gpu_resident`). Else each of two is a pass
over memory: the first reduces parts of each channel, the second merges the parts in their order and applies the
result. Either way results are the same every time. Statistics, rstd and sums are float32. Nothing waits for the
device. Written in Triton, which is imported at the first call.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from batchnorm.kernels.contract import Count, Epilogue, Forward, GradSums, InputGrads, Kernel
from batchnorm.kernels.gpu_launch import Launcher
from batchnorm.kernels.gpu_scope import ACTIVATIONS, TYPES, loaded
from batchnorm.kernels.gpu_work import Work
from batchnorm.kernels.layout import dense
from batchnorm.moments import Moments


class GpuKernel(Kernel):
    """The contract in Triton (`gpu_forward`, `gpu_backward`), for one device's tensors on its current stream."""

    name: ClassVar[str] = "gpu"
    types: ClassVar[frozenset[torch.dtype]] = TYPES
    activations: ClassVar[frozenset[str | None]] = ACTIVATIONS

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.launcher = Launcher() if launcher is None else launcher

    def accumulation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32: wider sums are slow on many GPUs."""
        return torch.float32

    def statistics(self, x: Tensor) -> Moments:
        return _Forward(self.launcher, x, Epilogue()).statistics()

    def normalize(self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
        return _Forward(self.launcher, x, epilogue).normalize(mean, rstd)

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue) -> Forward:
        return _Forward(self.launcher, x, epilogue).both(eps)

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
        return _Backward(self.launcher, grad_y, x, mean, rstd, epilogue, energy).both()


class _Forward(Work):
    def statistics(self) -> Moments:
        cut, moments = self.plan, self.room(2, self.plan.channels)
        self.over_channels(
            loaded().forward.merge_moments,
            *(self.x, self._reduced(), moments, cut.values, cut.channels, cut.span, cut.parts, cut.part_values),
        )
        return Moments(cut.values, *moments.unbind())

    def normalize(self, mean: Tensor, rstd: Tensor) -> Tensor:
        return self._apply(dense(mean, torch.float32), dense(rstd, torch.float32), None, None, 0.0)

    def both(self, eps: float) -> Forward:
        moments = self.room(3, self.plan.channels)
        held = self.resident(1 if self.epilogue.residual is None else 2)
        if held is None:
            y = self._apply(None, None, self._reduced(), moments, eps)
        else:
            y, residual = self._output()
            self.at_once(
                loaded().resident.forward,
                held,
                *(self.x, y, residual, self.gamma, self.beta, moments, float(eps), self.slope),
                ACT=self.act,
            )
        mean, m2, rstd = moments.unbind()
        return Forward(y, Moments(self.plan.values, mean, m2), rstd)

    def _reduced(self) -> Tensor:
        partials = self.partials(2)
        self.over_x(loaded().forward.reduce_moments, self.x, partials)
        return partials

    def _apply(
        self, mean: Tensor | None, rstd: Tensor | None, partials: Tensor | None, moments: Tensor | None, eps: float
    ) -> Tensor:
        y, residual = self._output()
        self.over_x(
            loaded().forward.apply,
            *(self.x, y, residual, self.gamma, self.beta, mean, rstd, partials, moments, float(eps), self.slope),
            ACT=self.act,
            PARTS=self.plan.padded_parts,
        )
        return y

    def _output(self) -> tuple[Tensor, Tensor | None]:
        """Room for y, and the residual laid out alike."""
        residual = self.epilogue.residual
        return torch.empty_like(self.x), None if residual is None else self.alike(residual)


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
        self.source, self.other = "x", None
        if epilogue.act is not None:
            if epilogue.y is not None:
                self.source, self.other = "y", self.alike(epilogue.y)
            elif epilogue.residual is not None:
                self.source, self.other = "residual", self.alike(epilogue.residual)

    def reduce(self) -> GradSums:
        cut, sums = self.plan, self.room(3, self.plan.channels)
        self.over_channels(
            loaded().backward.merge_sums,
            *(self._reduced(), self.rstd, sums, cut.channels, cut.parts),
            ENERGY=self.energy,
        )
        return self._told(sums)

    def input_grad(self, sums: GradSums | None, m: Count) -> InputGrads:
        if sums is None:
            return self._apply(None, None, None, None)
        each = (dense(total / m, torch.float32) for total in (sums.dbeta, sums.dgamma))
        return self._apply(None, None, *each)

    def both(self) -> tuple[InputGrads, GradSums]:
        sums = self.room(3, self.plan.channels)
        held = self.resident(2 if self.other is None else 4)
        if held is None:
            return self._apply(self._reduced(), sums, None, None), self._told(sums)
        dx, dresidual = self._outputs()
        self.at_once(
            loaded().resident.backward,
            held,
            *(self.grad_y, self.x, self.other, dx, dresidual, self.gamma, self.beta, self.mean, self.rstd),
            *(sums, self.slope),
            ACT=self.act,
            SOURCE=self.source,
            ENERGY=self.energy,
        )
        return self._grads(dx, dresidual), self._told(sums)

    def _reduced(self) -> Tensor:
        partials = self.partials(3 if self.energy else 2)
        self.over_x(
            loaded().backward.reduce_sums,
            *(self.grad_y, self.x, self.other, self.gamma, self.beta, self.mean, self.rstd, partials, self.slope),
            ACT=self.act,
            SOURCE=self.source,
            ENERGY=self.energy,
        )
        return partials

    def _apply(
        self, partials: Tensor | None, sums: Tensor | None, dbeta_each: Tensor | None, dgamma_each: Tensor | None
    ) -> InputGrads:
        dx, dresidual = self._outputs()
        self.over_x(
            loaded().backward.apply_gradient,
            *(self.grad_y, self.x, self.other, dx, dresidual, self.gamma, self.beta, self.mean, self.rstd),
            *(partials, sums, dbeta_each, dgamma_each, self.slope),
            ACT=self.act,
            SOURCE=self.source,
            ENERGY=self.energy,
            PARTS=self.plan.padded_parts,
        )
        return self._grads(dx, dresidual)

    def _outputs(self) -> tuple[Tensor, Tensor | None]:
        """Room for dx, and for dresidual where it differs from grad_y."""
        return torch.empty_like(self.x), None if self.other is None else torch.empty_like(self.x)

    def _grads(self, dx: Tensor, dresidual: Tensor | None) -> InputGrads:
        if dresidual is None and self.epilogue.residual is not None:
            dresidual = self.grad_y
        return InputGrads(dx, dresidual)

    def _told(self, sums: Tensor) -> GradSums:
        dbeta, dgamma, energy = sums.unbind()
        return GradSums(dbeta, dgamma, energy if self.energy else None)
