"""What every page consists of: the answer as one word, one number and stacked bars; parts, sections, facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from batchnorm.quantities import CLASS_DEFINITIONS, CLASSES
from batchnorm.report.definitions import Definition
from batchnorm.verdict import CLASS_NAMES, ClassCounts
from batchnorm.words import listing, plural, share

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


NOTABLE = 0.1
LISTED = 6


@dataclass(frozen=True)
class Part:
    """One question, the number that answers it (with a label), and the sentences around it; `arms` in backticks."""

    question: str
    figure: str
    label: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def differ(layers: tuple[float, ...]) -> bool:
    """Whether a number for all layers together would hide what the layers do."""
    return len(layers) > 1 and max(layers) - min(layers) > NOTABLE


def by_layer(values: tuple[float, ...], form: Callable[[float], str]) -> str:
    """The layers' numbers in words, from the input up; their range where there are many layers."""
    if len(values) > LISTED:
        return f"{form(min(values))} to {form(max(values))}"
    return listing(form(value) for value in values)


@dataclass(frozen=True)
class Facts:
    """A group of the provenance: names and values as they stand in run.json."""

    title: str
    entries: tuple[tuple[str, str], ...]


def ran(info: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """What a run did, by these keys, and how long it took."""
    seconds = info.get("seconds")
    took = f"{seconds:,.1f} s" if isinstance(seconds, int | float) else None
    return {**{key: info.get(key) for key in keys}, "took": took}


def grouped(groups: Mapping[str, Any]) -> list[Facts]:
    """The groups that are known, without what is not known in them."""
    return [
        Facts(title, tuple((str(key), _plain(value)) for key, value in facts.items() if value is not None))
        for title, facts in groups.items()
        if isinstance(facts, dict) and facts
    ]


def _plain(value: Any) -> str:
    return ", ".join(str(entry) for entry in value) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Panel:
    """One small chart: its title, and what it shows in words for those who do not see it."""

    id: str
    title: str
    description: str
    chart: dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A question of the page: paragraphs, then panels in a grid. `legend` names the arms that are drawn, `dashed` says
    whether their lines carry their dashes, too."""

    id: str
    title: str
    paragraphs: tuple[str, ...]
    panels: tuple[Panel, ...]
    legend: tuple[str, ...] = ()
    note: str = ""
    columns: int = 3
    dashed: bool = True


@dataclass(frozen=True, kw_only=True)
class Page:
    """What every page has, in its order; each kind of page adds what it shows below the answer.

    `notices` stand above all else: cut short, diverged. `lead` answers at a glance, `headline` in a sentence, `parts`
    explain.
    """

    template: ClassVar[str]
    scripts: ClassVar[tuple[str, ...]]

    title: str
    subtitle: str
    notices: tuple[str, ...]
    lead: Lead
    headline: str
    parts: tuple[Part, ...]
    definitions: tuple[Definition, ...]
    provenance: tuple[Facts, ...]
    sections: tuple[Section, ...] = ()

    def data(self) -> dict[str, Any]:
        """JSON values that the page's scripts read."""
        raise NotImplementedError
