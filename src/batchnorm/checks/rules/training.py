"""Rules for the steps of a training: batches, gradients, and the gap between training and inference.

A state must hold in the last recorded steps (`LASTING`); one batch is never enough.
"""

from __future__ import annotations

import numpy as np

from batchnorm.checks import findings
from batchnorm.checks.findings import LASTING, Finding, Kind, LayerData, Rule, Severity
from batchnorm.words import plural

GAP_LARGE = 0.5
"""Half a deviation between training and inference in the typical unit. Networks that infer well show 0.02 to 0.2 on
batches of real images, whose values are not independent."""
GAP_ERROR = 2.0
GAP_NOISE = 5.0
"""In units of the sampling noise sqrt(1.5/m): a gap of five times the noise is not chance."""
GAP_GROWTH = 2.0
SETTLED = 50
"""Steps until running statistics with the default momentum forget their initial values: 0.9^50 is half a percent."""

DIVERTED_HIGH = 0.9
TINY_BATCH = 16
"""In smaller batches mean and deviation are off by a quarter or more: sqrt(1/m), sqrt(1/(2m))."""
SMALLEST_DIVERTED_BATCH = 32
"""Two of m directions are diverted from any gradient; in smaller batches that alone is much."""
NOISE_HIGH = 0.1
"""The means of batches differ by a third of a deviation, like those of ten independent values per batch."""

GAP = Kind(
    "eval-gap",
    "Training and inference differ",
    "The running statistics, which inference uses, are far from the batch statistics, which training uses: inference "
    "computes something else than what was trained.",
    "Recalibrate the running statistics, lower the learning rate at the end, or check that training and evaluation "
    "data are prepared alike.",
    causes=("non-finite", "untrained-statistics", "momentum"),
)
DIVERTED = Kind(
    "gradient-diverted",
    "Little gradient gets through",
    "Nearly all of the gradient's energy goes to gamma and beta: the layers below learn very little from it.",
    "Check whether a few outputs dominate the loss, or whether the units' outputs hardly vary within a batch.",
)
NO_GRADIENT = Kind(
    "no-gradient",
    "No gradient",
    "No gradient arrives at this layer: nothing below it learns through it.",
    "Check that its output contributes to the loss and is not detached; no action needed if it is frozen on purpose.",
    causes=("non-finite",),
)
NOT_RUN = Kind(
    "not-recorded",
    "Layers without a record",
    "The layer did not normalize by batch statistics in any recorded step: nothing is known about it.",
    "No action needed if it is in eval mode on purpose (frozen); else check that the forward pass uses it.",
)
BATCH = Kind(
    "tiny-batches",
    "Tiny batches",
    "Mean and variance of a few values are mostly chance: training is noisy and inference differs from it.",
    "Use larger batches, synchronized batch norm over processes, or group normalization.",
)
NOISE = Kind(
    "batch-noise",
    "Batches differ much",
    "The mean of a batch says little about that of the next. No gamma and beta can undo what varies between batches.",
    "Use larger batches or shuffle better; batches of one class, or of crops of one image, look like this.",
    causes=("tiny-batches",),
)


def eval_gap(layer: LayerData) -> Finding | None:
    """The typical unit's train/eval gap, far above its sampling noise in each of the last recorded steps.

    Not reported before the running statistics had time to settle.
    """
    if layer.steps is None or not len(layer.steps) or layer.steps[-1] < SETTLED:
        return None
    gap, m = layer["eval_gap"], _batch_sizes(layer)
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = np.fmax(GAP_LARGE, GAP_NOISE * np.sqrt(1.5 / m))
    large = np.where(np.isnan(gap), np.nan, gap > limit)
    units = np.flatnonzero(layer.lasting(large) >= 0)
    if len(units) <= layer.units / 2:
        return None
    by_row = np.nanmedian(gap[~np.isnan(gap).all(axis=1)], axis=1)
    now = float(np.median(by_row[-LASTING:]))
    before = by_row[:-LASTING][-LASTING:]
    grown = len(before) == LASTING and now > GAP_GROWTH * float(np.median(before))
    severity: Severity = "error" if now > GAP_ERROR else "warning"
    text = (
        f"the typical unit is {now:.2g} deviations off in inference{', and the gap is growing' if grown else ''} "
        f"({layer.counted(units)} above {np.nanmedian(limit[-1]):.2g})"
    )
    return layer.finding(GAP, severity, text, now, units)


