"""A watched Run -> what is said of each layer. Read layer by layer, so that a large run is never widened whole.

A curve is (3, steps): 15th percentile, median and 85th percentile over the units that have a finite value; or
(1, steps), where it is one number for the layer.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.checks.findings import (
    Finding,
    Observed,
    by_severity,
    found_by,
)
from batchnorm.checks.rules.training import RULES
from batchnorm.quantities import CLASSES
from batchnorm.report.tables import Table
from batchnorm.runs.history import UNITS, History, Layer
from batchnorm.runs.run import Run
from batchnorm.verdict import ClassCounts

POINTS = 300
MOST_NAMES = 24


@dataclass(frozen=True)
class Scalar:
    """One name: `values` (3, len(steps)) hold the lowest, the mean and the highest value of each stretch of steps."""

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    last: float


def read_scalars(log: Table) -> tuple[Scalar, ...]:
    """Every name that has a finite value, in order of first appearance; at most `MOST_NAMES`."""
    if "name" not in log.words:
        return ()
    codes, names = log.words["name"]
    found = []
    finite = np.isfinite(log["value"])
    for code in dict.fromkeys(codes[finite].tolist()):
        rows = finite & (codes == code)
        found.append(_scalar(names[code], log["step"][rows].astype(np.int64), log["value"][rows]))
        if len(found) == MOST_NAMES:
            break
    return tuple(found)


def _scalar(name: str, steps: NDArray[np.int64], values: NDArray[np.float64]) -> Scalar:
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    place = np.log1p(np.maximum(steps, 0))
    stretch = np.floor(place * (POINTS / max(place[-1], 1e-9))).astype(np.int64)
    _, first, count = np.unique(stretch, return_index=True, return_counts=True)
    mean = np.add.reduceat(values, first) / count
    spread = np.stack([np.minimum.reduceat(values, first), mean, np.maximum.reduceat(values, first)])
    return Scalar(name, steps[first + count - 1], spread, float(values[-1]))


Array = NDArray[np.float64]

BANDS = (
    "undo_index",
    "undo_angle",
    "bare_angle",
    "position_in",
    "position_out",
    "gradient_diverted",
    "eval_gap",
    "drift_in_location",
    "drift_in_log_scale",
    "drift_out_location",
    "drift_out_log_scale",
    "effective_lr",
    "noise_mean",
    "noise_log_scale",
)
SHARES = ("undone", "away", "dead")
"""Classes whose share of a layer's units is drawn over time."""
UNIT_COLUMNS = (
    "class",
    "undo_index",
    "undo_angle",
    "bare_angle",
    "gamma",
    "s",
    "beta",
    "input_mean",
    "position_in",
    "position_out",
    "gradient_diverted",
    "eval_gap",
)
OF_TRAINING = ("gradient_diverted", "eval_gap")
"""What the row of the last step may not have: it is taken from the last in which the layer normalized a batch."""
PROBED = ("positive_in", "positive_out", "linear_share", "noise_mean", "noise_log_scale")
PERCENTILES = ("in_p15", "in_p50", "in_p85")
_MEASURED = (
    "count", "batches", "mean", "var", "gamma", "beta", "running_mean", "running_var", "energy", "diverted",
    "noise_mean", "noise_log_scale", "weight_norm", "lr",
)  # fmt: skip
_LEARNED = ("undo_index", "class", "undo_angle", "position_out", "drift_out_location", "drift_out_log_scale")
_FOR_RULES = (
    "gamma",
    "beta",
    "mean",
    "var",
    "s",
    "running_mean",
    "running_var",
    "count",
    "batches",
    "energy",
    "dead",
    "flat",
)


@dataclass(frozen=True)
class Curve:
    """`values` (1 or 3, len(steps)), NaN where unknown."""

    steps: NDArray[np.int64]
    values: Array

    @property
    def median(self) -> Array:
        middle: Array = self.values[len(self.values) // 2]
        return middle


@dataclass(frozen=True)
class LayerReading:
    """One layer: its curves over time by name, its units at the last step that it ran in (`at`), and findings.

    `begin` has gamma and beta as they were first seen; `m` is the typical number of values that a forward normalized.
    `last` is of step `at`, but for what only a training step has (OF_TRAINING), which is of step `ran`.
    """

    name: str
    units: int
    affine: bool
    facts: Mapping[str, Any]
    at: int | None
    ran: int | None
    m: float
    snapshots: int
    last: Mapping[str, Array]
    begin: Mapping[str, Array]
    curves: Mapping[str, Curve]
    findings: tuple[Finding, ...]

    @property
    def classes(self) -> ClassCounts:
        """Of its units at step `at`; none where the layer has no gamma and beta."""
        return ClassCounts.of(self.last["class"])


@dataclass(frozen=True)
class Reading:
    """A whole watched Run."""

    run: Run
    steps: NDArray[np.int64]
    layers: tuple[LayerReading, ...]
    scalars: tuple[Scalar, ...]

    @property
    def status(self) -> str:
        return str(self.run.info.get("status", "unknown"))

    @property
    def last_step(self) -> int | None:
        return int(self.steps[-1]) if len(self.steps) else None

    @cached_property
    def findings(self) -> list[Finding]:
        return by_severity([finding for layer in self.layers for finding in layer.findings])


def read(run: Run) -> Reading:
    """Of any watched Run. Raises RunError where a part is damaged."""
    history = History.read(run)
    probe, shift = _table(run, "probe"), _table(run, "shift")
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:  # NumPy and Arrow work without the interpreter's lock
        if history.layers:  # each column once, of all layers; of several processes they are large, and come in turn
            each = pool.map if len(run.ranks(UNITS)) == 1 else map
            deque(each(history.layers[0].__getitem__, _MEASURED), maxlen=0)
        layers = tuple(pool.map(lambda layer: _layer(_cached(layer), probe, shift), history.layers))
    return Reading(run, history.steps, layers, read_scalars(_table(run, "log")))


def band(values: Array) -> Array:
    """(3, rows): the 15th percentile, median and 85th percentile of each row's finite values, NaN where none is."""
    result = np.full((3, len(values)), np.nan)
    finite = np.isfinite(values)
    if not finite.any():
        return result
    ordered = np.sort(values if finite.all() else np.where(finite, values, np.nan), axis=1)  # NaN comes last
    count = finite.sum(axis=1)
    some = np.flatnonzero(count)
    for row, share in enumerate((0.15, 0.5, 0.85)):
        place = share * (count[some] - 1)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, count[some] - 1)
        part = place - below
        result[row, some] = ordered[some, below] * (1 - part) + ordered[some, above] * part
    return result


