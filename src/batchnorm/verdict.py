"""From the classes of units to the answer: do gamma and beta undo batch normalization?

Every output (study, watched training, checkpoint; of a unit's layer, a network, several seeds) asks here, so that one
set of classes gives one answer everywhere, and a sentence never says what the numbers beside it do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from batchnorm.quantities import CLASSES
from batchnorm.words import listing, share

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
