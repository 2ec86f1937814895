"""Read a watched Run layer by layer: curves over the steps, the units at the last step, and findings.

A curve is (3, steps): 15th percentile, median and 85th percentile over the finite values of the units; or (1, steps)
for one number per layer.
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

from batchnorm import words
from batchnorm.checks.findings import Finding, LayerData, apply_rules, by_severity
from batchnorm.checks.rules.training import RULES
from batchnorm.quantities import CLASSES
from batchnorm.report.tables import Table, known_mean, known_quantiles
from batchnorm.runs.history import MEASURED, UNITS, History, Layer
from batchnorm.runs.run import Run
from batchnorm.words import ClassCounts

Array = NDArray[np.float64]

POINTS = 300
MOST_NAMES = 24


@dataclass(frozen=True)
class Scalar:
    """A logged name: `values` (3, len(steps)) are min, mean and max per interval of steps."""

    name: str
    steps: NDArray[np.int64]
    values: Array
    last: float


def read_scalars(log: Table) -> tuple[Scalar, ...]:
    """The first `MOST_NAMES` names with a finite value, in order of first appearance."""
    log = log.where(np.isfinite(log["value"]))
    return tuple(_scalar(name, log.rows(name=name)) for name in log.names("name")[:MOST_NAMES])


def _scalar(name: str, log: Table) -> Scalar:
    order = np.argsort(log["step"], kind="stable")
    steps, values = log["step"][order].astype(np.int64), log["value"][order]
    position = np.log1p(np.maximum(steps, 0))
    interval = np.floor(position * (POINTS / max(position[-1], 1e-9))).astype(np.int64)
    _, first, count = np.unique(interval, return_index=True, return_counts=True)
    mean = np.add.reduceat(values, first) / count
    spread = np.stack([np.minimum.reduceat(values, first), mean, np.maximum.reduceat(values, first)])
    return Scalar(name, steps[first + count - 1], spread, float(values[-1]))


DRIFTS = ("drift_in_location", "drift_in_log_scale", "drift_out_location", "drift_out_log_scale")
OF_TRAINING = ("gradient_diverted", "eval_gap")
"""Missing in the last step of a recording: taken from the last step in which the layer normalized a batch."""
_UNDOING = ("undo_index", "undo_angle", "bare_angle")
MEDIANS = (*_UNDOING, *OF_TRAINING)
"""Quantities whose median over units is in a layer's row."""
NOISE = ("noise_mean", "noise_log_scale")
BANDS = (*_UNDOING, "position_in", "position_out", *OF_TRAINING, *DRIFTS, "effective_lr", *NOISE)
SHARES = ("undone", "away", "dead")
"""Classes whose share of a layer's units has a curve."""
UNIT_COLUMNS = (
    "class", *_UNDOING, "gamma", "s", "beta", "input_mean", "position_in", "position_out", *OF_TRAINING,
)  # fmt: skip
PROBED = ("positive_in", "positive_out", "linear_share", *NOISE)
PERCENTILES = ("in_p15", "in_p50", "in_p85")
_MEASURED = tuple(name for name in MEASURED if name not in ("dgamma", "dbeta"))
_LEARNED = ("undo_index", "class", "undo_angle", "position_out", "drift_out_location", "drift_out_log_scale")
_FOR_RULES = (
    "gamma", "beta", "mean", "var", "s", "running_mean", "running_var", "count", "batches", "energy", "dead", "flat",
)  # fmt: skip
MOVED = 0.05
"""How far (gamma, beta) of the typical unit must have moved, if all units of the layer started alike."""
MIN_SNAPSHOTS = 3
MIN_STEPS = 20
PARAMETRIZED = ".parametrizations."
TEXTS = ("layer", "type", "fed by")
COLUMNS = (
    *TEXTS, "units", "undo_index", "undo_angle", "undone", "away", "dead", "gradient diverted", "eval gap",
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """`values` (1 or 3, len(steps)), NaN where unknown."""

    steps: NDArray[np.int64]
    values: Array

    @property
    def median(self) -> Array:
        median: Array = self.values[len(self.values) // 2]
        return median

    @property
    def known(self) -> Array:
        return self.median[np.isfinite(self.median)]


@dataclass(frozen=True)
class LayerReading:
    """One layer: its curves by name, its units at the last step in which it ran (`step`), and its findings.

    `begin` has the first recorded gamma and beta; `m` is the typical number of values per unit and forward pass. `last`
    has the units at `step`; quantities of OF_TRAINING are those of the last training step.
    """

    name: str
    units: int
    affine: bool
    facts: Mapping[str, Any]
    step: int | None
    m: float
    snapshots: int
    last: Mapping[str, Array]
    begin: Mapping[str, Array]
    curves: Mapping[str, Curve]
    findings: tuple[Finding, ...]

    @cached_property
    def classes(self) -> ClassCounts:
        return ClassCounts.of(self.last["class"])

    @cached_property
    def medians(self) -> dict[str, float]:
        """Medians of MEDIANS over its units; NaN where unknown."""
        return {name: words.quantile(self.last[name]) for name in MEDIANS}

    @property
    def at_start(self) -> float:
        return float(self.curves["undo_index"].known[0]) if "undo_index" in self.curves else math.nan

    @cached_property
    def why_not(self) -> str:
        """Why it is too early for an answer; empty otherwise."""
        gamma, beta = self.begin["gamma"], self.begin["beta"]
        first = int(self.curves["position_in"].steps[0]) if "position_in" in self.curves else 0
        if 2 * self.classes["unknown"] > self.classes.units:
            return ""  # "unknown" is an answer
        if self.snapshots < MIN_SNAPSHOTS:
            return f"recorded {words.plural(self.snapshots, 'time')} only"
        if self.step is None or self.step - first < MIN_STEPS:
            return f"followed over {words.plural((self.step or 0) - first, 'step')} only"
        set_alike = np.ptp(gamma) == 0 and np.ptp(beta) == 0
        moved = words.quantile(np.hypot(self.last["gamma"] - gamma, self.last["beta"] - beta))
        return "gamma and beta have hardly moved since the start" if set_alike and not moved >= MOVED else ""

    @property
    def verdict(self) -> str:
        return "too early" if self.why_not else self.classes.verdict

    @property
    def kind(self) -> str:
        kind = self.facts.get("class")
        return kind if isinstance(kind, str) else ""

    @property
    def producer(self) -> str:
        """The module whose weight makes its input: "conv1" for "conv1.weight"; empty where unknown."""
        parameter = self.facts.get("producer")
        if not isinstance(parameter, str):
            return ""
        module, parametrized, _ = parameter.partition(PARAMETRIZED)
        return module if parametrized else parameter.rpartition(".")[0]

    @property
    def brief(self) -> str:
        """For a narrow column: "BN2d on conv1". The producer is relative to the layer's parent."""
        producer = self.producer.removeprefix(self.name.rpartition(".")[0] + ".")
        return " ".join(filter(None, (self.kind.replace("BatchNorm", "BN"), producer and f"on {producer}")))

    def cells(self) -> tuple[str, ...]:
        """The cells of COLUMNS as text; empty where unknown."""
        undo, undo_angle, _, diverted, gap = self.medians.values()
        return (
            *(self.name, self.kind, self.producer, words.count(self.units)),
            *(words.known(undo, words.index), words.known(undo_angle, words.angle)),
            *(words.known(self.classes.share(name), words.percent) for name in SHARES),
            *(words.known(diverted, words.percent), words.known(gap, words.number)),
        )


@dataclass(frozen=True)
class Reading:
    """The numbers of one watched Run: steps, layers and logged scalars."""

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
    """Read any watched Run. Raises RunError if a part is damaged."""
    history = History.read(run)
    probe, shift = _table(run, "probe"), _table(run, "shift")
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:  # NumPy and Arrow release the GIL
        if history.layers:  # read each column once for all layers; those of several processes are large: one by one
            apply = pool.map if len(run.ranks(UNITS)) == 1 else map
            deque(apply(history.layers[0].__getitem__, _MEASURED), maxlen=0)
        layers = tuple(pool.map(lambda layer: _layer(layer, probe, shift), history.layers))
    return Reading(run, history.steps, layers, read_scalars(_table(run, "log")))


def band(values: Array) -> Array:
    """(3, rows): the 15th percentile, median and 85th percentile of each row's finite values; NaN without any."""
    return known_quantiles(values, (0.15, 0.5, 0.85))


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _layer(layer: Layer, probe: Table, shift: Table) -> LayerReading:
    layer = replace(layer, _column=cache(layer._column))  # each column is widened to float64 once
    arrays = {name: layer[name] for name in dict.fromkeys((*BANDS, *UNIT_COLUMNS, *_FOR_RULES))}
    affine = layer.facts.get("affine") is not False
    if not affine:  # gamma = 1 and beta = 0 by construction
        arrays |= {name: np.full_like(arrays["gamma"], np.nan) for name in _LEARNED}
    observed = LayerData(layer.name, layer.units, arrays, layer.steps, layer.facts)
    curves = {name: Curve(layer.steps, band(arrays[name])) for name in BANDS}
    known = np.where(arrays["class"] == CLASSES.index("unknown"), np.nan, arrays["class"])
    for name in SHARES:
        flags = np.where(np.isnan(known), np.nan, known == CLASSES.index(name))
        curves[name] = Curve(layer.steps, known_mean(flags)[None])
    curves |= _probed(layer.name, probe, curves) | _shifted(layer.name, shift)
    ran = np.flatnonzero(np.isfinite(arrays["mean"]).any(axis=1))
    recorded = np.flatnonzero(np.isfinite(arrays["input_mean"]).any(axis=1))
    last_row = {name: ran[-1:] if name in OF_TRAINING else recorded[-1:] for name in UNIT_COLUMNS}
    sizes = np.fmax.reduce(arrays["count"] / np.where(arrays["batches"] > 0, arrays["batches"], 1), axis=1)
    return LayerReading(
        name=layer.name,
        units=layer.units,
        affine=affine,
        facts=layer.facts,
        step=int(layer.steps[recorded[-1]]) if len(recorded) else None,
        m=float(np.median(sizes[ran])) if len(ran) else float("nan"),
        snapshots=len(ran),
        last={name: arrays[name][rows].ravel() for name, rows in last_row.items()},
        begin={name: arrays[name][ran[:1]].ravel() for name in ("gamma", "beta")},
        curves={name: curve for name, curve in curves.items() if np.isfinite(curve.values).any()},
        findings=tuple(apply_rules(RULES, observed)),
    )


def _table(run: Run, name: str) -> Table:
    """The table of process 0; other processes write about their batches, which is not read."""
    return Table.read(run, name) if 0 in run.ranks(name) else Table({})


def _probed(name: str, probe: Table, measured: Mapping[str, Curve]) -> dict[str, Curve]:
    """Curves of probes; their batch noise only if the steps have none. A step probed twice has the rows of both."""
    steps, grids = probe.rows(layer=name).grids(("step",), *PROBED, *PERCENTILES)
    at = steps["step"].astype(np.int64)
    noise = {column for column in PROBED if column in measured and np.isfinite(measured[column].values).any()}
    curves = {column: Curve(at, band(grids[column])) for column in PROBED if column not in noise}
    curves["percentiles"] = Curve(at, np.stack([band(grids[column])[1] for column in PERCENTILES]))
    return curves


def _shifted(name: str, shift: Table) -> dict[str, Curve]:
    steps, grids = shift.rows(layer=name).grids(("step",), "shift", "cosine")
    return {column: Curve(steps["step"].astype(np.int64), known_mean(grid)[None]) for column, grid in grids.items()}