def _lasting(layer: LayerData, column: str, limit: float) -> float | None:
    """The typical unit's value if it exceeds the limit in each of the last recorded steps."""
    known = layer[column][~np.isnan(layer[column]).all(axis=1)]
    if len(known) < LASTING:
        return None
    by_row = np.nanmedian(known[-LASTING:], axis=1)
    return float(np.median(by_row)) if (by_row > limit).all() else None


def gradient_diverted(layer: LayerData) -> Finding | None:
    """The typical unit's share of diverted gradient, in each of the last recorded steps."""
    share = _lasting(layer, "gradient_diverted", DIVERTED_HIGH)
    if share is None or not _typical_batch(layer) >= SMALLEST_DIVERTED_BATCH:
        return None
    text = f"{100 * share:.1f}% of the typical unit's gradient energy is diverted to gamma and beta"
    return layer.finding(DIVERTED, "warning", text, share)


def no_gradient(layer: LayerData) -> Finding | None:
    """No unit has a gradient in the last recorded steps in which the layer ran."""
    ran = (layer["count"] > 0).any(axis=1)
    with np.errstate(invalid="ignore"):
        arrived = (layer["energy"] != 0).any(axis=1) & ~np.isnan(layer["energy"]).all(axis=1)
    rows = np.flatnonzero(ran)
    if len(rows) < LASTING or arrived[rows[-LASTING:]].any():
        return None
    with_gradient = np.flatnonzero(arrived)
    if not len(with_gradient):
        return layer.finding(NO_GRADIENT, "note", "no gradient in any recorded step", 0.0)
    first = int(rows[rows > with_gradient[-1]][0])
    text = f"no gradient{layer.since_words([first])}"
    return layer.finding(NO_GRADIENT, "warning", text, 0.0, row=first)


def not_recorded(layer: LayerData) -> Finding | None:
    """The layer did not run in any recorded step."""
    if layer.rows < LASTING or (layer["count"] > 0).any() or np.isfinite(layer["mean"]).any():
        return None
    return layer.finding(NOT_RUN, "note", f"not run in any of {plural(layer.rows, 'recorded step')}", 0.0)


def tiny_batches(layer: LayerData) -> Finding | None:
    """Few values per unit and forward pass in the typical recorded step."""
    m = _typical_batch(layer)
    if not m < TINY_BATCH:
        return None
    severity: Severity = "error" if m < 2 else "warning"
    return layer.finding(BATCH, severity, f"{m:.3g} {'value' if m == 1 else 'values'} per unit in a batch", m)


def batch_noise(layer: LayerData) -> Finding | None:
    """The typical unit's Var(batch means)/var exceeds the limit in each of the last steps that have it."""
    noise = _lasting(layer, "noise_mean", NOISE_HIGH)
    if noise is None:
        return None
    text = f"between batches, the typical unit's mean varies by {noise:.2g} of its variance"
    return layer.finding(NOISE, "note", text, noise)


RULES: tuple[Rule, ...] = (
    *findings.RULES,
    eval_gap,
    gradient_diverted,
    no_gradient,
    not_recorded,
    tiny_batches,
    batch_noise,
)


def _batch_sizes(layer: LayerData) -> np.ndarray:
    """m of one forward, (rows, units)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        batches = np.where(layer["batches"] > 0, layer["batches"], 1.0)
        return np.where(layer["count"] > 0, layer["count"] / batches, np.nan)


def _typical_batch(layer: LayerData) -> float:
    """The median over the recorded steps; NaN where none is known."""
    sizes = np.fmax.reduce(_batch_sizes(layer), axis=1)
    return float(np.nanmedian(sizes)) if np.isfinite(sizes).any() else float("nan")
