"""Watched trainings in an 80 column terminal, in a notebook, and as JSON values; curves as sparklines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from markupsafe import Markup
from rich.console import Console

from batchnorm.checks.findings import finding_lines
from batchnorm.report.page import template
from batchnorm.report.tables import jsonable
from batchnorm.report.terminal import write, write_rows
from batchnorm.report.watch.answer import RUN_COLUMNS, Summary, summarize
from batchnorm.report.watch.numbers import COLUMNS, MEDIANS, TEXTS, Array, Curve, LayerReading
from batchnorm.words import count, shortened

__all__ = ["card", "describe", "show", "summarize"]

NAME, NARROW_NAME = 18, 15
SPARK = 12
WIDE = 120
"""From this width on, the table has separate columns for a layer's type and for the scale of its curve."""
HEADS = (
    *TEXTS, "units", "undo\nindex", "over time", "scale", "undo\nangle", "undone", "away", "dead", "gradient\ndiverted",
    "eval\ngap",
)  # fmt: skip
DRAWN = ("over time", "scale")


def show(runs: Sequence[Summary], console: Console) -> None:
    """Print one run's layers with sparklines, answer and findings; for several runs, the figures and answer of each."""
    if len(runs) > 1:
        for run in runs:
            facts = zip(RUN_COLUMNS[1:], run.cells()[1:], strict=True)
            write(console, f"{run.label}: " + ", ".join(f"{name} {cell}" for name, cell in facts if cell))
            write(console, f"{run.headline}\n")
        return
    (run,) = runs
    bars = BARS if console.encoding.lower().startswith("utf") else ASCII_BARS
    wide = console.width >= WIDE
    caption = (
        "Medians and shares over units at the last step. Over time: undo_index, with the scale of its bars; "
        f"0{bars[2]} marks the height of 0."
    )
    if not wide and any(layer.producer for layer in run.reading.layers):
        caption += " On: the module before it."
    heads = HEADS if wide else [name for name in HEADS if name not in (*TEXTS[1:], "scale")]
    layers = run.reading.layers
    rows = [_cells(layer, bars, wide) for layer in layers]
    names = [f"{layer.name} ({layer.brief})" if layer.brief else layer.name for layer in layers]
    write_rows(console, heads, rows, caption, names, left=(*TEXTS, *DRAWN), no_wrap=DRAWN)
    write(console, "\n" + "\n\n".join(run.lines()))
    write(console, "\n" + "\n".join(finding_lines(run.reading.findings)))


def _cells(layer: LayerReading, bars: str, wide: bool) -> list[str]:
    """The cells of a layer; in a narrow terminal two lines, with type and scale in the second."""
    spark = Spark.of(layer.curves.get("undo_index"), SPARK)
    name, kind, producer, units, undo, *others = layer.cells()
    others = [cell.replace("under ", "<") for cell in others]
    name, drawn, scale = shortened(name, NAME if wide else NARROW_NAME), spark.line(bars), spark.scale(bars)
    if wide:
        return [name, shortened(kind, NAME), shortened(producer, NAME), units, undo, drawn, scale, *others]
    below = shortened(layer.brief, NARROW_NAME)
    return [f"{name}\n{below}".rstrip(), units, undo, f"{drawn}\n{scale}".rstrip("\n"), *others]


ANSWER = (
    "verdict", "lead", "headline", "step", "classes", "undo_index", "undo_angle", "bare_angle", "gradient_diverted",
    "batch_noise",
)  # fmt: skip


def describe(runs: Sequence[Summary]) -> dict[str, Any]:
    """JSON values of one run, or {"runs": [...]} for several."""
    if len(runs) > 1:
        return {"runs": [describe([run]) for run in runs]}
    (run,) = runs
    answered = ("name", "units", "classes", "undo_index", "at_start", "why_not")
    row = ("name", "units", "step", *MEDIANS[:3], "classes", *MEDIANS[3:], "kind", "producer")
    return {
        "run": str(run.reading.run.path),
        "status": run.reading.status,
        "last_step": run.reading.last_step,
        "answer": {name: jsonable(getattr(run, name)) for name in ANSWER}
        | {"layers": [_fields(layer, answered) for layer in run.layers], "parts": jsonable(run.parts)},
        "classes": run.classes.as_dict(),
        "layers": [_fields(layer, row) for layer in run.reading.layers],
        "logged": run.logged,
        "findings": [finding.as_dict() for finding in run.reading.findings],
    }


