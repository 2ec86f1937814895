"""Why a layer computes something else in eval mode than in training mode: a reading of its numbers and its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from batchnorm.moments import Moments, merge
from batchnorm.quantities import eval_gap
from batchnorm.surgery._shared.layers import Norm
from batchnorm.surgery._shared.measuring import Array, on_host
from batchnorm.words import plural

REASONS = ("non-finite", "never-trained", "too-few-steps", "other-domain", "stale", "small-batch", "fine")
"""The guilty first."""

NOTICEABLE = 0.1
"""In deviations. Less is not heard of; a tenth in each of twenty layers can turn the output over, as it adds up."""

CHANCE = 3.0
"""In expected sampling errors: what more than three of them leave, in the median over units, is no chance."""

FEW = 16
"""Independent values a channel. Below it the mean and deviation of a batch are off by a quarter and more."""

FEW_FOR_SCALE = 50
"""Values a channel. Training divides by the biased deviation, eval by the unbiased one: 1% apart at 50."""

START_LEFT = 0.05
"""A twentieth of mean 0 and variance 1 in the running statistics is seen in the outputs."""

EXPLAINED = 0.5
"""Taking the start out must leave less than half of the gap, before the start is called its cause."""


class Numbers:
    """What is known of a layer: its running statistics, and those of one batch, (C,) each, with m values a channel.

    `momentum` None is the cumulative average, `steps` num_batches_tracked (None where there is none). `gap` is the
    median over units of eval_gap, `expected` that of what sampling explains, over the units whose input varies in the
    batch; 0 where none does.

    Args:
        norm: the layer.
        parts: the moments of its inputs, one for each call.
        rows: the mean and the biased variance of each row of them (N, C).
    """

    def __init__(self, norm: Norm, parts: Sequence[Moments], rows: Sequence[tuple[Array, Array]]) -> None:
        layer: Any = norm.layer
        moments = merge(parts)
        self.running_mean, self.running_var = on_host(layer.running_mean), on_host(layer.running_var)
        self.mean, self.var, self.m = moments.mean, moments.var, int(moments.count)
        self.eps, self.momentum = norm.eps, layer.momentum
        self.steps = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
        self.gap = self._gap(self.running_mean, self.running_var)
        means, variances = (np.concatenate(each) for each in zip(*rows, strict=True))
        self.rows = len(means)
        noise = self._noise(means, variances)
        self.expected = float(np.median(noise[noise > 0])) if (noise > 0).any() else 0.0

    @property
    def independent(self) -> float:
        """How many independent values a channel would have as much sampling noise; infinite where there is none."""
        return 1.5 / self.expected**2 if self.expected else math.inf

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


class Reason(NamedTuple):
    """One of `REASONS`, and the words with the numbers."""

    slug: str
    why: str


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
        return Reason("non-finite", text)
    if (n.running_mean == 0).all() and (n.running_var == 1).all():
        since = f" after {_trained(n)}" if n.steps and n.momentum is not None else ""
        text = f"running mean 0 and variance 1, as at the start{since}: train in training mode, or recalibrate"
        return Reason("never-trained", text)
    if n.start_left > START_LEFT and n.differs and n.gap_without_start < EXPLAINED * n.gap:
        text = (
            f"after {_trained(n)}, {100 * n.start_left:.0f}% of the start (mean 0, "
            f"variance 1) is left in the running statistics; without it the gap would be {n.gap_without_start:.2g}: "
            "train on, or recalibrate"
        )
        return Reason("too-few-steps", text)
    return None


def _trained(n: Numbers) -> str:
    return f"{plural(n.steps or 0, 'step')} with momentum {n.momentum:g}"


def _by_place(n: Numbers, from_the_first: bool) -> Reason:
    compared = f"the typical unit is {n.gap:.2g} deviations off, chance explains {n.expected:.2g}"
    if n.differs and from_the_first:
        return Reason(
            "other-domain",
            f"{compared}; so from the first layer on: is this the kind of data that the statistics are of, prepared "
            "in the same way?",
        )
    if n.differs:
        return Reason(
            "stale",
            f"{compared}; the first layer agrees: the weights moved on after the statistics, or dropout was on when "
            "they were taken: recalibrate",
        )
    if n.gap > NOTICEABLE or n.independent < FEW:
        few = f"{compared}: {plural(n.m, 'value')} a channel in {plural(n.rows, 'sample')} are too few to tell"
        if n.m < FEW_FOR_SCALE:
            scale = math.sqrt((n.m - 1) / n.m)
            few += f"; by its size alone, the scale in eval is sqrt((m - 1)/m) = {scale:.4f} of training's"
        return Reason("small-batch", few)
    return Reason("fine", compared)
