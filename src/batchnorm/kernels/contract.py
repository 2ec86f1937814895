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

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.running_stats import Averages, Moving

Count: TypeAlias = int | Tensor
"""How many values a channel has. Where a device would have to be waited for to know it, a tensor of one number."""


class Epilogue(NamedTuple):
    """What follows the normalization: y = act(gamma·xhat + beta [+ residual]).

    gamma, beta (C,) or None for 1 and 0; residual of x's shape or None; act one of `batchnorm.activations`;
    slope is leaky_relu's. Backward never reads a residual, so that none is saved for it: it takes y where a residual
    precedes an activation, and recomputes z from x everywhere else.
    """

    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: Tensor | None = None
    act: str | None = None
    slope: float = 0.01
    y: Tensor | None = None


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


class Merge(ABC):
    """What stands between the verbs where a batch is spread over several places: each normalizes its own part by the
    statistics of all, and hands down the gradient that the sums over all give. Every place calls both, in one order.

    `count` is the number of values that a channel had in the last whole batch, `handle` the merge's own number.
    """

    count: Count = 0

    def __init__(self) -> None:
        self.handle = next(_handles)
        _MERGES[self.handle] = self

    @abstractmethod
    def moments(self, own: Moments) -> Moments:
        """The moments of the whole batch, of this place's part."""

    @abstractmethod
    def sums(self, own: GradSums) -> GradSums:
        """dbeta, dgamma and energy over the whole batch."""

    @property
    @abstractmethod
    def speaks(self) -> bool:
        """Whether this place tells the tap of the whole batch: one of them does."""

    @staticmethod
    def of(handle: int) -> Merge | None:
        """The merge with this handle: compiled code knows it by the number alone."""
        return _MERGES.get(handle)


_MERGES: WeakValueDictionary[int, Merge] = WeakValueDictionary()
_handles: Iterator[int] = itertools.count()
_numbers: Iterator[int] = itertools.count()


@dataclass(slots=True, eq=False)
class Pass:
    """By-products of one training forward of a layer, and of the backwards through it; nothing here is differentiated.

    `count` = m, `mean` and `var` (biased) of the batch, (C,); `grads` the sums of each backward, energy included, at
    gamma·xhat + beta [+ residual]: they exist whether or not gamma and beta are learned. `number` is the pass's own.
    """

    count: Count
    mean: Tensor
    var: Tensor
    grads: list[GradSums] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(slots=True, eq=False, weakref_slot=True)
class Tap:
    """Where a layer leaves its by-products for whoever records them, one `Pass` for each training forward.

    `look` is shown the input of each, before it is normalized. Whoever listens empties `passes`; beyond `MOST` of them
    nobody does, and no more are kept.
    """

    passes: list[Pass] = field(default_factory=list)
    look: Callable[[Tensor], None] | None = None
    handle: int = field(init=False)

    MOST: ClassVar[int] = 1024

    def __post_init__(self) -> None:
        self.handle = next(_handles)
        _TAPS[self.handle] = self

    def add(self, count: Count, mean: Tensor, var: Tensor) -> Pass:
        """A forward has run; the pass for its backwards to fill."""
        made = Pass(count, mean, var)
        if len(self.passes) < self.MOST:
            self.passes.append(made)
        return made

    def find(self, number: int) -> Pass | None:
        """The pass of this number, where it is still here."""
        return next((passed for passed in reversed(self.passes) if passed.number == number), None)

    def take(self) -> list[Pass]:
        """The passes so far, which the tap then forgets."""
        taken, self.passes = self.passes, []
        return taken

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model is not listened to."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Nor is a pickle: what comes back is None."""
        return type(None), ()

    @staticmethod
    def of(handle: int) -> Tap | None:
        """The tap with this handle, where it is still listening: compiled code knows it by the number alone."""
        return _TAPS.get(handle)


_TAPS: WeakValueDictionary[int, Tap] = WeakValueDictionary()


class Call(NamedTuple):
    """One call of the transform, from the layer to the kernel.

    In training x is normalized by the batch's statistics, and `running`, where it is, moves by `momentum`; otherwise by
    `running`. `tap` receives the by-products of a training step. With `merge`, a training x is a part of the batch,
    which may be empty or of one value.
    """

    x: Tensor
    running: Averages
    training: bool
    momentum: float
    eps: float
    epilogue: Epilogue
    tap: Tap | None = None
    merge: Merge | None = None


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
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, sums: GradSums | None, m: Count
    ) -> InputGrads:
        """dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m); with `sums` None (inference) dx = gamma·rstd·g."""

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue, moving: Moving | None = None) -> Forward:
        """statistics, then normalize; at last `moving`, where there is any, moves by x."""
        moments = self.statistics(x)
        rstd = torch.rsqrt(moments.var + eps)
        y = self.normalize(x, moments.mean, rstd, epilogue)
        if moving is not None:
            moving.move(moments)
        return Forward(y, moments, rstd)

    def backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        """reduce_grad, then input_grad."""
        sums = self.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=energy)
        return self.input_grad(grad_y, x, mean, rstd, epilogue, sums, m), sums
