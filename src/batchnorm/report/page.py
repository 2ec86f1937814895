"""The parts of every page as data, and `render`, which makes one self-contained HTML file of them.

Every string of a Run is hostile input: Jinja escapes the text of the page, `embedded` escapes the data of the scripts,
and the scripts write text, never markup. A Content-Security-Policy forbids all requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

from markupsafe import Markup

from batchnorm.checks.findings import SEVERITIES, Finding, Kind
from batchnorm.quantities import CLASS_DEFINITIONS, CLASSES
from batchnorm.report.definitions import NOTATION, Definition
from batchnorm.words import CLASS_NAMES, ClassCounts, listing, plural, share, shortened

MOST_ROWS = 14
"""Up to this many bars are rows with names; more are drawn as narrow columns side by side."""
MOST_COLUMNS = 500


@dataclass(frozen=True)
class Bar:
    """The classes of a layer's units. `note` is a caveat on the numbers."""

    label: str
    classes: ClassCounts
    note: str = ""

    @property
    def segments(self) -> Iterator[tuple[str, float, float]]:
        """Name, start and length in percent of each class that has units."""
        start = 0.0
        for name in CLASSES:
            length = 100 * self.classes[name] / max(self.classes.units, 1)
            if length:
                yield name, round(start, 3), round(length, 3)
            start += length

    @property
    def number(self) -> str:
        return share(self.classes.share("undone")) if self.classes.units else ""

    @property
    def text(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.label}: {plural(self.classes.units, 'unit')}, {self.classes.text()}{note}"


@dataclass(frozen=True)
class BarGroup:
    """The bars of an arm or of a run, from the input up."""

    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Lead:
    """A question, its answer in a `word`, and the `number` behind it, which counts what `label` says."""

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
        return tuple(BarGroup(group.label, group.bars[:MOST_COLUMNS]) for group in self.groups if group.bars)

    @property
    def noted(self) -> str:
        return "; ".join(dict.fromkeys(bar.note for group in self.groups for bar in group.bars if bar.note))

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Key, name and definition of each class that occurs."""
        bars = [bar for group in self.groups for bar in group.bars]
        present = [name for name in CLASSES if any(bar.classes[name] for bar in bars)]
        return [(name, CLASS_NAMES[name], CLASS_DEFINITIONS[name]) for name in present]


NOTABLE = 0.1
LISTED = 6
LISTED_UNITS = 12


@dataclass(frozen=True)
class Part:
    """A question, the figure that answers it with a label, and sentences, with arms in backticks."""

    question: str
    figure: str
    label: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def differ(layers: tuple[float, ...]) -> bool:
    return len(layers) > 1 and max(layers) - min(layers) > NOTABLE


def by_layer(values: tuple[float, ...], form: Callable[[float], str]) -> str:
    """The layers' numbers in words, from the input up; only their range for many layers."""
    if len(values) > LISTED:
        return f"{form(min(values))} to {form(max(values))}"
    return listing(form(value) for value in values)


@dataclass(frozen=True)
class Facts:
    """A group of the provenance: names and values of run.json."""

    title: str
    entries: tuple[tuple[str, str], ...]


def ran(info: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """These entries of run.json, and how long the run took."""
    seconds = info.get("seconds")
    took = f"{seconds:,.1f} s" if isinstance(seconds, int | float) else None
    return {**{key: info.get(key) for key in keys}, "took": took}


def provenance(info: Mapping[str, Any], groups: Mapping[str, Any]) -> tuple[Facts, ...]:
    """These groups, then versions and machine, without unknown values."""

    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    every = {**groups, "Versions": info.get("versions"), "Machine": info.get("machine")}
    return tuple(
        Facts(title, tuple((str(key), text(value)) for key, value in facts.items() if value is not None))
        for title, facts in every.items()
        if isinstance(facts, dict) and facts
    )


def unfinished(subject: str, status: str, reached: str) -> list[str]:
    """A notice if a run did not finish."""
    ends = {"running": "is still running, or was killed", "interrupted": "was interrupted", "failed": "failed"}
    return [f"{subject} {ends[status]}: recorded up to {reached}."] if status in ends else []


def listed(value: Any) -> list[Any]:
    """A list from run.json; empty if it is not a list."""
    return value if isinstance(value, list) else []


@dataclass(frozen=True)
class Entry:
    """A finding with the label of its run and the layer's position on the page."""

    finding: Finding
    label: str = ""
    place: int = 0

    @property
    def where(self) -> str:
        return shortened(self.finding.layer, 60)

    @property
    def units(self) -> str:
        shown = ", ".join(str(unit) for unit in self.finding.units[:LISTED_UNITS])
        return f"{shown}, …" if len(self.finding.units) > LISTED_UNITS else shown


@dataclass(frozen=True)
class Group:
    """All findings of one kind and severity."""

    kind: Kind
    severity: str
    entries: tuple[Entry, ...]


def groups(entries: Iterable[Entry]) -> tuple[Group, ...]:
    """Group by severity, then by kind in order of first appearance."""
    by_kind: dict[tuple[Kind, str], list[Entry]] = {}
    for entry in entries:
        by_kind.setdefault((entry.finding.kind, entry.finding.severity), []).append(entry)
    unsorted = (Group(kind, severity, tuple(group)) for (kind, severity), group in by_kind.items())
    return tuple(sorted(unsorted, key=lambda group: SEVERITIES.index(group.severity)))


def header(column: str) -> str:
    """The header of a column of the table of units."""
    return column if column.startswith(("undo_", "bare_")) else column.replace("_", " ")


def unit_table(values: Mapping[str, list[Any]], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The table of units by column, for the page's script; words are codes into `names`."""
    columns = [{"name": name, "header": header(name), "numeric": name not in names} for name in values]
    return {"columns": columns, "values": values, "names": names}


@dataclass(frozen=True)
class Panel:
    """A small chart with its title, and a description for screen readers."""

    id: str
    title: str
    description: str
    chart: dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A question of the page with its panels in a grid, below the paragraphs that the template has for its id.

    `legend` names the arms that are drawn, `dashed` says whether the legend shows their dashes.
    """

    id: str
    title: str
    panels: Sequence[Panel]
    note: str
    legend: tuple[str, ...]
    columns: int = 3
    dashed: bool = True


@dataclass(frozen=True, kw_only=True)
class Page:
    """The content of every page, from top to bottom; each kind of page adds its own below the answer.

    `notices` come first: cut short, diverged. `lead` answers at a glance, `headline` in a sentence, `parts` explain.
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
        """The data that the page's script draws, for JSON."""
        raise NotImplementedError


def template(name: str) -> Any:
    """An asset as a Jinja template that escapes all values."""
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
    """The HTML of a page, always the same for the same page. An open page reloads itself after `refresh` seconds."""
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
    """JSON for a script element, escaped so that it cannot end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def marked(sentence: str) -> Markup:
    """Text between backticks as code, everything escaped."""
    pieces = enumerate(sentence.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in pieces)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
