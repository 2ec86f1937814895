"""Rules on what a layer holds: gamma, beta, running statistics, momentum. Of a training and of a checkpoint alike.

One function a rule. Thresholds are constants with their reasons; where a rule could cry wolf, its docstring says how it
does not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchnorm.checks.findings import (
    Finding,
    Kind,
    Observed,
    Rows,
    Rule,
    Severity,
    indices,
)
from batchnorm.words import plural

Mask = NDArray[np.bool_]

MANY = 0.05
"""Networks lose single units without harm; one in twenty is worth a look."""
HALF = 0.5

CONSTANT_BETA = 0.1
"""A shift that a following layer can feel."""

MOMENTUM_HIGH = 0.5
"""Above it, the running statistics are mostly the last batch's. TensorFlow's 0.99 is PyTorch's 0.01."""

STARTING_WEIGHT = 0.05
"""How much of the running statistics may still be their start (mean 0, variance 1)."""
DEFAULT_MOMENTUM = 0.1
"""PyTorch's, for a checkpoint, which does not store it."""

DEAD = Kind(
    "dead-units",
    "Dead units",
    "They pass on nothing that depends on the input: their weights no longer learn, or what they learn is not used.",
    "Lower the learning rate or warm it up; do not decay gamma and beta; or prune these units.",
    causes=("running-variance",),
)
CONSTANT = Kind(
    "constant-channels",
    "Constant channels",
    "The output hardly varies and beta is not near 0: it is the same constant for every input.",
    "Fold the constant into the next layer's bias and prune these units, or do not decay gamma.",
    causes=("running-variance",),
)
NON_FINITE = Kind(
    "non-finite",
    "Values that are not finite",
    "An infinity or a NaN in the statistics or parameters spreads to everything above it and does not go away.",
    "Look at the first step with it: a lower learning rate, gradient clipping, or float32 for this layer.",
)
BAD_VARIANCE = Kind(
    "running-variance",
    "Running variance zero or negative",
    "Inference divides by sqrt(running variance + eps): near zero it blows up what arrives, below zero it gives NaN.",
    "Recalibrate the running statistics; where they are zero again, the input of these units is constant.",
    causes=("non-finite",),
)
UNTRAINED = Kind(
    "untrained-statistics",
    "Running statistics hardly trained",
    "Inference uses the running statistics: until they have seen data, the network is another one than in training.",
    "Train on, or recalibrate the running statistics before inference.",
    causes=("never-updated",),
)
MOMENTUM = Kind(
    "momentum",
    "Momentum",
    "In PyTorch, momentum is the weight of the newest batch; other libraries name the weight of the past so.",
    "Use 1 minus the other library's value: TensorFlow's 0.99 is 0.01 here, the default is 0.1.",
)


def dead_units(layer: Observed) -> Finding | None:
    """Units dead to the end, as `quantities.dead` has it. Not: constant channels, gammas on their way up from 0, and
    gammas that a network at rest still has from a zero initialization."""
    if is_fresh(layer):
        return None
    first = layer.lasting(layer["dead"])
    lost = (first >= 0) & ~_rising(layer, first)
    return _of_units(layer, DEAD, lost, lost & ~_shifted(layer), first, "dead")


def constant_channels(layer: Observed) -> Finding | None:
    """Units whose output hardly varies to the end, where beta is not near 0."""
    first = layer.lasting(layer["flat"])
    lost = (first >= 0) & ~_rising(layer, first)
    return _of_units(layer, CONSTANT, lost, lost & _shifted(layer), first, "constant")


def non_finite(layer: Observed) -> Finding | None:
    """Parameters or statistics at rest; in a training a NaN where there was a number before, or under a count.

    What was overcome is told as such. Gradients are left out: mixed precision overflows on purpose and skips the step.
    """
    bad = np.zeros((layer.rows, layer.units), bool)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        values = layer[name]
        if np.isfinite(values).all():
            continue
        at_rest = layer.steps is None and name in layer.arrays
        known_before = at_rest | np.logical_or.accumulate(np.isfinite(values))
        bad |= np.isinf(values) | (np.isnan(values) & known_before)
    ran = layer["count"] > 0
    for name in ("mean", "var"):
        bad |= np.isinf(layer[name]) | (np.isnan(layer[name]) & ran)
    rows = np.flatnonzero(bad.any(axis=1))
    if not len(rows):
        return None
    units = np.flatnonzero(bad.any(axis=0))
    share = f"{len(units):,} of {plural(layer.units, 'unit')}"
    overcome = not bad[-1].any()
    text = f"{share} not finite{layer.since_words([int(rows[0])])}"
    if overcome:
        text = f"{share} not finite in {plural(len(rows), 'recorded step')}, finite again at the end"
    severity: Severity = "note" if overcome else "error"
    return Finding(NON_FINITE, severity, layer.name, text, float(len(units)), indices(units), layer.step(rows[0]))


def running_variance(layer: Observed) -> Finding | None:
    """Running variances at or below 0 at the end. Below is always wrong; at 0 a unit's input is constant, as a dead
    unit's below is, which single units are in networks that work."""
    var = layer["running_var"][-1:].ravel()
    negative, zero = np.flatnonzero(np.isfinite(var) & (var < 0)), np.flatnonzero(var == 0)
    units = negative if len(negative) else zero
    if not len(units):
        return None
    lowest = float(var[units].min())
    share = len(units) / layer.units
    severity: Severity = "error" if len(negative) or share >= HALF else "warning" if share >= MANY else "note"
    text = f"running variance {lowest:.3g} in {len(units):,} of {plural(layer.units, 'unit')}"
    return Finding(BAD_VARIANCE, severity, layer.name, text, lowest, indices(units))