def median(values: Array) -> float:
    """Of the finite ones; NaN where there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def mean_of_known(values: Array) -> Array:
    """(1, rows): the mean of each row's known values; of 0s and 1s it is a share."""
    known = ~np.isnan(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0).sum(axis=1)
    mean: Array = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean[None]


def _cached(layer: Layer) -> Layer:
    """The same, for as long as it is read: each column is widened to float64 once."""
    return replace(layer, _column=cache(layer._column))


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _layer(layer: Layer, probe: Table, shift: Table) -> LayerReading:
    arrays = {name: layer[name] for name in dict.fromkeys((*BANDS, *UNIT_COLUMNS, *_FOR_RULES))}
    affine = layer.facts.get("affine") is not False
    if not affine:  # gamma = 1 and beta = 0 by construction: nothing that could undo
        arrays |= {name: np.full_like(arrays["gamma"], np.nan) for name in _LEARNED}
    observed = Observed(layer.name, layer.units, arrays, layer.steps, layer.facts)
    curves = {name: Curve(layer.steps, band(arrays[name])) for name in BANDS}
    known = np.where(arrays["class"] == CLASSES.index("unknown"), np.nan, arrays["class"])
    for name in SHARES:
        flags = np.where(np.isnan(known), np.nan, known == CLASSES.index(name))
        curves[name] = Curve(layer.steps, mean_of_known(flags))
    curves |= _probed(layer.name, probe, curves) | _shifted(layer.name, shift)
    ran = np.flatnonzero(np.isfinite(arrays["mean"]).any(axis=1))
    seen = np.flatnonzero(np.isfinite(arrays["input_mean"]).any(axis=1))
    place = {name: ran[-1:] if name in OF_TRAINING else seen[-1:] for name in UNIT_COLUMNS}
    sizes = np.fmax.reduce(arrays["count"] / np.where(arrays["batches"] > 0, arrays["batches"], 1), axis=1)
    return LayerReading(
        name=layer.name,
        units=layer.units,
        affine=affine,
        facts=layer.facts,
        at=int(layer.steps[seen[-1]]) if len(seen) else None,
        ran=int(layer.steps[ran[-1]]) if len(ran) else None,
        m=float(np.median(sizes[ran])) if len(ran) else float("nan"),
        snapshots=len(ran),
        last={name: arrays[name][rows].ravel() for name, rows in place.items()},
        begin={name: arrays[name][ran[:1]].ravel() for name in ("gamma", "beta")},
        curves={name: curve for name, curve in curves.items() if np.isfinite(curve.values).any()},
        findings=tuple(found_by(RULES, observed)),
    )


def _table(run: Run, name: str) -> Table:
    """The table as process 0 wrote it; what others add to it, about batches of their own, is left aside."""
    return Table.read(run, name) if 0 in run.ranks(name) else Table({})


def _probed(name: str, probe: Table, measured: Mapping[str, Curve]) -> dict[str, Curve]:
    """Curves of what probes saw; their batch noise only where the steps themselves have none."""
    rows = probe.rows(layer=name) if len(probe) else probe
    if not len(rows):
        return {}
    steps = np.unique(rows["step"])
    grids = {column: _by_step(rows, steps, column) for column in (*PROBED, *PERCENTILES)}
    when = steps.astype(np.int64)
    noise = {column for column in PROBED if column in measured and np.isfinite(measured[column].values).any()}
    curves = {column: Curve(when, band(grids[column])) for column in PROBED if column not in noise}
    curves["percentiles"] = Curve(when, np.stack([band(grids[column])[1] for column in PERCENTILES]))
    return curves


def _shifted(name: str, shift: Table) -> dict[str, Curve]:
    rows = shift.rows(layer=name) if len(shift) else shift
    if not len(rows):
        return {}
    steps = np.unique(rows["step"])
    return {
        column: Curve(steps.astype(np.int64), mean_of_known(_by_step(rows, steps, column)))
        for column in ("shift", "cosine")
    }


def _by_step(rows: Table, steps: Array, column: str) -> Array:
    """(steps, rows of a step): the column's values, NaN where a step has fewer; of a step probed twice, both."""
    order = np.argsort(rows["step"], kind="stable")
    values, place = rows[column][order], np.searchsorted(steps, rows["step"][order])
    count = np.bincount(place, minlength=len(steps))
    within = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
    grid = np.full((len(steps), int(count.max(initial=0))), np.nan)
    grid[place, within] = values
    return grid
