"""Sparklines: a curve over time in a few characters, or in a small SVG, from its least to its greatest value.

Columns are as far apart as the page's axis has them, evenly in log(1 + step).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np

from batchnorm.report.watch.numbers import Array, Curve

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
