"""The first screen of a page: the answer as one word and one number, and the classes of the units as stacked bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchnorm.quantities import CLASS_DEFINITIONS, CLASSES
from batchnorm.verdict import CLASS_NAMES, ClassCounts
from batchnorm.words import plural, share

MOST_ROWS = 14
"""Up to so many bars stand below each other with their names; more are drawn side by side, as narrow columns."""
MOST_COLUMNS = 500


@dataclass(frozen=True)
class Segment:
    """A part of a bar, in percent of its length."""

    name: str
    start: float
    length: float


@dataclass(frozen=True)
class Bar:
    """The classes of a layer's units. `note` follows the numbers where they are to be read with care."""

    label: str
    classes: ClassCounts
    note: str = ""

    @property
    def segments(self) -> Iterator[Segment]:
        """Those that have units, from the first class on."""
        start = 0.0
        for name in CLASSES:
            length = 100 * self.classes[name] / max(self.classes.units, 1)
            if length:
                yield Segment(name, round(start, 3), round(length, 3))
            start += length

    @property
    def number(self) -> str:
        """The share that is undone."""
        return share(self.classes.share("undone")) if self.classes.units else ""

    @property
    def text(self) -> str:
        """All of it in words."""
        note = f" ({self.note})" if self.note else ""
        return f"{self.label}: {plural(self.classes.units, 'unit')}, {self.classes.text()}{note}"


@dataclass(frozen=True)
class BarGroup:
    """The bars of an arm or of a run, from the input up."""

    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Lead:
    """`word` answers `question`, `number` is what it rests on, `label` says what the number counts."""

    question: str
    word: str
    number: str
    label: str
    groups: tuple[BarGroup, ...] = ()

    @property
    def as_rows(self) -> bool:
        return sum(len(group.bars) for group in self.groups) <= MOST_ROWS

    @property
    def shown(self) -> tuple[BarGroup, ...]:
        """Without those that have no bar, and of very many layers the first."""
        return tuple(BarGroup(group.label, group.bars[:MOST_COLUMNS]) for group in self.groups if group.bars)

    @property
    def noted(self) -> str:
        """Why some bars are to be read with care."""
        return "; ".join(dict.fromkeys(bar.note for group in self.groups for bar in group.bars if bar.note))

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Of the classes that occur: the name, as words, and its definition."""
        bars = [bar for group in self.groups for bar in group.bars]
        found = [name for name in CLASSES if any(bar.classes[name] for bar in bars)]
        return [(name, CLASS_NAMES[name], CLASS_DEFINITIONS[name]) for name in found]


def undone_number(classes: ClassCounts) -> str:
    """The number of a lead about undoing."""
    return share(classes.share("undone")) if classes.units else "not known"


def bars(layers: Sequence[tuple[str, ClassCounts]]) -> tuple[Bar, ...]:
    """A bar for each layer that has units with a gamma and a beta."""
    return tuple(Bar(name, classes) for name, classes in layers if classes.units)
