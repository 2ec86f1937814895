"""What the layers of a model receive: the moments of their inputs, pooled over batches in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm import kernels, masks
from batchnorm.kernels.aten import ATEN
from batchnorm.moments import Moments, merge
from batchnorm.quantities import eval_gap
from batchnorm.surgery._shared.calling import Feed, Follow
from batchnorm.surgery._shared.layers import Norm

Array = NDArray[np.float64]

AT_ONCE = 2**24
"""Values that are widened to float64 at once: 128 MB."""


class _Stopped(BaseException):
    """The forward has come to where nothing after it matters. No handler of the model's own is to catch it."""


@dataclass(slots=True)
class Survey:
    """What the layers received in one pass over the batches.

    `moments` are (C,) in float64, in the order of the layers' first calls; `calls` the most of them in one forward.
    `read` batches were read; those in `left_out`, by index, had values that are not finite.
    """

    moments: dict[Norm, Moments] = field(default_factory=dict)
    calls: dict[Norm, int] = field(default_factory=dict)
    read: int = 0
    left_out: set[int] = field(default_factory=set)
    converged: bool = False

    @property
    def used(self) -> int:
        return self.read - len(self.left_out)


def survey(
    feed: Feed,
    norms: Sequence[Norm],
    follow: Follow,
    *,
    number: int = 1,
    passes: int = 1,
    nonfinite: str = "raise",
    tolerance: float | None = None,
    first: Survey | None = None,
) -> Survey:
    """One pass: the moments of what the layers receive, of all batches together.

    `follow` shows the progress, of pass `number` of `passes`. `nonfinite` is "raise", or "skip" for the batches that
    bring a layer NaN or infinity. With `tolerance` the pass stops once doubling the batches has moved no layer's
    statistics by that much. `first` is the first pass: its batches are read again, and a forward ends at a layer that
    was called once.

    Raises ValueError: no batches; one value a channel in a layer that normalizes by the batch; not finite.
    """
    found = Survey()
    most = None if first is None else first.read
    left_out = set[int]() if first is None else first.left_out
    now: dict[Norm, list[Moments]] = {}
    then: dict[Norm, Moments] = {}

    def hear(norm: Norm, x: Tensor) -> None:
        count = x.numel() // x.shape[1] if x.dim() > 1 and x.shape[1] else 0
        if count == 1 and norm.layer.training:
            raise ValueError(
                f"{feed.what}: batch {found.read - 1} gives {norm} one value a channel, which has no variance: "
                "drop it (drop_last=True) or use a larger batch"
            )
        if count:
            now.setdefault(norm, []).append(moments_of(x))
        if first is not None and first.calls[norm] == 1:
            raise _Stopped

    with listening(norms, hear):
        for batch in follow(feed.read(most), number, passes, feed.length(most)):
            found.read += 1
            now.clear()
            if found.read - 1 in left_out:
                found.left_out.add(found.read - 1)
                continue
            try:
                feed.run(batch)
            except _Stopped:
                pass
            except Exception as error:
                error.add_note(f"{feed.what}: batch {found.read - 1} of pass {number}")
                raise
            bad = next((norm for norm, parts in now.items() if not all(map(finite, parts))), None)
            if bad is not None and nonfinite == "raise":
                raise ValueError(
                    f"{feed.what}: batch {found.read - 1} gives {bad} values that are not finite: clean the data, or "
                    "look for NaN in the weights below"
                )
            if bad is not None:
                found.left_out.add(found.read - 1)
                continue
            for norm, parts in now.items():
                known = [found.moments[norm]] if norm in found.moments else []
                found.moments[norm] = merge([*known, *parts])
                found.calls[norm] = max(found.calls.get(norm, 0), len(parts))
            if tolerance is not None and found.used.bit_count() == 1:
                found.converged = bool(then) and _moved(found.moments, then) < tolerance
                then = dict(found.moments)
                if found.converged:
                    break
    if most is not None and found.read < most:
        raise ValueError(
            f"{feed.what}: the batches were {most} at first and only {found.read} in a later pass: "
            "pass a list or a DataLoader, which can be read again, or exact=False"
        )
    if found.read == 0:
        raise ValueError(f"{feed.what}: there are no batches: pass a list of them or a DataLoader that is not empty")
    if found.used == 0:
        raise ValueError(f"{feed.what}: every batch has values that are not finite: nothing is left to measure")
    for norm in norms:
        if norm in found.moments and found.moments[norm].count < 2:
            raise ValueError(f"{feed.what}: {norm} received one value a channel in all: pass more data")
    return found


@contextmanager
def listening(norms: Sequence[Norm], hear: Callable[[Norm, Tensor], None]) -> Iterator[None]:
    """`hear` is called with the input of each call of these layers, after their own hooks have seen it."""

    def before(norm: Norm, layer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            hear(norm, only_valid(x, kwargs))

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.layer.register_forward_pre_hook(partial(before, norm), with_kwargs=True).remove)
        yield


def only_valid(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What a layer normalizes of its input: valid positions alone, where it is called with a mask or lengths."""
    mask, lengths = kwargs.get("mask"), kwargs.get("lengths")
    return x if mask is None and lengths is None else masks.taken(x, masks.valid(x, mask, lengths))


def moments_of(x: Tensor) -> Moments:
    """The moments of an input (N, C, *) with at least one value a channel: (C,) arrays, accumulated in float64."""
    kernel = kernels.choose(x).kernel
    wide = kernel is not ATEN and kernel.accumulation_dtype(x.dtype) == torch.float64
    found = kernels.or_aten(kernel if wide else ATEN, lambda by: _by_parts(x) if by is ATEN else by.statistics(x))
    return Moments(found.count, on_host(found.mean), on_host(found.m2))


def widened(x: Tensor) -> Tensor:
    """In float64; in float32 on Apple's GPUs, which have no other."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _by_parts(x: Tensor) -> Moments:
    parts = torch.split(x, max(1, AT_ONCE // math.prod(x.shape[1:])))
    found = [torch.var_mean(widened(part), (0, *range(2, x.dim())), correction=0) for part in parts]
    counts = [part.numel() // part.shape[1] for part in parts]
    return merge([Moments.of_variance(n, mean, var) for n, (var, mean) in zip(counts, found, strict=True)])


def on_host(tensor: Tensor) -> Array:
    """In float64."""
    return np.asarray(tensor.detach().cpu().double().numpy())


def finite(moments: Moments) -> bool:
    """Whether neither NaN nor infinity was among the values."""
    return bool(np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all())


def _moved(now: dict[Norm, Moments], then: dict[Norm, Moments]) -> float:
    """The largest over the layers of the RMS over the units of eval_gap between two pools."""
    gaps = [
        math.sqrt(float(np.square(eval_gap(new.mean, new.var, then[norm].mean, then[norm].var, norm.eps)).mean()))
        if norm in then
        else math.inf
        for norm, new in now.items()
    ]
    return max(gaps, default=math.inf)
