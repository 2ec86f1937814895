"""compare(): training mode against eval mode on a batch, layer by layer, the layers that differ first."""

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
from batchnorm.records import Record, Skipped, format_names, table
from batchnorm.restoring import measuring, preserve_random_state, unwrapped
from batchnorm.surgery._shared.calling import Feed, ForwardFn, leaves
from batchnorm.surgery._shared.layers import find
from batchnorm.surgery._shared.measuring import AT_ONCE, Array, is_finite, moments_of, on_host, record_inputs, widened
from batchnorm.surgery._shared.norm import Norm
from batchnorm.words import plural

__all__ = ["Compared", "Comparison", "compare"]


REASONS = ("non-finite", "never-trained", "too-few-steps", "other-domain", "stale", "small-batch", "fine")
"""In the order of the report."""

NOTICEABLE = 0.1
"""In standard deviations. Smaller differences are not reported; a tenth in each of twenty layers adds up."""

CHANCE = 3.0
"""In expected sampling errors. A median gap of more than three is not chance."""

FEW = 16
"""Independent values per channel, 1.5/gap². With fewer, mean and deviation are off by a quarter or more."""

FEW_FOR_SCALE = 50
"""Values per channel. The biased deviation (training) and the unbiased one (eval) differ by 1% at 50."""

START_LEFT = 0.05
"""A twentieth of the initial mean 0 and variance 1 in the running statistics is visible in the outputs."""

EXPLAINED = 0.5
"""The initial values are the cause if the gap without them is less than half."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One layer of a `Comparison`.

    Attributes:
        names: all names of the layer in the model.
        kind: its class.
        place: its index in the order of calls, from 0.
        values: m, the number of values per channel in the batch.
        gap: the median over its units of `eval_gap`, in standard deviations of the running statistics.
        expected: the gap that sampling explains: the median over the units whose input varies.
        output_change: RMS of (its output in eval mode - in training mode), divided by the RMS in training mode,
            including the change of its input.
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
        """Its first name; empty if it is the model itself."""
        return self.names[0]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Record):
    """The result of `compare`: training mode against eval mode, on one batch.

    Attributes:
        layers: one record for each layer; those with a reason other than "fine" come first.
        skipped: the layers that were not compared, each with the reason.
        output_change: RMS of (output in eval mode - output in training mode), divided by the RMS of the output in
            training mode; None if the output has no tensors to compare.
    """

    layers: tuple[Compared, ...]
    skipped: tuple[Skipped, ...] = ()
    output_change: float | None = None

    @property
    def guilty(self) -> tuple[Compared, ...]:
        """The layers whose reason is not "fine"."""
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
            lines += table((reason, format_names(*layer.names)) for layer in layers)
            lines += [f"      {f'{layers[0].name}: ' if len(layers) > 1 else ''}{layers[0].why}"]
        return lines


# How many values of an output are compared; more do not improve the RMS.
_SAMPLE = 2**18


@dataclass(slots=True)
class _Calls:
    """The inputs and outputs of a layer's calls in one forward.

    `parts` are the moments of the inputs, `rows` the mean and variance (N, C) of each row.
    """

    parts: list[Moments] = field(default_factory=list)
    rows: list[tuple[Array, Array]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def compare(
    model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None, *, also: Sequence[type[nn.Module]] = ()
) -> Comparison:
    """Find the layers for which training and eval mode differ on a batch, and explain why.

    gap = sqrt(((mean - running_mean)/r)² + (s/r - 1)²) is, for each unit, how far eval mode is from training mode.

    r = sqrt(running_var + eps); mean and s = sqrt(var + eps) (biased) are the batch's, in a forward in which every
    layer normalizes by the batch, so that the gap does not include that of earlier layers. A second forward is in eval
    mode. Both run without dropout, gradients and updates, and with the same random numbers. The gap that chance
    explains is measured between the samples (rows) of the batch; a single one says little.

    Each layer has a reason: "non-finite" running statistics; "never-trained"; "too-few-steps" (the initial values still
    count); "other-domain": the gap is more than chance, and the first layer differs too; "stale": the gap is more than
    chance, and the first layer agrees; "small-batch": chance may explain the gap; "fine". "other-domain" and "stale"
    are the usual causes of such a pattern, not proofs.

    Args:
        model: not changed.
        batch: a batch as of `recalibrate`, if possible as large as in training.
        forward_fn: forward_fn(model, batch) runs the model; its return value is compared too.
        also: subclasses that normalize as their base class does, to be included.

    Returns:
        The layers that differ first, each with its gap and its reason; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module; ValueError if a layer receives one value per channel, or
    values that are not finite although all earlier layers normalize by the batch.
    """
    inner = unwrapped(model)
    norms, skipped = find("compare", inner, also)
    feed = Feed("compare", inner, [batch], forward_fn)
    with measuring(inner):
        in_eval, output = _forward(feed, norms, measured=False)
        for norm in norms:
            norm.normalize_by_batch()
        in_training, expected = _forward(feed, norms, measured=True)
    numbers = {norm: Numbers(norm, calls) for norm, calls in in_training.items() if calls.parts}
    layers = []
    for place, (norm, reason) in enumerate(zip(numbers, reasons(list(numbers.values())), strict=True)):
        number, before = numbers[norm], in_eval[norm].outputs if norm in in_eval else []
        change, kind = _change(in_training[norm].outputs, before), type(norm.layer).__name__
        layers.append(Compared(norm.names, kind, place, number.m, number.gap, number.expected, change, *reason))
    skipped += [norm.skipped("never called") for norm in norms if norm not in numbers]
    layers.sort(key=lambda layer: (REASONS.index(layer.reason), -layer.gap if layer.gap == layer.gap else -math.inf))
    return Comparison(tuple(layers), tuple(skipped), _change(expected, output) if expected else None)


def _forward(feed: Feed, norms: Sequence[Norm], measured: bool) -> tuple[dict[Norm, _Calls], list[Tensor]]:
    """The calls of the layers, in order, and samples of the model's outputs."""
    calls: dict[Norm, _Calls] = {}

    def before(norm: Norm, x: Tensor) -> None:
        of_layer = calls.setdefault(norm, _Calls())
        if not measured or not x.numel():
            return
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"compare: the batch gives {norm} one value per channel, which has no variance: use a larger batch"
            )
        of_layer.parts.append(moments_of(x))
        of_layer.rows.append(_rows(x))
        if not is_finite(of_layer.parts[-1]):
            raise ValueError(
                f"compare: {norm} receives values that are not finite, although all layers before it "
                "normalize by the batch: look for NaN in the batch and in the weights below"
            )

    def after(norm: Norm, layer: object, args: object, y: Any) -> None:
        calls[norm].outputs.extend(_samples(y))

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.layer.register_forward_hook(partial(after, norm)).remove)
        stack.enter_context(record_inputs(norms, before))
        stack.enter_context(preserve_random_state(feed.model))
        (batch,) = feed.read()
        output = feed.run(batch)
    return calls, _samples(output)


