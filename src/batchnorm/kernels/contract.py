"""What every kernel offers: four verbs, and a fused pair made of them.

    statistics(x)                            x (N, C, *) → Moments (C,)
    normalize(x, mean, rstd, epilogue)       → y = act(gamma·xhat + beta [+ residual])
    reduce_grad(grad_y, x, …)                → dbeta, dgamma and, where wanted, Σg² (C,)
    input_grad(grad_y, x, …, sums, m)        → dx, dresidual

Synchronization, inference, recalibration and recording plug in between the verbs; a kernel overrides `forward` and
`backward` where one pass over memory does the work of two verbs. Kernels see tensors that `batchnorm.functional` has
checked: floating point, at least 2-d, channels second, at least one channel and two values a channel, one device.

Statistics, rstd and sums are of the kernel's `accumulation_dtype`, at least float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from batchnorm.moments import Moments


class Epilogue(NamedTuple):
    """What follows the normalization: y = act(gamma·xhat + beta [+ residual]).

    gamma, beta (C,) or None for 1 and 0; residual of x's shape or None; act one of `batchnorm.spec.ACTIVATIONS`;
    slope is leaky_relu's. Backward may be given y in place of the residual where act' is told by the side of a kink
    that y is on (`told_by_y`): y is alive in any case, the residual need not be.
    """

    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: Tensor | None = None
    act: str | None = None
    slope: float = 0.01
    y: Tensor | None = None

    @property
    def told_by_y(self) -> bool:
        """Whether act'(z) can be had from y."""
        return self.act in ("relu", "relu6") or (self.act == "leaky_relu" and self.slope >= 0)


class Forward(NamedTuple):
    """y, the batch's moments, and the rstd that y was computed with."""

    y: Tensor
    moments: Moments
    rstd: Tensor


class GradSums(NamedTuple):
    """dbeta = Σg and dgamma = Σg·xhat, and energy = Σg² where it was asked for; (C,) each."""

    dbeta: Tensor
    dgamma: Tensor
    energy: Tensor | None


class InputGrads(NamedTuple):
    """dx, and dresidual = g where there was a residual; both of x's shape and type."""

    dx: Tensor
    dresidual: Tensor | None


@dataclass(slots=True)
class Tap:
    """A layer's by-products of its latest training forward and backward, for whoever records them.

    `count` = m; the rest are detached (C,) tensors, None until computed: `mean` and `var` (biased) of the batch,
    `dgamma`, `dbeta` and `energy` = Σg² at gamma·xhat + beta, which exist whether or not gamma and beta are learned.
    """

    count: int = 0
    mean: Tensor | None = None
    var: Tensor | None = None
    dgamma: Tensor | None = None
    dbeta: Tensor | None = None
    energy: Tensor | None = None

    def clear(self) -> None:
        """Forget: the layer calls it before each forward, so that no number outlives the step it belongs to."""
        self.count = 0
        self.mean = self.var = self.dgamma = self.dbeta = self.energy = None


class UnavailableError(RuntimeError):
    """A kernel cannot run on this machine, in words that say what to do. Raised before anything has been changed."""


class Kernel(ABC):
    """One implementation of the transform for some devices, types and layouts."""

    name: ClassVar[str]
    types: ClassVar[frozenset[torch.dtype]]
    activations: ClassVar[frozenset[str | None]]

    @abstractmethod
    def accumulation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of statistics, rstd and sums for an x of `dtype`."""

    @abstractmethod
    def statistics(self, x: Tensor) -> Moments:
        """count m, mean Σx/m and m2 Σ(x - mean)² of each channel."""

    @abstractmethod
    def normalize(self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
        """y = act(gamma·(x - mean)·rstd + beta [+ residual]), in x's type and memory layout."""

    @abstractmethod
    def reduce_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, *, energy: bool
    ) -> GradSums:
        """The sums over g = grad_y·act'(z), with z from the same arithmetic as in `normalize`."""

    @abstractmethod
    def input_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, sums: GradSums | None, m: int
    ) -> InputGrads:
        """dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m); with `sums` None (inference) dx = gamma·rstd·g."""

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue) -> Forward:
        """statistics, then normalize."""
        moments = self.statistics(x)
        rstd = torch.rsqrt(moments.var + eps)
        return Forward(self.normalize(x, moments.mean, rstd, epilogue), moments, rstd)

    def backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        """reduce_grad, then input_grad."""
        sums = self.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=energy)
        return self.input_grad(grad_y, x, mean, rstd, epilogue, sums, m), sums
