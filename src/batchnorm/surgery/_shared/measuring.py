"""Measure the inputs of a model's layers: their moments, pooled over batches in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
from batchnorm.surgery._shared.norm import Norm

Array = NDArray[np.float64]

Record = Callable[[Norm, Tensor], None]
Observe = Callable[[Sequence[Norm], Record], AbstractContextManager[None]]
"""observe(layers, record) calls `record` with a tensor of each call of the layers, while the context lasts."""

AT_ONCE = 2**24
"""How many values are converted to float64 at once: 128 MB."""


class _Stopped(BaseException):
    """Ends a forward early. A BaseException, so that no handler of the model catches it."""


@dataclass(slots=True)
class Survey:
    """The inputs of the layers in one pass over the batches.

    `moments` are (C,) in float64, in the order of the first calls; `calls` is the maximum number of calls per forward.
    `read` is the number of batches; those in `left_out`, by index, had values that are not finite.
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
    observe: Observe | None = None,
) -> Survey:
    """Run one pass over the batches and pool the moments of the layers' inputs, or of the tensors that `observe` picks.

    `follow` shows the progress, of pass `number` of `passes`. `nonfinite` is "raise", or "skip" for batches that give a
    layer NaN or infinity. With `tolerance` the pass stops once doubling the batches has changed no layer's statistics
    by more. `first` is the first pass: its batches are read again, and a forward ends at a layer that is called once.

    Raises ValueError: no batches; one value per channel in a layer that normalizes by the batch; not finite.
    """
    result = Survey()
    limit = None if first is None else first.read
    left_out = set[int]() if first is None else first.left_out
    current: dict[Norm, list[Moments]] = {}
    previous: dict[Norm, Moments] = {}

    def record(norm: Norm, x: Tensor) -> None:
        count = x.numel() // x.shape[1] if x.dim() > 1 and x.shape[1] else 0
        if count == 1 and norm.layer.training:
            raise ValueError(
                f"{feed.tool}: batch {result.read - 1} gives {norm} one value per channel, which has no variance: "
                "drop it (drop_last=True) or use a larger batch"
            )
        if count:
            current.setdefault(norm, []).append(moments_of(x))
        if first is not None and first.calls[norm] == 1:
            raise _Stopped

    with (observe or record_inputs)(norms, record):
        for batch in follow(feed.read(limit), number, passes, feed.length(limit)):
            result.read += 1
            current.clear()
            if result.read - 1 in left_out:
                result.left_out.add(result.read - 1)
                continue
            try:
                feed.run(batch)
            except _Stopped:
                pass
            except Exception as error:
                error.add_note(f"{feed.tool}: batch {result.read - 1} of pass {number}")
                raise
            bad = next((norm for norm, parts in current.items() if not all(map(is_finite, parts))), None)
            if bad is not None and nonfinite == "raise":
                raise ValueError(
                    f"{feed.tool}: batch {result.read - 1} gives {bad} values that are not finite: clean the data, or "
                    "look for NaN in the weights below"
                )
            if bad is not None:
                result.left_out.add(result.read - 1)
                continue
            for norm, parts in current.items():
                pooled = [result.moments[norm]] if norm in result.moments else []
                result.moments[norm] = merge([*pooled, *parts])
                result.calls[norm] = max(result.calls.get(norm, 0), len(parts))
            if tolerance is not None and result.used.bit_count() == 1:
                result.converged = bool(previous) and _largest_gap(result.moments, previous) < tolerance
                previous = dict(result.moments)
                if result.converged:
                    break
    if limit is not None and result.read < limit:
        raise ValueError(
            f"{feed.tool}: there were {limit} batches in the first pass and only {result.read} in a later one: "
            "pass a list or a DataLoader, which can be read again, or exact=False"
        )
    if result.read == 0:
        raise ValueError(f"{feed.tool}: there are no batches: pass a list of them or a DataLoader that is not empty")
    if result.used == 0:
        raise ValueError(f"{feed.tool}: every batch has values that are not finite: nothing is left to measure")
    for norm in norms:
        if norm in result.moments and result.moments[norm].count < 2:
            raise ValueError(f"{feed.tool}: {norm} received one value per channel in all: pass more data")
    return result


@contextmanager
def record_inputs(norms: Sequence[Norm], record: Record) -> Iterator[None]:
    """Call `record` with the input of each call of these layers, after their own hooks."""

    def before(norm: Norm, layer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            record(norm, valid_input(x, kwargs))

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.layer.register_forward_pre_hook(partial(before, norm), with_kwargs=True).remove)
        yield


def valid_input(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer, without padding if it is called with a mask or lengths."""
    mask, lengths = kwargs.get("mask"), kwargs.get("lengths")
    return x if mask is None and lengths is None else masks.take(x, masks.valid_positions(x, mask, lengths))


def moments_of(x: Tensor) -> Moments:
    """The moments (C,) of an input (N, C, *) with at least one value per channel, accumulated in float64."""
    kernel = kernels.choose(x).kernel
    wide = kernel is not ATEN and kernel.accumulation_dtype(x.dtype) == torch.float64
    moments = kernels.or_aten(kernel if wide else ATEN, lambda by: _by_parts(x) if by is ATEN else by.statistics(x))
    return Moments(moments.count, on_host(moments.mean), on_host(moments.m2))


def widened(x: Tensor) -> Tensor:
    """In float64; in float32 on Apple's GPUs, which have no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _by_parts(x: Tensor) -> Moments:
    parts = torch.split(x, max(1, AT_ONCE // math.prod(x.shape[1:])))
    pairs = [torch.var_mean(widened(part), (0, *range(2, x.dim())), correction=0) for part in parts]
    counts = [part.numel() // part.shape[1] for part in parts]
    return merge([Moments.of_variance(n, mean, var) for n, (var, mean) in zip(counts, pairs, strict=True)])


def on_host(tensor: Tensor) -> Array:
    """A float64 array on the CPU."""
    return np.asarray(tensor.detach().cpu().double().numpy())


def is_finite(moments: Moments) -> bool:
    """Whether all values were finite."""
    return bool(np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all())


def _largest_gap(new: dict[Norm, Moments], old: dict[Norm, Moments]) -> float:
    """The maximum over the layers of the RMS over the units of eval_gap between two pools."""

    def rms(norm: Norm) -> float:
        if norm not in old:
            return math.inf
        gap = eval_gap(new[norm].mean, new[norm].var, old[norm].mean, old[norm].var, norm.eps)
        return math.sqrt(float(np.square(gap).mean()))

    return max(map(rms, new), default=math.inf)
