"""Tables of a watched training: one row a layer, one row a run. For the terminal, the page, a notebook and JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.report.watch.answer import WatchAnswer, answer
from batchnorm.report.watch.numbers import LayerReading, Reading, median, read
from batchnorm.runs.run import Run
from batchnorm.verdict import ClassCounts
from batchnorm.words import angle, count, index, number, percent, shortened

PARAMETRIZED = ".parametrizations."


def module_of(parameter: str) -> str:
    """The module that has this parameter: "conv1" of "conv1.weight"."""
    return parameter.partition(PARAMETRIZED)[0] if PARAMETRIZED in parameter else parameter.rpartition(".")[0]


def brief(name: str, kind: str, producer: str) -> str:
    """For a narrow column: "BN2d on conv1". The producer's name is without the beginning that the layer's has, too."""
    fed = producer.removeprefix(name.rpartition(".")[0] + ".")
    return " ".join(filter(None, (kind.replace("BatchNorm", "BN"), f"on {fed}" if fed else "")))


Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerRow:
    """A layer at its last step: medians over its units, how many are in each class; NaN where unknown.

    `kind` is its class, `producer` the module whose weight makes its input; both empty where unknown.
    gradient_diverted and eval_gap are of the last step in which the layer normalized a batch.
    """

    name: str
    units: int
    step: int | None
    undo_index: float
    undo_angle: float
    bare_angle: float
    classes: ClassCounts
    gradient_diverted: float
    eval_gap: float
    kind: str = ""
    producer: str = ""

    @property
    def brief(self) -> str:
        return brief(self.name, self.kind, self.producer)

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of COLUMNS; empty where unknown."""
        numbers = (
            (self.undo_index, index),
            (self.undo_angle, angle),
            (self.classes.share("undone"), percent),
            (self.classes.share("away"), percent),
            (self.classes.share("dead"), percent),
            (self.gradient_diverted, percent),
            (self.eval_gap, number),
        )
        cells = (form(value) if math.isfinite(value) else "" for value, form in numbers)
        return (self.name, self.kind, self.producer, count(self.units), *cells)


TEXTS = ("layer", "type", "fed by")
COLUMNS = (
    *TEXTS, "units", "undo_index", "undo_angle", "undone", "away", "dead", "gradient diverted", "eval gap",
)  # fmt: skip


def layer_rows(reading: Reading) -> list[LayerRow]:
    """In the order of the model."""
    return [_row(layer) for layer in reading.layers]


def _row(layer: LayerReading) -> LayerRow:
    names = ("undo_index", "undo_angle", "bare_angle", "gradient_diverted", "eval_gap")
    middles = {name: median(layer.last[name]) for name in names}
    kind, producer = (found if isinstance(found := layer.facts.get(key), str) else "" for key in ("class", "producer"))
    return LayerRow(
        name=layer.name,
        units=layer.units,
        step=layer.at,
        classes=layer.classes,
        kind=kind,
        producer=module_of(producer),
        **middles,
    )


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
    undo_angle: float
    classes: ClassCounts
    gradient_diverted: float
    dead: int
    findings: str
    logged: tuple[tuple[str, float], ...]

    def cells(self, logged: tuple[str, ...]) -> tuple[str, ...]:
        """As text, in the order of RUN_COLUMNS and then of the logged names."""
        last = dict(self.logged)
        numbers = (
            (self.undo_index, index),
            (self.undo_angle, angle),
            (self.classes.share("undone"), percent),
            (self.classes.share("away"), percent),
            (self.gradient_diverted, percent),
        )
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
    "run", "status", "last step", "layers", "answer", "undo_index", "undo_angle", "undone", "away", "gradient diverted",
    "dead units", "findings",
)  # fmt: skip


def run_row(label: str, reading: Reading, found: WatchAnswer) -> RunRow:
    return RunRow(
        label=label,
        status=reading.status,
        step=reading.last_step,
        layers=len(reading.layers),
        units=sum(layer.units for layer in reading.layers),
        verdict=found.lead.word,
        undo_index=found.undo_index,
        undo_angle=found.undo_angle,
        classes=found.classes,
        gradient_diverted=found.gradient_diverted,
        dead=sum(layer.classes["dead"] for layer in reading.layers),
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


@dataclass(frozen=True)
class Summary:
    """What is said of one run: its name beside others, what was read, the answer, and its rows."""

    label: str
    reading: Reading
    answer: WatchAnswer
    row: RunRow
    layers: tuple[LayerRow, ...]


def summarize(runs: Sequence[Run]) -> tuple[Summary, ...]:
    """What is said of each. Raises RunError where a part is damaged."""
    readings = [read(run) for run in runs]
    found = [answer(reading) for reading in readings]
    return tuple(
        Summary(label, reading, each, run_row(label, reading, each), tuple(layer_rows(reading)))
        for label, reading, each in zip(labels(readings), readings, found, strict=True)
    )
