"""Why a layer computes something else in eval mode than in training mode: a reading of its numbers and its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.quantities import eval_gap
from batchnorm.words import plural

Array = NDArray[np.float64]

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


@dataclass(frozen=True, slots=True)
class Numbers:
    """What is known of a layer: its running statistics, and one batch's, (C,) each.

    `momentum` None is the cumulative average, `steps` num_batches_tracked (None where there is none). m values a
    channel stand in `rows` samples; `noise` is the gap that sampling them explains, per unit.
    """

    running_mean: Array
    running_var: Array
    mean: Array
    var: Array
    noise: Array
    eps: float
    momentum: float | None
    steps: int | None
    m: int
    rows: int

    @property
    def gap(self) -> float:
        """The median over units of eval_gap."""
        return self._gap(self.running_mean, self.running_var)

    @property
    def expected(self) -> float:
        """The median of what sampling explains, over the units whose input varies in the batch; 0 where none does."""
        varying = self.noise[self.noise > 0]
        return float(np.median(varying)) if varying.size else 0.0

    @property
    def independent(self) -> float:
        """How many independent values a channel would have as much sampling noise; infinite where there is none."""
        return 1.5 / self.expected**2 if self.expected else math.inf

    @property
    def start_left(self) -> float:
        """The weight of mean 0 and variance 1 in the running statistics: (1 - momentum)^steps; 0 where unknown."""
        if self.momentum is None or not self.steps:
            return 0.0
        return float((1 - self.momentum) ** self.steps)

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


@dataclass(frozen=True, slots=True)
class Reason:
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