def _fields(layer: LayerReading, names: Sequence[str]) -> dict[str, Any]:
    return {name: layer.medians[name] if name in MEDIANS else jsonable(getattr(layer, name)) for name in names}


MOST_LAYERS = 30


def card(runs: Sequence[Summary]) -> str:
    """HTML of one run for a notebook, without scripts and with every string of the Run escaped."""
    (run,) = runs
    layers = run.reading.layers
    at = COLUMNS.index("undo_index") + 1
    rows = []
    for layer in layers[:MOST_LAYERS]:
        spark = Spark.of(layer.curves.get("undo_index"), SVG_WIDTH // 2)
        texts = [shortened(cell) for cell in layer.cells()]
        rows.append([*texts[:at], Markup(spark.svg()), spark.ends, *texts[at:]])  # the SVG has numbers only
    text: str = template("card").render(
        run=run,
        path=shortened(str(run.reading.run.path), 120),
        last="no step" if run.reading.last_step is None else f"step {count(run.reading.last_step)}",
        names=(*COLUMNS[:at], *DRAWN, *COLUMNS[at:]),
        texts=TEXTS,
        rows=rows,
        more=count(len(layers) - MOST_LAYERS) if len(layers) > MOST_LAYERS else "",
    )
    return text


BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"
SVG_WIDTH, SVG_HEIGHT = 120, 22
FLAT = 1e-6
"""A smaller relative range is rounding: the curve is drawn as a constant."""


class Spark(NamedTuple):
    """`values` (columns,), NaN where unknown, on a scale from `low` to `high`, which are NaN if all values are.

    The scale begins or ends at 0 if the curve then still has half of the height. A constant has `low` equal to `high`
    and is drawn at half the height.
    """

    values: Array
    low: float
    high: float

    @classmethod
    def of(cls, curve: Curve | None, width: int) -> Self:
        """Sample a curve to `width` columns and choose the scale."""
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
        """One character per column, a space where unknown."""
        return "".join(" " if np.isnan(share) else _bar(share, bars) for share in self._shares())

    @property
    def ends(self) -> str:
        """The ends of the scale, "0.01..0.02"; one value for a constant; empty if unknown."""
        if np.isnan(self.low):
            return ""
        return f"{self.low:.3g}" if self.low == self.high else "..".join(_distinct(self.low, self.high))

    def scale(self, bars: str = BARS) -> str:
        """The ends; "-0.6 0▇ 0.1" where 0 lies between them, with the bar at its height."""
        return self.ends.replace("..", f" 0{_bar(self._height(0.0), bars)} ") if self.low < 0 < self.high else self.ends

    def svg(self) -> str:
        """A line, and a dashed one at 0 if the scale contains it. No string of the Run goes in."""
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
    """(width,): per column the last finite median of its steps, NaN if all are unknown.

    A column without a recorded step repeats the previous one.
    """
    result = np.full(width, np.nan)
    if curve is None or not len(curve.steps):
        return result
    columns = np.expm1(np.linspace(0, np.log1p(float(curve.steps[-1])), width))
    begin = 0
    for column, end in enumerate(np.searchsorted(curve.steps, columns + 0.5, side="right").tolist()):
        medians = curve.median[begin:end]
        known = medians[np.isfinite(medians)]
        if len(known) or (column and not len(medians)):
            result[column] = known[-1] if len(known) else result[column - 1]
        begin = end
    return result


def _bar(share: float, bars: str) -> str:
    return bars[min(int(share * len(bars)), len(bars) - 1)]


def _down(share: float) -> float:
    return 2 + (SVG_HEIGHT - 4) * (1 - share)


def _distinct(low: float, high: float) -> tuple[str, str]:
    """Two different numbers with two digits of their difference; 0 as "0"."""
    decimals = max(0, 1 - math.floor(math.log10(high - low) + 1e-9))  # 0.1 and 0.0999... alike
    form = f".{decimals}f" if decimals <= 6 and high - low < 1e5 else ".1e"
    return f"{low:{form}}" if low else "0", f"{high:{form}}" if high else "0"
