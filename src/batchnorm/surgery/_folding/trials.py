"""How far a model's, or a pair's, outputs move by a fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.surgery._folding.weights import Weights
from batchnorm.surgery._shared.layers import Norm

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


@dataclass(eq=False)
class Pair:
    """A batch norm and the map that can take it in, which runs right before or after it.

    `weights` and `remainder` are what takes their place, `found` is how far that moved the pair's output.
    """

    norm: Norm
    map: nn.Module
    into: str
    before: bool
    weights: Weights
    remainder: nn.Module
    found: Difference | None = None

    @property
    def first(self) -> nn.Module:
        """The one of the two that runs first."""
        return self.map if self.before else self.norm.layer

    @property
    def second(self) -> nn.Module:
        """The one that reads what the first one gives."""
        return self.norm.layer if self.before else self.map

    def mapped(self, *args: Any, **kwargs: Any) -> Any:
        """What the map gives with the folded weights."""
        module: Any = self.map
        own = module._parameters
        self.weights.put(module)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            module._parameters = own


def place(module: nn.Module, before: bool) -> str:
    """A pair's map, in words."""
    return f"the {type(module).__name__} {'before' if before else 'after'} it"


def try_in_run(pairs: Sequence[Pair], run: Callable[[], Any]) -> None:
    """Every pair before and after its fold, on the inputs that it gets while the model runs."""
    held: dict[Pair, Tensor] = {}

    def after_first(pair: Pair, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        held[pair] = pair.mapped(*args, **kwargs) if pair.before else (args[0] if args else kwargs["input"])

    def after_second(pair: Pair, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if pair in held:  # not where the model does not do the same thing twice
            value = held.pop(pair)
            args, kwargs = ((value, *args[1:]), kwargs) if args else ((), {**kwargs, "input": value})
            pair.found = difference([output], [(pair.remainder if pair.before else pair.mapped)(*args, **kwargs)])

    with ExitStack() as stack:
        for pair in pairs:
            first = pair.first.register_forward_hook(partial(after_first, pair), with_kwargs=True)
            second = pair.second.register_forward_hook(partial(after_second, pair), with_kwargs=True)
            stack.callback(first.remove)
            stack.callback(second.remove)
        run()


def rounding(pairs: Sequence[Pair], run: Callable[[], Iterable[Tensor]]) -> float:
    """How far the model's outputs move where each pair's output is off by the last digit, up or down at random."""
    generator = torch.Generator().manual_seed(0)

    def off(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        up = torch.rand(output.shape, generator=generator).to(output.device) < 0.5
        eps = torch.finfo(output.dtype).eps
        return output * (1 + eps * (2.0 * up - 1).to(output.dtype))

    before = list(run())
    with ExitStack() as stack:
        for pair in pairs:
            stack.callback(pair.second.register_forward_hook(off).remove)
        moved = difference(before, run())
    return 0.0 if moved is None else moved.max
