"""Rules for the state of a layer, in trainings and in checkpoints.

Thresholds are constants with their reasons. The docstring of a rule says how it avoids false alarms.
"""

from __future__ import annotations

import numpy as np

from batchnorm.checks.findings import Finding, Kind, Mask, Observed, Rows, Rule, Severity
from batchnorm.words import plural

MANY = 0.05
"""A network loses single units without harm; one in twenty is worth a look."""
HALF = 0.5

CONSTANT_BETA = 0.1
"""A shift that a following layer can feel."""

MOMENTUM_HIGH = 0.5
"""Above it, the running statistics are mostly the last batch's. TensorFlow's 0.99 is PyTorch's 0.01."""

STARTING_WEIGHT = 0.05
"""The weight that the initial values (mean 0, variance 1) may still have in the running statistics."""
DEFAULT_MOMENTUM = 0.1
"""PyTorch's default. A checkpoint does not store momentum."""

DEAD = Kind(
    "dead-units",
    "Dead units",
    "Their output does not depend on the input: their weights no longer learn, or what they learn is not used.",
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
    "An infinity or a NaN in the statistics or parameters spreads to all layers above and does not go away.",
    "Look at the first step with it. Try a lower learning rate, gradient clipping, or float32 for this layer.",
)
BAD_VARIANCE = Kind(
    "running-variance",
    "Running variance zero or negative",
    "Inference divides by sqrt(running variance + eps): near zero it amplifies its input, below zero it returns NaN.",
    "Recalibrate the running statistics; if they are zero again, the input of these units is constant.",
    causes=("non-finite",),
)
UNTRAINED = Kind(
    "untrained-statistics",
    "Running statistics hardly trained",
    "Inference uses the running statistics: until they have seen data, the network computes something else than in "
    "training.",
    "Train longer, or recalibrate the running statistics before inference.",
    causes=("never-updated",),
)
MOMENTUM = Kind(
    "momentum",
    "Momentum",
    "In PyTorch, momentum is the weight of the newest batch; other libraries use momentum for the weight of the old "
    "value.",
    "Use 1 minus the other library's value: TensorFlow's 0.99 is 0.01 here, the default is 0.1.",
)


def dead_units(layer: Observed) -> Finding | None:
    """Units that are dead at the end (`quantities.dead`).

    Not reported: constant channels, gammas that grow from 0, and the zero initialization of an untrained checkpoint.
    """
    return None if is_fresh(layer) else _lost(layer, DEAD, "dead")


def constant_channels(layer: Observed) -> Finding | None:
    """Units whose output hardly varies at the end and whose beta is not near 0."""
    return _lost(layer, CONSTANT, "flat")


def _lost(layer: Observed, kind: Kind, flag: str) -> Finding | None:
    """Units with this flag at the end. The severity follows the share of constant and dead units together."""
    first = layer.lasting(layer[flag])
    lost = (first >= 0) & ~_rising(layer, first)
    shifted: Mask = ((layer["flat"][-1:] == 1) & (np.abs(layer["beta"][-1:]) >= CONSTANT_BETA)).any(axis=0)
    units = np.flatnonzero(lost & (shifted if kind is CONSTANT else ~shifted))
    if not len(units):
        return None
    rows = [int(row) for row in first[units]]
    text = f"{layer.counted(units)} {'constant' if kind is CONSTANT else 'dead'}{layer.since_words(rows)}"
    return layer.finding(kind, _severity_of(float(lost.mean())), text, len(units) / layer.units, units, max(rows))


def _severity_of(share: float) -> Severity:
    return "error" if share >= HALF else "warning" if share >= MANY else "note"


