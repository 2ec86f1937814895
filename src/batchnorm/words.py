"""Numbers as a reader meets them, and the answer: do gamma and beta undo batch normalization?

A value with its spread over seeds, percentages, counts; and from the classes of units to a word. Every output (study,
watched training, checkpoint; of a unit's layer, a network, several seeds) asks here, so that one set of classes gives
one answer everywhere, and a sentence never says what the numbers beside it do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from batchnorm.quantities import CLASSES

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

    @property
    def known(self) -> bool:
        return self.count > 0

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


Verdict = Literal["yes", "partly", "no", "dead", "nothing to undo", "unknown"]

MOST = 0.5
FEW = 0.1

WORDS: Mapping[str, str] = {
    "yes": "Yes",
    "partly": "In part",
    "no": "No",
    "dead": "Dead",
    "nothing to undo": "Nothing to undo",
    "unknown": "Unknown",
    "too early": "Too early to tell",
    "no affine": "No gamma and beta",
    "no layer": "No layer",
}
"""The answer in a word. The last three are of outputs that know more than classes."""

RULE = (
    f"Yes: more than {MOST:.0%} of the units are undone. No: at most {FEW:.0%} are. In part: between the two. Where "
    "fewer than half of the units are undone, toward, neither or away, the answer is the most frequent other class."
)

CLASS_NAMES: Mapping[str, str] = {name: name.replace("_", " ") for name in CLASSES}

_PHRASES: Mapping[str, str] = {
    "undone": "are undone",
    "toward": "moved toward it",
    "neither": "did neither",
    "away": "moved away from it",
    "nothing_to_undo": "had nothing to undo",
    "dead": "are dead",
    "unknown": "are unknown",
}
_MOVING = ("undone", "toward", "neither", "away")


@dataclass(frozen=True)
class ClassCounts:
    """How many units are in each class.

    Attributes:
        counts: one number for each class, in the order of `quantities.CLASSES`: undone, toward, neither, away,
            nothing_to_undo, dead, unknown.
    """

    counts: tuple[int, ...] = (0,) * len(CLASSES)

    @classmethod
    def of(cls, codes: ArrayLike) -> ClassCounts:
        """Count the units of each class.

        `codes` are what `quantities.unit_class` returns, in any shape; NaN (a unit without gamma and beta) is left out.
        """
        array = np.asarray(codes, np.float64).ravel()
        known = array[np.isfinite(array)].astype(np.int64)
        return cls(tuple(np.bincount(known, minlength=len(CLASSES)).tolist()))

    @classmethod
    def total_of(cls, parts: Iterable[ClassCounts]) -> ClassCounts:
        """Add up the counts of several `parts`: layers, runs or seeds."""
        sums = np.sum([part.counts for part in parts] or [cls().counts], axis=0)
        return cls(tuple(int(value) for value in sums))

    def __getitem__(self, name: str) -> int:
        return self.counts[CLASSES.index(name)]

    @property
    def units(self) -> int:
        """How many units there are in all classes."""
        return sum(self.counts)

    @property
    def moving(self) -> int:
        """The units of which it can be asked how far they went: undone, toward, neither or away."""
        return sum(self[name] for name in _MOVING)

    @property
    def live(self) -> int:
        """How many units are neither dead nor unknown."""
        return self.units - self["dead"] - self["unknown"]

    def share(self, name: str) -> float:
        """The share of the class `name` in all units, from 0 to 1; NaN where there are no units."""
        return self[name] / self.units if self.units else float("nan")

    def as_dict(self) -> dict[str, int]:
        """The counts by the names of the classes."""
        return dict(zip(CLASSES, self.counts, strict=True))

    @property
    def verdict(self) -> Verdict:
        """Whether gamma and beta undo the normalization, by RULE: "yes", "partly", "no" and so on."""
        if self.units == 0:
            return "unknown"
        if 2 * self.moving < self.units:
            others: dict[str, Verdict] = {"unknown": "unknown", "dead": "dead", "nothing_to_undo": "nothing to undo"}
            return others[max(others, key=self.__getitem__)]
        undone = self.share("undone")
        return "yes" if undone > MOST else "partly" if undone > FEW else "no"

    @property
    def word(self) -> str:
        """The verdict in a word, for a headline."""
        return WORDS[self.verdict]

    def text(self) -> str:
        """The shares as words, such as "8.7% are undone, 26% did neither"; empty classes are left out."""
        return listing(f"{share(self.share(name))} {_PHRASES[name]}" for name in CLASSES if self[name])