def _samples(output: Any) -> list[Tensor]:
    """Copies of evenly spaced values, of every floating-point tensor."""
    values = (part.detach().flatten() for part in leaves(output) if part.is_floating_point())
    return [part[:: max(1, part.numel() // _SAMPLE)].float().clone() for part in values]


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The RMS of after - before, relative to the RMS of before, over all values; NaN if their shapes differ."""
    if not before or [part.shape for part in before] != [part.shape for part in after]:
        return math.nan
    square = sum(float((b - a).square().sum(dtype=torch.float32)) for a, b in zip(before, after, strict=True))
    total = sum(float(a.square().sum(dtype=torch.float32)) for a in before)
    if total == 0:
        return 0.0 if square == 0 else math.inf
    return math.sqrt(square / total)


def _rows(x: Tensor) -> tuple[Array, Array]:
    """The mean and the biased variance of each row and channel (N, C), over the positions of the row."""
    flat = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
    parts = torch.split(flat, max(1, AT_ONCE // flat[0].numel()))
    pairs = [torch.var_mean(widened(part), 2, correction=0) for part in parts]
    var, mean = (on_host(torch.cat(tensors)) for tensors in zip(*pairs, strict=True))
    return mean, var


class Numbers:
    """A layer's running statistics and those of one batch, (C,) each, with m values per channel.

    `momentum` None is the cumulative average, `steps` is num_batches_tracked, if any. `gap` is the median over units of
    eval_gap, `expected` the median gap by sampling, over the units whose input varies (0 if none does).
    """

    def __init__(self, norm: Norm, calls: _Calls) -> None:
        mean, var, batches = norm.buffers()
        assert mean is not None
        assert var is not None
        moments = merge(calls.parts)
        self.running_mean, self.running_var = on_host(mean), on_host(var)
        self.mean, self.var, self.m = moments.mean, moments.var, int(moments.count)
        self.eps, self.momentum = norm.eps, getattr(norm.layer, "momentum", None)
        self.steps = None if batches is None else int(batches)
        self.gap = self._gap(self.running_mean, self.running_var)
        means, variances = (np.concatenate(arrays) for arrays in zip(*calls.rows, strict=True))
        self.rows = len(means)
        noise = self._noise(means, variances)
        self.expected = float(np.median(noise[noise > 0])) if (noise > 0).any() else 0.0

    @property
    def start_left(self) -> float:
        """The weight of the initial mean 0 and variance 1: (1 - momentum)^steps; 0 if unknown."""
        return 0.0 if self.momentum is None or not self.steps else float((1 - self.momentum) ** self.steps)

    @property
    def gap_without_start(self) -> float:
        """The gap to the running statistics without the initial values; infinite if undefined."""
        left = self.start_left
        var = self.running_var - left
        if left >= 1 or not (var >= 0).all():
            return math.inf
        return self._gap(self.running_mean / (1 - left), var / (1 - left))

    @property
    def differs(self) -> bool:
        """Whether the gap is noticeable and more than chance."""
        return self.gap > max(NOTICEABLE, CHANCE * self.expected)

    def _gap(self, mean: Array, var: Array) -> float:
        return float(np.median(eval_gap(self.mean, self.var, mean, var, self.eps)))

    def _noise(self, means: Array, variances: Array) -> Array:
        """The gap that sampling explains: sqrt(Var μ_i/(N r²) + Var q_i/(4 N s² r²)), the errors of the mean and of s.

        μ_i are the means of the N rows, q_i their mean squares about the batch's mean. It is sqrt(1.5/m) for m
        independent normal values, and more if the values of a row are correlated. A single row counts as one value.
        """
        if self.rows < 2:
            return np.full_like(self.running_var, math.sqrt(1.5))
        squares = variances + (means - self.mean) ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_var = means.var(axis=0, ddof=1)
            scale_var = squares.var(axis=0, ddof=1) / (4 * (self.var + self.eps))
            return np.asarray(np.sqrt((mean_var + scale_var) / self.rows / (self.running_var + self.eps)))


Reason = tuple[str, str]
"""One of `REASONS`, and an explanation with the numbers."""


def reasons(layers: Sequence[Numbers]) -> list[Reason]:
    """A reason for each layer; the layers are in the order of their calls.

    "other-domain" and "stale" are heuristics: with data of another kind the first layer differs already; with weights
    that changed after the statistics were measured, the first layers still agree.
    """
    broken = [_reason_by_statistics(numbers) for numbers in layers]
    first_differs = next((n.differs for n, reason in zip(layers, broken, strict=True) if reason is None), False)
    return [reason or _reason_by_gap(n, first_differs) for n, reason in zip(layers, broken, strict=True)]


def _reason_by_statistics(n: Numbers) -> Reason | None:
    """The reason that the layer's statistics and settings show; None if they are in order."""
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


def _reason_by_gap(n: Numbers, first_differs: bool) -> Reason:
    compared = f"the typical unit is {n.gap:.2g} deviations off, chance explains {n.expected:.2g}"
    if n.differs and first_differs:
        question = "is this the kind of data that the statistics were measured on, preprocessed in the same way?"
        return "other-domain", f"{compared}, from the first layer on: {question}"
    if n.differs:
        why = "the weights changed after the statistics were measured, or dropout was on then: recalibrate"
        return "stale", f"{compared}; the first layer agrees: {why}"
    if n.gap > NOTICEABLE or FEW * n.expected**2 > 1.5:
        few = f"{compared}: {plural(n.m, 'value')} per channel in {plural(n.rows, 'sample')} are too few to decide"
        if n.m < FEW_FOR_SCALE:
            scale = math.sqrt((n.m - 1) / n.m)
            few += f"; by the batch size alone, the scale in eval is sqrt((m - 1)/m) = {scale:.4f} of training's"
        return "small-batch", few
    return "fine", compared
