"""compare(): train() against eval() on a batch, layer by layer, the guilty ones first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.records import Record, Skipped, called, table
from batchnorm.restoring import by_batch, measuring, same_random_numbers, unwrapped
from batchnorm.surgery._shared.calling import Feed, ForwardFn, leaves
from batchnorm.surgery._shared.layers import Norm, find
from batchnorm.surgery._shared.measuring import AT_ONCE, Array, finite, listening, moments_of, on_host, widened
from batchnorm.surgery._shared.reasons import REASONS, Numbers, reasons
from batchnorm.words import plural

__all__ = ["Compared", "Comparison", "compare"]


@dataclass(frozen=True, slots=True)
class Compared:
    """One layer of a `Comparison`.

    Attributes:
        names: all names of the layer in the model.
        kind: its class.
        place: its place in the order of calls, from 0.
        values: m, the values of a channel in the batch.
        gap: the median over its units of `eval_gap`, in standard deviations of the running statistics.
        expected: the part of the gap that sampling a batch explains: the median over the units whose input varies.
        output_change: RMS of (its output in eval mode - in training mode), divided by the RMS in training mode. It
            holds what the layer adds and what came from the layers before it.
        reason: a key: "fine", "stale", "never-trained" and so on, as `compare` lists them.
        why: the reason in words.
    """

    names: tuple[str, ...]
    kind: str
    place: int
    values: int
    gap: float
    expected: float
    output_change: float
    reason: str
    why: str

    @property
    def name(self) -> str:
        """Its first name; empty where it is the model itself."""
        return self.names[0]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Record):
    """What `compare` found: training mode against eval mode, on one batch.

    Attributes:
        layers: one record for each layer; those with a reason other than "fine" come first.
        skipped: the layers that were not compared, each with the reason.
        output_change: RMS of (output in eval mode - output in training mode), divided by the RMS of the output in
            training mode; None where the model's output holds no tensors to compare.
    """

    layers: tuple[Compared, ...]
    skipped: tuple[Skipped, ...] = ()
    output_change: float | None = None

    @property
    def guilty(self) -> tuple[Compared, ...]:
        """The layers with another reason than "fine"."""
        return tuple(layer for layer in self.layers if layer.reason != "fine")

    _left = "not compared"

    def _head(self) -> list[str]:
        counted = plural(len(self.layers), "batch norm layer")
        if not self.layers:
            head = "no batch norm layers to compare"
        elif not self.guilty:
            head = f"training and eval agree in {'all ' if len(self.layers) > 1 else ''}{counted}"
        else:
            verb = "differs" if len(self.guilty) == 1 else "differ"
            head = f"{len(self.guilty)} of {counted} {verb} between training and eval"
        if self.output_change is not None:
            head += f"; the model's output differs by {100 * self.output_change:.3g}% (RMS)"
        lines = [head]
        for reason in dict.fromkeys(layer.reason for layer in self.layers):
            layers = [layer for layer in self.layers if layer.reason == reason]
            lines += table((reason, called(*layer.names)) for layer in layers)
            lines += [f"      {f'{layers[0].name}: ' if len(layers) > 1 else ''}{layers[0].why}"]
        return lines


# Values of an output that are compared; more would tell the RMS no better.
_SAMPLE = 2**18


@dataclass(slots=True)
class _Seen:
    """What a layer received and returned, by its calls in one forward.

    `parts` and `rows` are those of `Numbers`.
    """

    parts: list[Moments] = field(default_factory=list)
    rows: list[tuple[Array, Array]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def compare(
    model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None, *, also: Sequence[type[nn.Module]] = ()
) -> Comparison:
    """Find the layers for which training and eval mode differ on a batch, and say why.

    gap = sqrt(((mean - running_mean)/r)² + (s/r - 1)²) is, for each unit, how far eval mode is from training mode.

    r = sqrt(running_var + eps); mean and s = sqrt(var + eps) (biased) are the batch's, in a forward in which each layer
    normalizes by the batch, so that the gap is the layer's own and not that of the layers before it. A second forward
    is wholly in eval mode. Both are without dropout, gradients and updates, and with the same random numbers.

    By chance alone the gap is about sqrt(1.5/m) for m independent values a channel. Values of one sample are alike, so
    what chance explains is measured between the samples (rows) of the batch; of a single one little can be told.

    Each layer has a reason: "non-finite" running statistics; "never-trained"; "too-few-steps" (the start still weighs);
    "other-domain", where the gap is more than chance and the first layer differs too; "stale", where it is more than
    chance and the first layer agrees; "small-batch", where chance may explain all of it; "fine". "other-domain" and
    "stale" are what such a pattern mostly means, not proofs.

    Args:
        model: nothing of it changes.
        batch: a batch as of `recalibrate`, as large as those of the training where it can be.
        forward_fn: forward_fn(model, batch) runs the model; what it returns is compared too.
        also: subclasses of torch.nn's layers that normalize as these do, which the caller vouches for.

    Returns:
        The layers that differ first, each with its gap and its reason; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module. Raises ValueError where a layer receives one value a channel,
    or values that are not finite although all before it normalize by the batch.
    """
    inner = unwrapped(model)
    norms, skipped = find("compare", inner, also)
    feed = Feed("compare", inner, [batch], forward_fn)
    with measuring(inner):
        in_eval, output = _forward(feed, norms, measured=False)
        for norm in norms:
            by_batch(norm.layer)
        in_training, expected = _forward(feed, norms, measured=True)
    numbers = {norm: Numbers(norm, seen.parts, seen.rows) for norm, seen in in_training.items() if seen.parts}
    layers = []
    for place, (norm, reason) in enumerate(zip(numbers, reasons(list(numbers.values())), strict=True)):
        number, before = numbers[norm], in_eval[norm].outputs if norm in in_eval else []
        change, kind = _change(in_training[norm].outputs, before), type(norm.layer).__name__
        layers.append(Compared(norm.names, kind, place, number.m, number.gap, number.expected, change, *reason))
    skipped += [norm.skipped("never called") for norm in norms if norm not in numbers]
    layers.sort(key=lambda layer: (REASONS.index(layer.reason), -layer.gap if layer.gap == layer.gap else -math.inf))
    return Comparison(tuple(layers), tuple(skipped), _change(expected, output) if expected else None)


def _forward(feed: Feed, norms: Sequence[Norm], measured: bool) -> tuple[dict[Norm, _Seen], list[Tensor]]:
    """What the layers saw, in the order of their calls, and samples of the model's outputs."""
    seen: dict[Norm, _Seen] = {}

    def before(norm: Norm, x: Tensor) -> None:
        known = seen.setdefault(norm, _Seen())
        if not measured or not x.numel():
            return
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"compare: the batch gives {norm} one value a channel, which has no variance: use a larger batch"
            )
        known.parts.append(moments_of(x))
        known.rows.append(_rows(x))
        if not finite(known.parts[-1]):
            raise ValueError(
                f"compare: {norm} receives values that are not finite, although all layers before it "
                "normalize by the batch: look for NaN in the batch and in the weights below"
            )

    def after(norm: Norm, layer: object, args: object, y: Any) -> None:
        seen[norm].outputs.extend(_samples(y))

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.layer.register_forward_hook(partial(after, norm)).remove)
        stack.enter_context(listening(norms, before))
        stack.enter_context(same_random_numbers(feed.model))
        (batch,) = feed.read()
        output = feed.run(batch)
    return seen, _samples(output)


def _samples(output: Any) -> list[Tensor]:
    """Copies of evenly spaced values, of every floating-point tensor."""
    found = (part.detach().flatten() for part in leaves(output) if part.is_floating_point())
    return [part[:: max(1, part.numel() // _SAMPLE)].float().clone() for part in found]


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The RMS of after - before, relative to the RMS of before, over all values; NaN where they do not fit together."""
    if not before or [part.shape for part in before] != [part.shape for part in after]:
        return math.nan
    square = sum(float((b - a).square().sum(dtype=torch.float32)) for a, b in zip(before, after, strict=True))
    whole = sum(float(a.square().sum(dtype=torch.float32)) for a in before)
    if whole == 0:
        return 0.0 if square == 0 else math.inf
    return math.sqrt(square / whole)


def _rows(x: Tensor) -> tuple[Array, Array]:
    """The mean and the biased variance of each row and channel (N, C), over the positions of the row."""
    flat = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
    parts = torch.split(flat, max(1, AT_ONCE // flat[0].numel()))
    found = [torch.var_mean(widened(part), 2, correction=0) for part in parts]
    var, mean = (on_host(torch.cat(each)) for each in zip(*found, strict=True))
    return mean, var
