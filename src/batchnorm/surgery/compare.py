"""compare(): train() against eval() on a batch, layer by layer, the guilty ones first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.moments import Moments, merge
from batchnorm.quantities import eval_gap
from batchnorm.records import Record, Skipped, called, table
from batchnorm.restoring import by_batch, measuring, same_random_numbers, unwrapped
from batchnorm.surgery._shared.calling import Feed, ForwardFn, leaves
from batchnorm.surgery._shared.layers import Norm, find
from batchnorm.surgery._shared.measuring import AT_ONCE, Array, finite, listening, moments_of, on_host, widened
from batchnorm.words import plural

__all__ = ["Compared", "Comparison", "compare"]


REASONS = ("non-finite", "never-trained", "too-few-steps", "other-domain", "stale", "small-batch", "fine")
"""The guilty first."""

NOTICEABLE = 0.1
"""In deviations. Less is not heard of; a tenth in each of twenty layers can turn the output over, as it adds up."""

CHANCE = 3.0
"""In expected sampling errors: what more than three of them leave, in the median over units, is no chance."""

FEW = 16
"""Independent values a channel, 1.5/gap² of them. Fewer put a batch's mean and deviation off by a quarter and more."""

FEW_FOR_SCALE = 50
"""Values a channel. Training divides by the biased deviation, eval by the unbiased one: 1% apart at 50."""

START_LEFT = 0.05
"""A twentieth of mean 0 and variance 1 in the running statistics is seen in the outputs."""

EXPLAINED = 0.5
"""Taking the start out must leave less than half of the gap, before the start is called its cause."""


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

    `parts` are the moments of the inputs, `rows` the mean and variance of each row of them (N, C).
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
    numbers = {norm: Numbers(norm, seen) for norm, seen in in_training.items() if seen.parts}
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


class Numbers:
    """What is known of a layer: its running statistics, and those of one batch, (C,) each, with m values a channel.

    `momentum` None is the cumulative average, `steps` num_batches_tracked, if any. `gap` is the
    median over units of eval_gap, `expected` that of what sampling explains, over the units whose input varies in the
    batch; 0 where none does.
    """

    def __init__(self, norm: Norm, seen: _Seen) -> None:
        layer: Any = norm.layer
        moments = merge(seen.parts)
        self.running_mean, self.running_var = on_host(layer.running_mean), on_host(layer.running_var)
        self.mean, self.var, self.m = moments.mean, moments.var, int(moments.count)
        self.eps, self.momentum = norm.eps, layer.momentum
        self.steps = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
        self.gap = self._gap(self.running_mean, self.running_var)
        means, variances = (np.concatenate(each) for each in zip(*seen.rows, strict=True))
        self.rows = len(means)
        noise = self._noise(means, variances)
        self.expected = float(np.median(noise[noise > 0])) if (noise > 0).any() else 0.0

    @property
    def start_left(self) -> float:
        """The weight of mean 0 and variance 1 in the running statistics: (1 - momentum)^steps; 0 where unknown."""
        return 0.0 if self.momentum is None or not self.steps else float((1 - self.momentum) ** self.steps)

    @property
    def gap_without_start(self) -> float:
        """The gap to the running statistics with the start taken out of them; infinite where that cannot be."""
        left = self.start_left
        var = self.running_var - left
        if left >= 1 or not (var >= 0).all():
            return math.inf
        return self._gap(self.running_mean / (1 - left), var / (1 - left))

    @property
    def differs(self) -> bool:
        """Whether the gap is to be noticed, and more than chance."""
        return self.gap > max(NOTICEABLE, CHANCE * self.expected)

    def _gap(self, mean: Array, var: Array) -> float:
        return float(np.median(eval_gap(self.mean, self.var, mean, var, self.eps)))

    def _noise(self, means: Array, variances: Array) -> Array:
        """The gap that sampling explains: of N rows with mean μ_i and, about the batch's mean, mean square q_i,

        sqrt(Var μ_i/(N r²) + Var q_i/(4 N s² r²)), the errors of the mean and of s. It is sqrt(1.5/m) where all m
        values are independent and normal, and more where those of a row are alike. A single row counts as one value.
        """
        if self.rows < 2:
            return np.full_like(self.running_var, math.sqrt(1.5))
        squares = variances + (means - self.mean) ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            of_mean = means.var(axis=0, ddof=1)
            of_scale = squares.var(axis=0, ddof=1) / (4 * (self.var + self.eps))
            return np.asarray(np.sqrt((of_mean + of_scale) / self.rows / (self.running_var + self.eps)))


Reason = tuple[str, str]
"""One of `REASONS`, and the words with the numbers."""


def reasons(layers: Sequence[Numbers]) -> list[Reason]:
    """A reason for each layer; the layers are in the order of their calls.

    "other-domain" and "stale" read a pattern: with data of another kind the first layer differs already, with weights
    that moved on after the statistics the first ones still agree. Both can be otherwise.
    """
    known = [_of_itself(numbers) for numbers in layers]
    from_the_first = next((n.differs for n, reason in zip(layers, known, strict=True) if reason is None), False)
    return [_by_place(n, from_the_first) if reason is None else reason for n, reason in zip(layers, known, strict=True)]


def _of_itself(n: Numbers) -> Reason | None:
    """What the layer's own statistics and settings tell; None where they are in order."""
    with np.errstate(invalid="ignore"):
        bad = ~(np.isfinite(n.running_mean) & np.isfinite(n.running_var) & (n.running_var + n.eps > 0))
    if bad.any():
        text = (
            f"running statistics of {bad.sum():,} of {plural(bad.size, 'unit')} are not finite or negative: recalibrate"
        )
        return "non-finite", text
    if (n.running_mean == 0).all() and (n.running_var == 1).all():
        since = f" after {_trained(n)}" if n.steps and n.momentum is not None else ""
        text = f"running mean 0 and variance 1, as at the start{since}: train in training mode, or recalibrate"
        return "never-trained", text
    if n.start_left > START_LEFT and n.differs and n.gap_without_start < EXPLAINED * n.gap:
        text = (
            f"after {_trained(n)}, {100 * n.start_left:.0f}% of the start (mean 0, "
            f"variance 1) is left in the running statistics; without it the gap would be {n.gap_without_start:.2g}: "
            "train on, or recalibrate"
        )
        return "too-few-steps", text
    return None


def _trained(n: Numbers) -> str:
    return f"{plural(n.steps or 0, 'step')} with momentum {n.momentum:g}"


def _by_place(n: Numbers, from_the_first: bool) -> Reason:
    compared = f"the typical unit is {n.gap:.2g} deviations off, chance explains {n.expected:.2g}"
    if n.differs and from_the_first:
        question = "is this the kind of data that the statistics are of, prepared in the same way?"
        return "other-domain", f"{compared}; so from the first layer on: {question}"
    if n.differs:
        why = "the weights moved on after the statistics, or dropout was on when they were taken: recalibrate"
        return "stale", f"{compared}; the first layer agrees: {why}"
    if n.gap > NOTICEABLE or FEW * n.expected**2 > 1.5:
        few = f"{compared}: {plural(n.m, 'value')} a channel in {plural(n.rows, 'sample')} are too few to tell"
        if n.m < FEW_FOR_SCALE:
            scale = math.sqrt((n.m - 1) / n.m)
            few += f"; by its size alone, the scale in eval is sqrt((m - 1)/m) = {scale:.4f} of training's"
        return "small-batch", few
    return "fine", compared
