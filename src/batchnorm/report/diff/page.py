"""A diff as a page and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from batchnorm.checks.alignment import INITIAL, Pair, vector
from batchnorm.checks.diff import Diff, change_lines, grouped, names, size
from batchnorm.checks.differences import ASPECTS, Change, unit_effects
from batchnorm.checks.findings import Array
from batchnorm.checks.sources import Network
from batchnorm.report.charts import LayerSpread, spread_by_layer
from batchnorm.report.definitions import Definition
from batchnorm.report.page import Lead, Page, Panel, Part, provenance, unit_table
from batchnorm.report.tables import rounded
from batchnorm.report.terminal import write
from batchnorm.runs.run import provenance as recorded
from batchnorm.words import count, listing, plural, quantile, shortened

TITLE = "Batch norm layers that differ"
DIFFER, WORST, SAME = "Do they differ?", "Which difference matters most?", "What else differs?"
UNITS = 20_000
"""The most units in the table: a larger page opens slowly."""
LISTED = 1_000
"""The most differences on the page and in the terminal: a file may claim a million layers."""
LAYERS = 6
"""The most names of layers with one difference."""

EFFECT = Definition(
    "effect",
    "(|Δa|·std + |Δb + Δa·mean|)/|gamma|, with y = a·x + b, a = gamma/sqrt(var + eps), b = beta - a·mean",
    "How much the output of a unit changes in inference, relative to its deviation, for inputs with the running mean "
    "and deviation of A. That of a layer is the root mean square over its units; |gamma| is that of the layer.",
    "0 or more; 1 is as large as the output; infinite if the output is not finite or the layer cannot be loaded; "
    "by batch in training mode",
)


@dataclass(frozen=True)
class Line:
    """A row of the table of differences: equal differences of several layers."""

    effect: str
    aspect: str
    layers: str
    text: str


@dataclass(frozen=True, kw_only=True)
class DiffPage(Page):
    """The page of a diff: the differences, the worst first, a chart of the layers, and every unit that differs."""

    template = "diff"
    scripts = ("units",)
    links = (("changes", "Differences"), ("layers", "The layers"), ("units", "Every unit"))

    lines: tuple[Line, ...]
    meanings: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]
    units: dict[str, Any]

    def data(self) -> dict[str, Any]:
        return {"charts": {panel.id: panel.chart for panel in self.panels}, "units": self.units}


def summarize(diffs: Sequence[Diff]) -> Diff:
    """The diff itself."""
    return diffs[0]


def build(diff: Diff) -> DiffPage:
    """Build the page of a diff."""
    unit_effects = [(pair, _unit_effects(pair)) for pair in diff.pairs]
    units = _units(unit_effects)
    lines = tuple(_line(*group) for group in grouped(diff.changes))
    notices = list(diff.notes)
    if len(lines) > LISTED:
        notices.append(f"The page shows the worst {LISTED:,} of {plural(len(lines), 'difference')}.")
    return DiffPage(
        title=TITLE,
        subtitle=" and ".join(f"{shortened(one.source, 60)} ({one.format})" for one in (diff.a, diff.b)),
        notices=tuple(notices),
        lead=_lead(diff),
        headline=diff.headline,
        parts=_parts(diff),
        lines=lines[:LISTED],
        meanings=tuple(
            (name, text) for name, text in ASPECTS.items() if any(one.aspect == name for one in diff.changes)
        ),
        panels=_panels(unit_effects),
        units=units,
        definitions=(EFFECT,),
        provenance=provenance({"versions": recorded(())["versions"]}, {"A": _about(diff.a), "B": _about(diff.b)}),
    )


def _about(network: Network) -> dict[str, Any]:
    return {
        "source": shortened(network.source, 200),
        "format": network.format,
        "bytes": None if network.size is None else f"{network.size:,}",
        "tensors": f"{network.tensors:,}",
        "batch norm layers": f"{len(network.layers):,}",
    }


def _line(worst: Change, layers: Sequence[str]) -> Line:
    shown = ", ".join(layers[:LAYERS]) + (f" and {len(layers) - LAYERS:,} more" if len(layers) > LAYERS else "")
    return Line(size(worst.effect), worst.aspect, shown, worst.text)


def _lead(diff: Diff) -> Lead:
    differing = len({(one.layer, one.other) for one in diff.changes})
    word = "No" if diff.equal else "Yes"
    return Lead(DIFFER, word, count(differing), f"of {plural(len(diff.pairs), 'layer')} differ")


def _parts(diff: Diff) -> tuple[Part, ...]:
    if diff.equal:
        return ()
    worst = diff.changes[0]
    sentences = (f"`{shortened(worst.layer, 60)}`: {worst.text}.", ASPECTS[worst.aspect])
    others = [name for name in ASPECTS if name != worst.aspect and any(one.aspect == name for one in diff.changes)]
    parts = [Part(WORST, size(worst.effect), worst.aspect, sentences)]
    if others:
        counts = [sum(one.aspect == name for one in diff.changes) for name in others]
        words = listing(f"{name} ({plural(n, 'layer')})" for name, n in zip(others, counts, strict=True))
        parts.append(Part(SAME, count(sum(counts)), "other differences", (f"{words}.",)))
    return tuple(parts)


def _unit_effects(pair: Pair) -> Array | None:
    """The effect of all differences of a layer by unit; None where only one network has it, or its shape differs."""
    first, second = pair
    if first is None or second is None or first.units != second.units or not first.units:
        return None
    return unit_effects(first, second)


def _panels(units: Sequence[tuple[Pair, Array | None]]) -> tuple[Panel, ...]:
    spreads: list[LayerSpread] = []
    for pair, effects in units:
        values = np.zeros(1) if effects is None else effects
        effect = float(np.sqrt(np.mean(values**2)))
        spreads.append((names(pair)[0], len(values), (quantile(values, 0.0), effect, quantile(values, 1.0))))
    chart = spread_by_layer(spreads, log=True)
    words = "Effect of all differences on each layer, input first, and a bar from its least to its most changed unit."
    return (Panel("effect", "effect per layer", words, chart),) if chart else ()


def _units(units: Sequence[tuple[Pair, Array | None]]) -> dict[str, Any]:
    """Every unit that differs, in the order of the layers."""
    columns: dict[str, list[Array]] = {"layer": [], "unit": [], "effect": []}
    columns |= {f"{role} {which}": [] for role in INITIAL for which in "AB"}
    total = 0
    for place, (pair, effects) in enumerate(units):
        first, second = pair
        if effects is None or first is None or second is None or total >= UNITS:
            continue
        shown = np.flatnonzero(effects > 0)
        total += len(shown)
        columns["layer"].append(np.full(len(shown), float(place)))
        columns["unit"].append(shown.astype(np.float64))
        columns["effect"].append(effects[shown])
        for role in INITIAL:
            for layer, which in ((first, "A"), (second, "B")):
                columns[f"{role} {which}"].append(vector(layer, role)[shown])
    values = {name: rounded(np.concatenate([np.zeros(0), *parts]))[:UNITS] for name, parts in columns.items()}
    return unit_table(values, {"layer": [shortened(names(pair)[0], 80) for pair, _ in units]})


describe = Diff.as_dict


def show(diff: Diff, console: Console) -> None:
    """Print the two sources, how many layers differ, and the differences, the worst first."""
    for which, network in (("A", diff.a), ("B", diff.b)):
        write(console, f"{which}  {network.source} ({network.format})")
    lines = [*change_lines(diff.changes[:LISTED])]
    if len(diff.changes) > LISTED:
        lines.append(f"The worst {LISTED:,} of {plural(len(diff.changes), 'difference')}.")
    write(console, "\n".join([diff.headline, *diff.notes, *([""] if lines else []), *lines]))
