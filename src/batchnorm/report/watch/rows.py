"""Tables of a watched training: one row a layer, one row a run. For the terminal, the page, a notebook and JSON."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.report.watch.answer import WatchAnswer
from batchnorm.report.watch.reading import LayerReading, Reading
from batchnorm.words import count, index, number, percent, shortened

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerRow:
    """A layer at the last step that it ran in: medians over its units, shares of them; NaN where unknown."""

    name: str
    units: int
    step: int | None
    undo_index: float
    nearer_undone: float
    gradient_diverted: float
    dead: float
    eval_gap: float

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of COLUMNS; empty where unknown."""
        numbers = (
            (self.undo_index, index),
            (self.nearer_undone, percent),
            (self.gradient_diverted, percent),
            (self.dead, percent),
            (self.eval_gap, number),
        )
        return (self.name, count(self.units), *(form(v) if math.isfinite(v) else "" for v, form in numbers))


COLUMNS = ("layer", "units", "undo_index", "nearer undone", "gradient diverted", "dead", "eval gap")


def layer_rows(reading: Reading) -> list[LayerRow]:
    """In the order of the model."""
    return [_row(layer) for layer in reading.layers]


def _row(layer: LayerReading) -> LayerRow:
    middles = {name: _last(layer, name) for name in ("undo_index", "gradient_diverted", "eval_gap")}
    shares = {name: _last(layer, name) for name in ("nearer_undone", "dead")}
    return LayerRow(name=layer.name, units=layer.units, step=layer.at, **middles, **shares)


def _last(layer: LayerReading, name: str) -> float:
    """The curve's value at the last step that the layer ran in."""
    curve = layer.curves.get(name)
    if curve is None or layer.at is None:
        return math.nan
    return float(curve.median[np.searchsorted(curve.steps, layer.at)])


@dataclass(frozen=True)
class RunRow:
    """A run, for a table of several."""

    label: str
    status: str
    step: int | None
    layers: int
    units: int
    verdict: str
    undo_index: float
    nearer_undone: float
    gradient_diverted: float
    dead: int
    findings: str
    logged: tuple[tuple[str, float], ...]

    def cells(self, logged: tuple[str, ...]) -> tuple[str, ...]:
        """As text, in the order of RUN_COLUMNS and then of the logged names."""
        last = dict(self.logged)
        numbers = ((self.undo_index, index), (self.nearer_undone, percent), (self.gradient_diverted, percent))
        return (
            self.label,
            self.status,
            "" if self.step is None else count(self.step),
            count(self.layers),
            self.verdict,
            *(form(v) if math.isfinite(v) else "" for v, form in numbers),
            count(self.dead),
            self.findings,
            *(number(last[name]) if name in last else "" for name in logged),
        )


RUN_COLUMNS = (
    "run", "status", "last step", "layers", "answer", "undo_index", "nearer undone", "gradient diverted", "dead units",
    "findings",
)  # fmt: skip


def run_row(label: str, reading: Reading, found: WatchAnswer) -> RunRow:
    dead = sum(int(np.nansum(layer.last["dead"])) for layer in reading.layers)
    return RunRow(
        label=label,
        status=reading.status,
        step=reading.last_step,
        layers=len(reading.layers),
        units=sum(layer.units for layer in reading.layers),
        verdict=found.verdict,
        undo_index=found.undo_index,
        nearer_undone=found.nearer_undone,
        gradient_diverted=found.gradient_diverted,
        dead=dead,
        findings=counted(reading),
        logged=tuple((scalar.name, scalar.last) for scalar in reading.scalars),
    )


def counted(reading: Reading) -> str:
    """ "1 error, 3 warnings"; notes are not counted."""
    found = Counter(finding.severity for finding in reading.findings)
    words = [
        f"{found[level]} {level}{'' if found[level] == 1 else 's'}" for level in ("error", "warning") if found[level]
    ]
    return ", ".join(words) or "none"


def labels(readings: list[Reading]) -> list[str]:
    """The runs' folders by name; what is not told apart so by its parent's, too, and then by number."""
    resolved = [reading.run.path.absolute() for reading in readings]
    names = [shortened(path.name or str(path)) for path in resolved]
    clash = Counter(names)
    names = [
        f"{shortened(path.parent.name, 20)}/{name}" if clash[name] > 1 else name
        for name, path in zip(names, resolved, strict=True)
    ]
    seen: Counter[str] = Counter()
    for place, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[place] = f"{name} ({seen[name]})"
    return names
