"""Format numbers for readers, and answer in words: do gamma and beta undo batch normalization?

Every output (study, watched training, checkpoint) uses these functions, so that the same classes of units always give
the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm.quantities import CLASSES, Array

UNKNOWN = "not known"


@dataclass(frozen=True)
class Spread:
    """Median and range of a number over seeds; NaN with count 0 if no seed has it."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: ArrayLike) -> Spread:
        """The spread of the finite `values`, one per seed."""
        array = np.asarray(values, np.float64)
        return cls(quantile(array), quantile(array, 0), quantile(array, 1), int(np.isfinite(array).sum()))

    @property
    def known(self) -> bool:
        return self.count > 0

    def text(self, form: Callable[[float], str]) -> str:
        """For a sentence: "0.61 (0.58 to 0.66 over 3 seeds)" or "0.61 (one seed)"."""
        if self.count < 2:
            return f"{form(self.median)} (one seed)" if self.known else UNKNOWN
        low, high = form(self.low), form(self.high)
        if low == high:
            return f"{form(self.median)} ({'both' if self.count == 2 else f'all {self.count}'} seeds)"
        return f"{form(self.median)} ({low} to {high} over {self.count} seeds)"

    def cell(self, form: Callable[[float], str]) -> str:
        """For a table: "0.61 [0.58..0.66]", "61% [58..66]"; empty if unknown."""
        if self.count < 2:
            return form(self.median) if self.known else ""
        return f"{form(self.median)} [{form(self.low).rstrip('%')}..{form(self.high).rstrip('%')}]"


KEPT_BY = {
    "norm": "saved by norms",
    "convolution": "saved by convolutions and linear layers",
    "activation": "saved by activations",
    "mask": "masks",
    "other": "saved by other layers",
}
"""The kinds of what a forward keeps for backward, by the layer that saves it first."""

STEPS = {
    "stock": "torch.nn's layers",
    "ours": "the converted network (batchnorm.convert)",
    "lean": "the converted network, whose forward keeps less (batchnorm.lean)",
    "frozen": "stock with frozen batch norm (batchnorm.freeze)",
    "folded": "the same, applied through the weights (freeze with fold=True)",
}
"""The contenders of `batchnorm bench --memory`."""


def quantile(values: Array, q: float = 0.5) -> float:
    """The quantile of the finite values, by default their median; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, q)) if finite.size else math.nan


def number(value: float) -> str:
    """Three significant digits; very small and very large numbers in powers of ten."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def index(value: float) -> str:
    """Two decimals, for an undo_index."""
    return f"{value:.2f}".replace("-0.00", "0.00") if abs(value) < 100 else number(value)


def angle(value: float) -> str:
    """Degrees, to a tenth."""
    return f"{value:.1f}°" if math.isfinite(value) else UNKNOWN


def percent(value: float) -> str:
    """A share as a percentage; only exact values are shown as 0% or 100%."""
    if not math.isfinite(value):
        return UNKNOWN
    percents = 100 * value
    if 0 < abs(percents) < 0.1:
        return "under 0.1%"
    near_an_end = 0 < abs(percents) < 1 or 99 < percents < 100
    return f"{percents:.1f}%" if near_an_end else f"{percents:.0f}%"


def share(value: float) -> str:
    """A percentage to a tenth, one of several that add up to 100%; only exact values are shown as 0% or 100%."""
    if not math.isfinite(value):
        return UNKNOWN
    tenths = f"{100 * value:.1f}".removesuffix(".0")
    if tenths in ("0", "100") and value not in (0, 1):
        return "under 0.1%" if tenths == "0" else "over 99.9%"
    return f"{tenths}%"


def times(value: float) -> str:
    """A ratio before the quantity it refers to: "19% of", "206 times"."""
    return f"{number(value)} times" if value >= 10 else f"{percent(value)} of"


def accuracy(value: float) -> str:
    """An accuracy to a tenth of a percent."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else UNKNOWN


def loss(value: float) -> str:
    """A loss with three decimals; very small and large ones as `number`."""
    return f"{value:.3f}" if 0.001 <= value < 1000 else number(value)


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return f"{value:,.0f}" if math.isfinite(value) else UNKNOWN


def listing(parts: Iterable[str]) -> str:
    """ "a, b and c"."""
    *most, last = [*parts] or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def known(value: float, form: Callable[[float], str]) -> str:
    """For a table: empty if the value is unknown."""
    return form(value) if math.isfinite(value) else ""


def plural(number: int, one: str, many: str | None = None) -> str:
    """ "1 batch", "3 steps"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def shortened(text: str, most: int = 40) -> str:
    """Cut in the middle, as both ends of a layer's name matter. Line breaks become spaces."""
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
    "too early": "Too early to say",
    "no affine": "No gamma and beta",
    "no layer": "No layer",
}
"""The answer in a word. The last three do not follow from classes."""

SENTENCES: Mapping[str, str] = {
    "yes": "gamma and beta undo it",
    "partly": "gamma and beta undo it in part",
    "no": "gamma and beta do not undo it",
    "dead": "most units are dead",
    "nothing to undo": "there is little to undo",
    "unknown": "whether gamma and beta undo it is unknown",
    "too early": "it is too early to say",
    "no affine": "there is no gamma and beta",
    "no layer": "no layer was recorded",
}
"""The answer as a clause; "it" is batch normalization."""

RULE = (
    f"Yes: more than {MOST:.0%} of the units are undone. No: at most {FEW:.0%} are. In part: between the two. If fewer "
    "than half of the units are undone, toward, neither or away, the answer is the most frequent other class."
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


def is_live(codes: Array) -> NDArray[np.bool_]:
    """Which units are neither dead nor unknown, by the codes of their classes."""
    return ~np.isin(codes, [CLASSES.index(name) for name in ("dead", "unknown")])


@dataclass(frozen=True)
class ClassCounts:
    """How many units are in each class.

    Attributes:
        counts: one number per class, in the order of `quantities.CLASSES`: undone, toward, neither, away,
            nothing_to_undo, dead, unknown.
    """

    counts: tuple[int, ...] = (0,) * len(CLASSES)

    @classmethod
    def of(cls, codes: ArrayLike) -> ClassCounts:
        """Count the units of each class.

        `codes` come from `quantities.unit_class`, in any shape; NaN (a unit without gamma and beta) is not counted.
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
        """How many units are undone, toward, neither or away."""
        return sum(self[name] for name in _MOVING)

    @property
    def live(self) -> int:
        """How many units are neither dead nor unknown."""
        return self.units - self["dead"] - self["unknown"]

    def share(self, name: str) -> float:
        """The share of the class `name` in all units, from 0 to 1; NaN without units."""
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
        """The shares in words, such as "8.7% are undone and 26% did neither", without empty classes."""
        return listing(f"{share(self.share(name))} {_PHRASES[name]}" for name in CLASSES if self[name])
