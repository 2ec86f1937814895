"""How far a model's, or a pair's, outputs move by a fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.surgery._folding.pairs import Pair
from batchnorm.surgery._folding.weights import Weights

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""The largest difference that rounding is to explain, relative to the outputs' largest magnitude.

A fold rounds the weights anew: a change of eps/2 each, which a network of some fifty layers passes on some ten times
larger. float32 and float64 have digits to spare; the 16-bit types get some eight of their eps (2^-10 and 2^-7).
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest and the root mean square of |after - before|, relative to the largest |before|, and the bound.

    `bound` is what rounding explains in the coarsest of the tensors' types.
    """

    max: float
    rms: float
    bound: float


def difference(before: Iterable[Tensor], after: Iterable[Tensor]) -> Difference | None:
    """The worst over the tensors, in order; None where no finite floating-point value is among them.

    Infinite where shapes or types differ, or where one has a NaN or an infinity that the other has not.
    """
    olds, news = (
        [t for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())] for tensors in (before, after)
    )
    if not any(bool(old.isfinite().any()) for old in olds):
        return None
    bound = max(BOUNDS.get(old.dtype.to_real(), BOUNDS[torch.bfloat16]) for old in olds)
    if len(olds) != len(news):
        return Difference(math.inf, math.inf, bound)
    found = [_of(old, new) for old, new in zip(olds, news, strict=True)]
    return Difference(max(largest for largest, _ in found), max(rms for _, rms in found), bound)


def _of(old: Tensor, new: Tensor) -> tuple[float, float]:
    if old.shape != new.shape or old.dtype != new.dtype:
        return math.inf, math.inf
    wide = torch.complex128 if old.is_complex() else torch.float64
    a, b = old.detach().to(wide), new.detach().to(wide)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf, math.inf
    if not bool(finite.any()):
        return 0.0, 0.0
    distance, scale = (a[finite] - b[finite]).abs(), float(a[finite].abs().max())
    if scale == 0:
        return (0.0, 0.0) if not bool(distance.any()) else (math.inf, math.inf)
    return float(distance.max()) / scale, float(distance.square().mean().sqrt()) / scale


@dataclass
class Trial:
    """A pair with the weights and the module that are to take its place, and how far that moved its output."""

    pair: Pair
    weights: Weights
    remainder: nn.Module
    found: Difference | None = None

    def first(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the pair's first module gives after the fold."""
        if not self.pair.before:
            return args[0] if args else kwargs["input"]  # type: ignore[no-any-return]
        return self._mapped(*args, **kwargs)

    def second(self, *args: Any, **kwargs: Any) -> Tensor:
        """What its second module gives."""
        if self.pair.before:
            return self.remainder(*args, **kwargs)  # type: ignore[no-any-return]
        return self._mapped(*args, **kwargs)

    def _mapped(self, *args: Any, **kwargs: Any) -> Tensor:
        module: Any = self.pair.map
        with self.weights.tried(module):
            return type(module).forward(module, *args, **kwargs)  # type: ignore[no-any-return]


def try_in_run(trials: Sequence[Trial], run: Callable[[], Any]) -> None:
    """Every pair before and after its fold, on what the model hands it while it runs."""
    handles, held = [], dict[nn.Module, Tensor]()

    def watch(trial: Trial) -> None:
        def after_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            held[trial.pair.first] = trial.first(*args, **kwargs)

        def after_second(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = held.pop(trial.pair.first, None)
            if value is None:  # the model does not do the same thing twice
                return
            if args:
                args = (value, *args[1:])
            else:
                kwargs = {**kwargs, "input": value}
            trial.found = difference([output], [trial.second(*args, **kwargs)])

        handles.append(trial.pair.first.register_forward_hook(after_first, with_kwargs=True))
        handles.append(trial.pair.second.register_forward_hook(after_second, with_kwargs=True))

    try:
        for trial in trials:
            watch(trial)
        run()
    finally:
        for handle in handles:
            handle.remove()


def rounding(pairs: Sequence[Pair], run: Callable[[], Iterable[Tensor]]) -> float:
    """How far the model's outputs move where each pair's output is off by the last digit, up or down at random."""
    generator = torch.Generator().manual_seed(0)

    def off(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        up = torch.rand(output.shape, generator=generator).to(output.device) < 0.5
        eps = torch.finfo(output.dtype).eps
        return output * (1 + eps * (2.0 * up - 1).to(output.dtype))

    before, handles = list(run()), []
    try:
        handles += [pair.second.register_forward_hook(off) for pair in pairs]
        moved = difference(before, run())
    finally:
        for handle in handles:
            handle.remove()
    return 0.0 if moved is None else moved.max