def untrained_statistics(layer: Observed) -> Finding | None:
    """Still exactly mean 0 and variance 1 in every unit; or, early in a training, largely so by their momentum."""
    mean = layer["running_mean"][-1:]
    if not mean.size or not np.isfinite(mean).all():
        return None
    if at_start(layer):
        text = f"running mean 0 and variance 1: never updated{why_at_start(layer)}"
        return Finding(UNTRAINED, "warning", layer.name, text, 1.0)
    momentum = layer.settings.get("momentum")
    if layer.steps is None or not isinstance(momentum, float) or not 0 < momentum < 1:
        return None
    batches = np.nanmedian(layer["batches"]) if np.isfinite(layer["batches"]).any() else 1.0
    weight = (1 - momentum) ** ((int(layer.steps[-1]) + 1) * max(float(batches), 1.0))
    if weight <= STARTING_WEIGHT:
        return None
    text = f"{100 * weight:.0f}% of the running statistics are still their start, mean 0 and variance 1"
    return Finding(UNTRAINED, "note", layer.name, text, weight)


def momentum_convention(layer: Observed) -> Finding | None:
    """0: never updated; 0.5 and more: another library's convention. None (a cumulative average) is fine.

    Not: 0 over statistics at their start, of which `untrained_statistics` says that momentum is the reason.
    """
    value = layer.settings.get("momentum")
    if not isinstance(value, int | float) or 0 < value < MOMENTUM_HIGH or (value == 0 and at_start(layer)):
        return None
    if not np.isfinite(layer["running_mean"]).any():
        return None
    means = "the running statistics never move" if value == 0 else "the running statistics follow single batches"
    return Finding(MOMENTUM, "warning", layer.name, f"momentum {value:g}: {means}", float(value))


RULES: tuple[Rule, ...] = (
    non_finite,
    running_variance,
    dead_units,
    constant_channels,
    untrained_statistics,
    momentum_convention,
)


def at_start(layer: Observed) -> bool:
    """Whether the running statistics are exactly mean 0 and variance 1 in every unit."""
    mean, var = layer["running_mean"][-1:], layer["running_var"][-1:]
    return bool(mean.size and (mean == 0).all() and (var == 1).all())


def why_at_start(layer: Observed) -> str:
    """For a sentence about statistics at their start: the reason, where the settings show one."""
    return ", as momentum is 0" if layer.settings.get("momentum") == 0 else ""


def starting_share(layer: Observed) -> float:
    """Of a layer at rest: (1 - momentum)^batches of its running statistics is their start; 0 where that is unknown.

    0 also where a variance lies below that share of the start's 1, which no average from there can reach: the
    statistics were recalibrated.
    """
    if at_start(layer):
        return 1.0
    batches = layer.settings.get("batches")
    momentum = layer.settings.get("momentum", DEFAULT_MOMENTUM if layer.settings.get("stored") else None)
    if not batches or batches < 0 or not isinstance(momentum, int | float) or not 0 < momentum < 1:
        return 0.0
    share = float((1 - momentum) ** batches)
    return 0.0 if bool((layer["running_var"] < share).any()) else share


def is_fresh(layer: Observed) -> bool:
    """Whether gamma and beta of a layer at rest are 0 because no training has moved them yet.

    Residual networks often initialize the last gamma of a block to 0. All gammas and betas are then exactly 0, and the
    running statistics are at their start, but for a few batches that infer shapes. Training moves all of them.
    """
    untouched = layer.steps is None and bool((layer["gamma"] == 0).all() and (layer["beta"] == 0).all())
    return untouched and starting_share(layer) > STARTING_WEIGHT


def _shifted(layer: Observed) -> Mask:
    """Units that end with an output that hardly varies and a shift that can be felt."""
    shifted: Mask = (layer["flat"][-1:] == 1) & (np.abs(layer["beta"][-1:]) >= CONSTANT_BETA)
    ends: Mask = np.any(shifted, axis=0)
    return ends


def _rising(layer: Observed, first: NDArray[np.int64]) -> Mask:
    """Units whose gamma was near 0 from the first row on, and grows: residual blocks often begin with gamma = 0."""
    gamma = np.abs(layer["gamma"])
    if len(gamma) < 2:
        return np.zeros(layer.units, bool)
    start = np.take_along_axis(gamma, (~np.isnan(gamma)).argmax(axis=0)[None], axis=0)[0]
    rising: Mask = (first == 0) & (layer["flat"][-1] == 1) & (gamma[-1] > start)
    return rising


def _of_units(layer: Observed, kind: Kind, lost: Mask, of_kind: Mask, first: Rows, word: str) -> Finding | None:
    """A finding about the units `of_kind`. The severity follows the share of all `lost` ones, dead and constant."""
    units = np.flatnonzero(of_kind)
    if not len(units):
        return None
    share, share_lost = len(units) / layer.units, float(lost.mean())
    severity: Severity = "error" if share_lost >= HALF else "warning" if share_lost >= MANY else "note"
    rows = [int(row) for row in first[units]]
    text = f"{len(units):,} of {plural(layer.units, 'unit')} {word}{layer.since_words(rows)}"
    return Finding(kind, severity, layer.name, text, share, indices(units), layer.step(max(rows)))
