"""The interface of a kernel: four verbs, and a fused pair made of them.

    statistics(x)                            x (N, C, *) → Moments (C,)
    normalize(x, mean, rstd, epilogue)       → y = act(gamma·xhat + beta [+ residual])
    reduce_grad(grad_y, x, …)                → dbeta, dgamma and, where wanted, Σg² (C,)
    input_grad(grad_y, x, …, sums, m)        → dx, dresidual

Synchronization, inference, recalibration and recording plug in between the verbs; a kernel overrides `forward` and
`backward` where one pass over memory does the work of two verbs. Kernels see tensors that `batchnorm.functional` has
checked: floating point, at least 2-d, channels second, at least one channel and two values per channel, one device.

Statistics, rstd and sums are of the kernel's `accumulation_dtype`, at least float32.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.running_stats import Averages, RunningUpdate

Count: TypeAlias = int | Tensor
"""The values of a channel. A tensor of one number where reading it would wait for a device."""


class Epilogue(NamedTuple):
    """What follows the normalization: y = act(gamma·xhat + beta [+ residual]).

    gamma, beta (C,) or None for 1 and 0; residual of x's shape or None; act one of `batchnorm.activations`;
    slope is leaky_relu's. Backward never reads a residual, so none is saved: it takes y where a residual precedes an
    activation, and recomputes z from x everywhere else. `signs` are `Forward.signs`.
    """

    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: Tensor | None = None
    act: str | None = None
    slope: float = 0.01
    y: Tensor | None = None
    signs: Tensor | None = None


class Forward(NamedTuple):
    """y, the number of values per channel, and mean, m2 and rstd: three vectors, or one with all three.

    `signs` has a bit for each value of y, whether it is positive, where a kernel stores them: backward through relu
    then need not read y.
    """

    y: Tensor
    m: Count
    statistics: tuple[Tensor, ...]
    signs: Tensor | None = None

    @property
    def moments(self) -> Moments:
        """Count, mean and m2 of the batch."""
        return Moments(self.m, *self._vectors()[:2])

    @property
    def rstd(self) -> Tensor:
        """1/sqrt(var + eps), which y was computed with."""
        return self._vectors()[2]

    def _vectors(self) -> tuple[Tensor, ...]:
        return self.statistics if len(self.statistics) == 3 else self.statistics[0].view(3, -1).unbind()


def mean_and_rstd(statistics: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What backward needs of `Forward.statistics`; of running statistics mean and rstd are all there is."""
    vectors = statistics[0].view(3, -1).unbind() if len(statistics) == 1 else statistics
    return vectors[0], vectors[-1]


class GradSums(NamedTuple):
    """dbeta = Σg, dgamma = Σg·xhat and, if requested, energy = Σg²; (C,) each."""

    dbeta: Tensor
    dgamma: Tensor
    energy: Tensor | None


class InputGrads(NamedTuple):
    """dx, and dresidual = g where there was a residual; both of x's shape and type."""

    dx: Tensor
    dresidual: Tensor | None


class Merge(ABC):
    """Merges statistics and gradient sums across processes, between the local passes.

    Each process normalizes its part of the batch with the statistics of the whole. Every process calls both methods, in
    the same order. `count` is the number of values per channel of the last whole batch, `handle` identifies the merge.
    """

    count: Count = 0

    def __init__(self) -> None:
        self.handle = next(_handles)
        _MERGES[self.handle] = self

    @abstractmethod
    def moments(self, local: Moments) -> Moments:
        """The moments of the whole batch from those of this process's part."""

    @abstractmethod
    def sums(self, local: GradSums) -> GradSums:
        """dbeta, dgamma and energy over the whole batch."""

    @property
    @abstractmethod
    def fills_tap(self) -> bool:
        """Whether this process records the whole batch in the tap: one of them does."""

    @staticmethod
    def of(handle: int) -> Merge | None:
        """The merge with this handle: compiled code has only the number."""
        return _MERGES.get(handle)


_MERGES: WeakValueDictionary[int, Merge] = WeakValueDictionary()
_handles: Iterator[int] = itertools.count()
_numbers: Iterator[int] = itertools.count()


@dataclass(slots=True, eq=False)
class Pass:
    """By-products of one training forward of a layer and of its backwards; not differentiable.

    `count` = m, `mean` and `var` (biased) of the batch, (C,); `grads` the sums of each backward, energy included, at
    gamma·xhat + beta [+ residual], whether or not gamma and beta are learned. `number` identifies the pass.
    """

    count: Count
    mean: Tensor
    var: Tensor
    grads: list[GradSums] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(slots=True, eq=False, weakref_slot=True)
class Tap:
    """Collects a layer's by-products for a recorder, one `Pass` for each training forward.

    `look` is called with each input before it is normalized. The recorder empties `passes`; beyond `MOST` of them
    nobody is recording, and no more are added.
    """

    passes: list[Pass] = field(default_factory=list)
    look: Callable[[Tensor], None] | None = None
    handle: int = field(init=False)

    MOST: ClassVar[int] = 1024

    def __post_init__(self) -> None:
        self.handle = next(_handles)
        _TAPS[self.handle] = self

    def add(self, count: Count, mean: Tensor, var: Tensor) -> Pass:
        """Record a forward; returns the pass for its backwards to fill."""
        new = Pass(count, mean, var)
        if len(self.passes) < self.MOST:
            self.passes.append(new)
        return new

    def find(self, number: int) -> Pass | None:
        """The pass with this number, or None if it was taken."""
        return next((passed for passed in reversed(self.passes) if passed.number == number), None)

    def take(self) -> list[Pass]:
        """Return the passes so far and forget them."""
        taken, self.passes = self.passes, []
        return taken

    def __deepcopy__(self, memo: object) -> None:
        """None: a copy of a model is not recorded."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Unpickles as None, for the same reason."""
        return type(None), ()

    @staticmethod
    def of(handle: int) -> Tap | None:
        """The tap with this handle, if it still exists: compiled code has only the number."""
        return _TAPS.get(handle)


_TAPS: WeakValueDictionary[int, Tap] = WeakValueDictionary()


class Call(NamedTuple):
    """One call of the transform, from the layer to the kernel.

    Training normalizes x with the batch's statistics, and updates `running`, if any, with `momentum`; inference
    normalizes with `running`. `tap` receives the by-products of a training step. With `merge`, a training x is a part
    of the batch, which may be empty or have one value.
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
    """A kernel cannot run on this machine; the message says what to do. Raised before anything was changed."""


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

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue, moving: RunningUpdate | None = None) -> Forward:
        """statistics, then normalize; updates the running statistics last."""
        moments = self.statistics(x)
        rstd = torch.rsqrt(moments.var + eps)
        y = self.normalize(x, moments.mean, rstd, epilogue)
        if moving is not None:
            moving.move(moments)
        return Forward(y, moments.count, (moments.mean, moments.m2, rstd))

    def backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        """reduce_grad, then input_grad."""
        sums = self.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=energy)
        return self.input_grad(grad_y, x, mean, rstd, epilogue, sums, m), sums

    def backward_of(
        self, grad_y: Tensor, x: Tensor, statistics: Sequence[Tensor], epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        """`backward` with `Forward.statistics`. Sums may be of gamma's type."""
        return self.backward(grad_y, x, *mean_and_rstd(statistics), epilogue, m, energy=energy)
