"""What every page consists of, and the page -> one self-contained HTML file: style, script, charts and data inside.

Every word of a Run is hostile input: Jinja escapes what stands in the page, `embedded` what stands in a script element,
and the scripts write text, never markup. A Content-Security-Policy in the file forbids every request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar, NamedTuple

from markupsafe import Markup

from batchnorm.checks.findings import SEVERITIES, Finding, Kind
from batchnorm.quantities import CLASS_DEFINITIONS, CLASSES
from batchnorm.report.definitions import NOTATION, Definition
from batchnorm.words import CLASS_NAMES, ClassCounts, listing, plural, share, shortened

MOST_ROWS = 14
"""Up to so many bars stand below each other with their names; more are drawn side by side, as narrow columns."""
MOST_COLUMNS = 500


class Segment(NamedTuple):
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


NOTABLE = 0.1
LISTED = 6
LISTED_UNITS = 12


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


def provenance(info: Mapping[str, Any], groups: Mapping[str, Any]) -> tuple[Facts, ...]:
    """These groups, then versions and machine, as far as they are known."""
    made = []
    for title, facts in {**groups, "Versions": info.get("versions"), "Machine": info.get("machine")}.items():
        if isinstance(facts, dict) and facts:
            known = ((str(key), value) for key, value in facts.items() if value is not None)
            texts = (
                (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for key, value in known
            )
            made.append(Facts(title, tuple(texts)))
    return tuple(made)


def listed(value: Any) -> list[Any]:
    """What run.json should hold a list of."""
    return value if isinstance(value, list) else []


@dataclass(frozen=True)
class Entry:
    """A finding's line: in which run it is, and the layer's place on the page."""

    finding: Finding
    label: str = ""
    place: int = 0

    @property
    def where(self) -> str:
        return shortened(self.finding.layer, 60)

    @property
    def units(self) -> str:
        """The units concerned, as far as they fit in a line."""
        shown = ", ".join(str(unit) for unit in self.finding.units[:LISTED_UNITS])
        return f"{shown}, …" if len(self.finding.units) > LISTED_UNITS else shown


@dataclass(frozen=True)
class Group:
    """All findings of one kind and severity."""

    kind: Kind
    severity: str
    entries: tuple[Entry, ...]


def groups(entries: Iterable[Entry]) -> tuple[Group, ...]:
    """By severity, then by kind as they first appear; within, in the order given."""
    found: dict[tuple[Kind, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.finding.kind, entry.finding.severity), []).append(entry)
    made = (Group(kind, severity, tuple(group)) for (kind, severity), group in found.items())
    return tuple(sorted(made, key=lambda group: SEVERITIES.index(group.severity)))


def unit_table(
    headers: Mapping[str, str], values: Mapping[str, list[Any]], names: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The table of units, column by column, for the page's script: words are codes into `names`."""
    columns = [{"name": name, "header": header, "numeric": name not in names} for name, header in headers.items()]
    return {"columns": columns, "values": values, "names": names}


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


def template(name: str) -> Any:
    """One of the assets, which escapes every word that it is given."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["marked"] = marked
    return environment.get_template(f"{name}.html.j2")


def render(page: Page, refresh: int | None = None) -> str:
    """The HTML of a page: the same page gives the same text.

    `refresh`: have an open page load itself again after so many seconds.
    """
    from batchnorm.report.charts import vega_bundle

    text: str = template(page.template).render(
        page=page,
        refresh=refresh,
        notation=NOTATION,
        css=Markup(_asset("page.css")),
        common=Markup(_asset("common.js")),
        script=Markup("\n".join(_asset(f"{name}.js") for name in page.scripts)),
        vega=Markup(vega_bundle()),
        data=embedded(page.data()),
    )
    return text


def embedded(value: Any) -> Markup:
    """JSON for a script element: no character of it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def marked(sentence: str) -> Markup:
    """What stands between backticks as code, all of it escaped."""
    pieces = sentence.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in enumerate(pieces)
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
