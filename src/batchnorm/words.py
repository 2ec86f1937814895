"""Numbers as a reader meets them: a value with its spread over seeds, percentages, counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

UNKNOWN = "not known"


@dataclass(frozen=True)
class Spread:
    """A number that each seed has one of: its median and its range. NaN, with count 0, where no seed has it."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: ArrayLike) -> Spread:
        """Of the finite ones among `values`, one a seed."""
        array = np.asarray(values, np.float64)
        array = array[np.isfinite(array)]
        if array.size == 0:
            return cls(math.nan, math.nan, math.nan, 0)
        return cls(float(np.median(array)), float(array.min()), float(array.max()), array.size)

    def around(self, middle: float) -> Spread:
        """The same range, and another middle: of a share, that over the units of all seeds."""
        return Spread(middle, self.low, self.high, self.count)

    @property
    def known(self) -> bool:
        return self.count > 0

    def agrees(self, limit: float) -> bool:
        """Whether all seeds lie on the same side of `limit`."""
        return not self.low <= limit < self.high

    def inverse(self) -> Spread:
        """Of 1/value, for positive values."""
        return Spread(1 / self.median, 1 / self.high, 1 / self.low, self.count)

    def text(self, form: Callable[[float], str]) -> str:
        """For a sentence: "0.61 (0.58 to 0.66 over 3 seeds)"; one seed is called one seed."""
        if self.count < 2:
            return f"{form(self.median)} (one seed)" if self.known else UNKNOWN
        low, high = form(self.low), form(self.high)
        if low == high:
            return f"{form(self.median)} ({'both' if self.count == 2 else f'all {self.count}'} seeds)"
        return f"{form(self.median)} ({low} to {high} over {self.count} seeds)"

    def cell(self, form: Callable[[float], str]) -> str:
        """For a table: "0.61 [0.58..0.66]", "61% [58..66]"; an empty cell where nothing is known."""
        if self.count < 2:
            return form(self.median) if self.known else ""
        return f"{form(self.median)} [{form(self.low).rstrip('%')}..{form(self.high).rstrip('%')}]"


def number(value: float) -> str:
    """Three significant digits; very small and very large ones in powers of ten."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def index(value: float) -> str:
    """Two decimals: an undo_index near 1 or 0 reads as one."""
    return f"{value:.2f}".replace("-0.00", "0.00") if abs(value) < 100 else number(value)


def angle(value: float) -> str:
    """Degrees, to a tenth."""
    return f"{value:.1f}°" if math.isfinite(value) else UNKNOWN


def percent(value: float) -> str:
    """A share as a percentage; never rounded to 0% or 100% where it is not that."""
    if not math.isfinite(value):
        return UNKNOWN
    hundredths = 100 * value
    if 0 < abs(hundredths) < 0.1:
        return "under 0.1%"
    near_an_end = 0 < abs(hundredths) < 1 or 99 < hundredths < 100
    return f"{hundredths:.1f}%" if near_an_end else f"{hundredths:.0f}%"


def share(value: float) -> str:
    """A percentage to a tenth, as one of several that add up to 100%; never rounded to 0% or 100%."""
    if not math.isfinite(value):
        return UNKNOWN
    tenths = f"{100 * value:.1f}".removesuffix(".0")
    if tenths in ("0", "100") and value not in (0, 1):
        return "under 0.1%" if tenths == "0" else "over 99.9%"
    return f"{tenths}%"


def times(value: float) -> str:
    """A ratio before what it is of: "19% of", "206 times"."""
    return f"{number(value)} times" if value >= 10 else f"{percent(value)} of"


def accuracy(value: float) -> str:
    """A share of right answers, to a tenth of a percent."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else UNKNOWN


def loss(value: float) -> str:
    """Three decimals, or two digits of a small one."""
    return f"{value:.3f}" if 0.001 <= value < 1000 else number(value)


def count(value: float) -> str:
    """A whole number of steps, with thousands set apart."""
    return f"{value:,.0f}" if math.isfinite(value) else UNKNOWN


def listing(parts: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = [*parts] or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def known(value: float, form: Callable[[float], str]) -> str:
    """For a table: empty where the value is not known."""
    return form(value) if math.isfinite(value) else ""


def plural(number: int, one: str, many: str | None = None) -> str:
    """ "1 batch", "3 steps"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def shortened(text: str, most: int = 40) -> str:
    """Cut in the middle: of a layer's name both ends say where it is. Line breaks become spaces."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