def non_finite(layer: Observed) -> Finding | None:
    """Parameters or statistics that are not finite; in a training, a NaN after a number or in a step that ran.

    Finite again at the end: only a note. Gradients do not count: mixed precision overflows on purpose and skips the
    step.
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
    severity: Severity = "error"
    text = f"{layer.counted(units)} not finite{layer.since_words([int(rows[0])])}"
    if not bad[-1].any():
        severity = "note"
        text = f"{layer.counted(units)} not finite in {plural(len(rows), 'recorded step')}, finite again at the end"
    return layer.finding(NON_FINITE, severity, text, float(len(units)), units, rows[0])


def running_variance(layer: Observed) -> Finding | None:
    """Running variances at or below 0 at the end.

    Below 0 is always wrong. At 0 the input is constant, as below a dead unit; working networks have single ones.
    """
    var = layer["running_var"][-1:].ravel()
    negative, zero = np.flatnonzero(np.isfinite(var) & (var < 0)), np.flatnonzero(var == 0)
    units = negative if len(negative) else zero
    if not len(units):
        return None
    lowest = float(var[units].min())
    severity = "error" if len(negative) else _severity_of(len(units) / layer.units)
    text = f"running variance {lowest:.3g} in {layer.counted(units)}"
    return layer.finding(BAD_VARIANCE, severity, text, lowest, units)


def untrained_statistics(layer: Observed) -> Finding | None:
    """Running statistics at exactly mean 0 and variance 1; or, early in a training, largely so by their momentum."""
    mean = layer["running_mean"][-1:]
    if not mean.size or not np.isfinite(mean).all():
        return None
    if at_start(layer):
        text = f"running mean 0 and variance 1: never updated{why_at_start(layer)}"
        return layer.finding(UNTRAINED, "warning", text, 1.0)
    momentum = layer.settings.get("momentum")
    if layer.steps is None or not isinstance(momentum, float) or not 0 < momentum < 1:
        return None
    batches = np.nanmedian(layer["batches"]) if np.isfinite(layer["batches"]).any() else 1.0
    weight = (1 - momentum) ** ((int(layer.steps[-1]) + 1) * max(float(batches), 1.0))
    if weight <= STARTING_WEIGHT:
        return None
    text = f"{100 * weight:.0f}% of the running statistics are still their start, mean 0 and variance 1"
    return layer.finding(UNTRAINED, "note", text, weight)


def momentum_convention(layer: Observed) -> Finding | None:
    """Momentum 0 (never updated) or at least 0.5 (another library's convention). None (cumulative average) is fine.

    Not reported: 0 over initial statistics, which `untrained_statistics` explains by the momentum.
    """
    value = layer.settings.get("momentum")
    if not isinstance(value, int | float) or 0 < value < MOMENTUM_HIGH or (value == 0 and at_start(layer)):
        return None
    if not np.isfinite(layer["running_mean"]).any():
        return None
    effect = "the running statistics never move" if value == 0 else "the running statistics follow single batches"
    return layer.finding(MOMENTUM, "warning", f"momentum {value:g}: {effect}", float(value))


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
    """For a sentence about initial statistics: the reason, if the settings show one."""
    return ", as momentum is 0" if layer.settings.get("momentum") == 0 else ""


def starting_share(layer: Observed) -> float:
    """The weight (1 - momentum)^batches of the initial values in the running statistics; 0 if unknown.

    Also 0 if a variance lies below this weight times the initial 1: no average reaches that, so the statistics were
    recalibrated.
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
    """Whether all gammas and betas of a checkpoint's layer are 0 because no training has moved them yet.

    Residual networks often initialize the last gamma of a block to 0. The running statistics are then at their initial
    values, but for a few batches that infer shapes.
    """
    untouched = layer.steps is None and bool((layer["gamma"] == 0).all() and (layer["beta"] == 0).all())
    return untouched and starting_share(layer) > STARTING_WEIGHT


def _rising(layer: Observed, first: Rows) -> Mask:
    """Units whose gamma grows from near 0 in the first row, as in residual blocks that start with gamma = 0."""
    gamma = np.abs(layer["gamma"])
    if len(gamma) < 2:
        return np.zeros(layer.units, bool)
    start = np.take_along_axis(gamma, (~np.isnan(gamma)).argmax(axis=0)[None], axis=0)[0]
    rising: Mask = (first == 0) & (layer["flat"][-1] == 1) & (gamma[-1] > start)
    return rising
