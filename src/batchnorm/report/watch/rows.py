"""Tables of a watched training: one row a layer, one row a run. For the terminal, the page, a notebook and JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from batchnorm.report.watch.answer import WatchAnswer, answer
from batchnorm.report.watch.numbers import Array, Curve, LayerReading, Reading, median, read
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


BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"
SVG_WIDTH, SVG_HEIGHT = 120, 22
FLAT = 1e-6
"""A range below this share of the values is their rounding: such a curve is drawn as a constant."""


class Spark(NamedTuple):
    """`values` (columns,), NaN where nothing is known, on a scale from `low` to `high`: NaN if all of them are.

    Where the scale can begin or end at 0 and the curve keeps half of the height, it does. `low` equals `high` for a
    constant, which is drawn at half the height.
    """

    values: Array
    low: float
    high: float

    @classmethod
    def of(cls, curve: Curve | None, width: int) -> Self:
        values = sampled(curve, width)
        known = values[np.isfinite(values)]
        if not len(known):
            return cls(values, np.nan, np.nan)
        low, high = float(known.min()), float(known.max())
        if high - low <= FLAT * max(abs(low), abs(high)):
            return cls(values, high, high)
        if 0 < low <= high - low:
            low = 0.0
        elif high < 0 and -high <= high - low:
            high = 0.0
        return cls(values, low, high)

    def line(self, bars: str = BARS) -> str:
        """A character a column, a space where nothing is known."""
        return "".join(" " if np.isnan(share) else _bar(share, bars) for share in self._shares())

    @property
    def ends(self) -> str:
        """The ends of the scale, "0.01..0.02"; of a constant its value; empty where nothing is known."""
        if np.isnan(self.low):
            return ""
        return f"{self.low:.3g}" if self.low == self.high else "..".join(_told_apart(self.low, self.high))

    def scale(self, bars: str = BARS) -> str:
        """The ends; "-0.6 0▇ 0.1" where 0 lies between them, with the bar at its height."""
        return self.ends.replace("..", f" 0{_bar(self._height(0.0), bars)} ") if self.low < 0 < self.high else self.ends

    def svg(self) -> str:
        """A line, and a dashed one at 0 where the scale has it, without any text: nothing of a Run's words goes in."""
        path, before = "", np.nan
        for x, share in enumerate(self._shares()):
            if not np.isnan(share):
                point = f"{2 * x + 1},{_down(share):.1f}"
                path += f"M{point}L{point}" if np.isnan(before) else f"L{point}"
            before = share
        zero = ""
        if self.low <= 0 <= self.high:
            y = f"{_down(self._height(0.0)):.1f}"
            zero = f'<line x1="0" x2="{SVG_WIDTH}" y1="{y}" y2="{y}" stroke="#8a8a8a" stroke-dasharray="2 3"/>'
        line = f'<path d="{path}" fill="none" stroke="#2f88d0" stroke-width="1.5" stroke-linecap="round"/>'
        size = f'width="{SVG_WIDTH}" height="{SVG_HEIGHT}"'
        return f'<svg {size} role="img" aria-label="over time">{zero}{line}</svg>'

    def _height(self, value: float) -> float:
        return 0.5 if self.low == self.high else (value - self.low) / (self.high - self.low)

    def _shares(self) -> list[float]:
        return [self._height(value) if np.isfinite(value) else np.nan for value in self.values.tolist()]


def sampled(curve: Curve | None, width: int) -> Array:
    """(width,): the last finite median since the column before; NaN where all of these are unknown.

    A column with no recorded step of its own continues the one before.
    """
    found = np.full(width, np.nan)
    if curve is None or not len(curve.steps):
        return found
    wanted = np.expm1(np.linspace(0, np.log1p(float(curve.steps[-1])), width))
    ends = np.searchsorted(curve.steps, wanted + 0.5, side="right")
    begin = 0
    for column, end in enumerate(ends.tolist()):
        fresh = curve.median[begin:end]
        known = fresh[np.isfinite(fresh)]
        if len(known):
            found[column] = known[-1]
        elif not len(fresh) and column:
            found[column] = found[column - 1]
        begin = end
    return found


def _bar(share: float, bars: str) -> str:
    return bars[min(int(share * len(bars)), len(bars) - 1)]


def _down(share: float) -> float:
    """A height in the SVG, whose y grows downwards."""
    return 2 + (SVG_HEIGHT - 4) * (1 - share)


def _told_apart(low: float, high: float) -> tuple[str, str]:
    """Two different numbers, with two digits of their difference; 0 as "0"."""
    decimals = max(0, 1 - math.floor(math.log10(high - low) + 1e-9))  # 0.1 and 0.0999... alike
    form = f".{decimals}f" if decimals <= 6 and high - low < 1e5 else ".1e"
    return f"{low:{form}}" if low else "0", f"{high:{form}}" if high else "0"
