"""A check-up as a page and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
from rich.console import Console

from batchnorm.checks.check import COLUMNS, Checkup, Explanation, Row, origins
from batchnorm.checks.findings import LayerData, finding_lines
from batchnorm.quantities import CLASSES, position_in, position_out
from batchnorm.report.charts import COLOUR, LayerSpread, Records, Spec, scatter, spread_by_layer
from batchnorm.report.definitions import DEFINITIONS
from batchnorm.report.page import Bar, BarGroup, Entry, Group, Lead, Page, Panel, Part, groups, provenance, unit_table
from batchnorm.report.tables import Table, rounded
from batchnorm.report.terminal import write, write_rows
from batchnorm.runs.run import provenance as recorded
from batchnorm.words import CLASS_NAMES, WORDS, count, plural, share, shortened

POINTS = 4000
"""The most units in a scatter plot."""
LOWEST_INDEX = -2.0

UNIT_COLUMNS = (
    "layer", "unit", "gamma", "beta", "running_mean", "running_var", "class", "undo_index", "undo_angle", "bare_angle",
    "position_in", "position_out",
)  # fmt: skip


def panels(layers: Sequence[LayerData], rows: Sequence[Row]) -> tuple[Panel, ...]:
    by_layer = "of each layer, input first: the median unit, and a bar from"
    charts = (
        (
            "undo-index",
            "undo_index per layer",
            f"undo_index {by_layer} quartile to quartile.",
            spread_by_layer(_spreads(rows, "undo_index"), (LOWEST_INDEX, 1.1), guides={"undone": 1.0, "bare": 0.0}),
        ),
        (
            "variance",
            "running variance per layer",
            f"Running variance {by_layer} min to max.",
            spread_by_layer(_spreads(rows, "variance"), log=True),
        ),
        *(
            (
                f"{y.strip('|')}-{x.removeprefix('running ')}",
                f"{y} against {x}",
                f"{y} of every unit against its {x}; both are equal on the dashed line.",
                _scatter(layers, x, y),
            )
            for x, y in (("s", "|gamma|"), ("running mean", "beta"))
        ),
    )
    return tuple(Panel(name, title, words, chart) for name, title, words, chart in charts if chart)


def _spreads(rows: Sequence[Row], column: str) -> list[LayerSpread]:
    return [(row.layer, row.units, getattr(row, column)) for row in rows]


def _scatter(layers: Sequence[LayerData], x: str, y: str) -> Spec | None:
    """All units, or every n-th of many. The frame contains 99% of them; both axes have the same scale."""
    points: list[tuple[float, float, str, int]] = []
    for layer in layers:
        xs, ys = layer[x.replace(" ", "_")][-1], layer[y.strip("|")][-1]
        ys = np.abs(ys) if y.startswith("|") else ys
        known = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
        points += [(float(xs[unit]), float(ys[unit]), layer.name[:80], int(unit)) for unit in known]
    if not points:
        return None
    points = points[:: -(-len(points) // POINTS)]
    columns = [rounded(np.array([point[axis] for point in points])) for axis in (0, 1)]
    records: Records = [
        {"x": a, "y": b, "layer": name, "unit": unit} for a, b, (_, _, name, unit) in zip(*columns, points, strict=True)
    ]
    low, high = np.quantile(np.array(columns, np.float64), [0.005, 0.995])
    margin = 0.05 * (high - low) or 1.0
    ends = rounded(np.array([low - margin, high + margin]))
    frame = alt.Scale(domain=ends, nice=False, zero=False)
    tips = [alt.Tooltip("layer:N"), alt.Tooltip("unit:Q"), alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]
    return scatter(records, ("x", "y"), (x, y), (frame, frame), (ends[0], ends[1]), tips, alt.value(COLOUR))


TITLE = "The batch norm layers of a checkpoint"
HEALTHY, UNDOING = "Are they healthy?", "Do gamma and beta undo it?"
DEFINED = ("class", "undo_distance", "undo_index", "undo_angle, bare_angle", "position in, position out")
UNITS = 20_000
"""The most units in the table: a larger page opens slowly."""


@dataclass(frozen=True, kw_only=True)
class CheckPage(Page):
    """The page of a check-up, with two answers: are the layers healthy, and do gamma and beta undo them?"""

    template = "check"
    scripts = ("units",)
    links = (("findings", "Findings"), ("layers", "The layers"), ("units", "Every unit"))

    healthy: Lead
    findings: tuple[Group, ...]
    columns: tuple[str, ...]
    origin: tuple[tuple[str, str], ...]
    layers: tuple[Row, ...]
    panels: tuple[Panel, ...]
    units: dict[str, Any]

    def data(self) -> dict[str, Any]:
        return {"charts": {panel.id: panel.chart for panel in self.panels}, "units": self.units}


def summarize(checkups: Sequence[Checkup]) -> Checkup:
    """The check-up itself."""
    return checkups[0]


def build(checkup: Checkup) -> CheckPage:
    """Build the page of a check-up."""
    network, explanation = checkup.network, checkup.explanation
    units = sum(layer.units for layer in network.layers)
    cut = f"The table of units shows the first {UNITS:,} of {units:,}."
    about = {
        "source": shortened(network.source, 200),
        "format": network.format,
        "bytes": None if network.size is None else f"{network.size:,}",
        "tensors": f"{network.tensors:,}",
        "batch norm layers": f"{len(network.layers):,}",
        "units": f"{units:,}",
    }
    versions = {"versions": recorded(())["versions"]}
    return CheckPage(
        title=TITLE,
        subtitle=f"{shortened(network.source, 80)}: {network.format}, {plural(len(network.layers), 'layer')}",
        notices=(cut,) if units > UNITS else (),
        healthy=_healthy(checkup),
        lead=_lead(explanation),
        headline=checkup.headline[0].upper() + checkup.headline[1:] + ".",
        parts=_parts(checkup),
        findings=groups(map(Entry, checkup.findings)),
        columns=COLUMNS,
        origin=origins(explanation.rows),
        layers=explanation.rows,
        panels=panels(network.layers, explanation.rows),
        units=_units(network.layers),
        definitions=tuple(definition for definition in DEFINITIONS if definition.name in DEFINED),
        provenance=provenance(versions, {"Checked": about}),
    )


def _healthy(checkup: Checkup) -> Lead:
    errors = checkup.count("error")
    label = f"found: {checkup.counted}" if checkup.findings else "errors: no rule found anything"
    if checkup.findings and not errors:
        label = f"errors; {label}"
    return Lead(HEALTHY, "No" if errors else "Yes", count(errors), label)


def _lead(explanation: Explanation) -> Lead:
    bars = tuple(Bar(row.layer, row.classes) for row in explanation.rows if row.classes.units)
    label = f"of {plural(explanation.classes.units, 'unit')} are undone, by the running statistics"
    undone = share(explanation.classes.share("undone"))
    return Lead(UNDOING, WORDS[explanation.verdict], undone, label, (BarGroup("", bars),))


def _parts(checkup: Checkup) -> tuple[Part, ...]:
    label = "no rule found anything"
    sentences: tuple[str, ...] = ()
    if checkup.findings:
        first = checkup.findings[0]
        layer = f"`{shortened(first.layer, 60)}`: " if first.layer else ""
        label = f"with {checkup.counted}"
        sentences = (f"Most serious: {layer}{first.text}.", first.kind.advice)
    explanation = checkup.explanation
    return (
        Part(HEALTHY, "Yes" if checkup.healthy else "No", label, sentences),
        Part(UNDOING, WORDS[explanation.verdict], "by the running statistics", explanation.sentences),
    )


def _units(layers: Sequence[LayerData]) -> dict[str, Any]:
    parts: list[Table] = []
    for place, layer in enumerate(layers):
        if sum(map(len, parts)) >= UNITS:
            break
        columns = {name: layer[name][-1] for name in UNIT_COLUMNS}
        columns["layer"] = np.full(layer.units, float(place))
        columns["unit"] = np.arange(layer.units, dtype=np.float64)
        columns["position_in"] = position_in(columns["running_mean"], layer["running_var"][-1], layer.settings["eps"])
        columns["position_out"] = position_out(columns["gamma"], columns["beta"])
        parts.append(Table(columns))
    joined = Table.stack(parts)
    joined = joined.with_column("class", np.nan_to_num(joined["class"], nan=float(CLASSES.index("unknown"))))
    names = {"layer": [shortened(layer.name, 80) for layer in layers], "class": [*CLASS_NAMES.values()]}
    return unit_table({name: rounded(joined[name])[:UNITS] for name in UNIT_COLUMNS}, names)


NAME = 24
WIDE = 110
"""From this width on, the table has the columns of ORIGIN."""
LAYERS = 200
"""The most rows of the table: a file may claim a million layers."""

describe = Checkup.as_dict


def show(checkup: Checkup, console: Console) -> None:
    """Print the answer, the table of layers and the findings."""
    network = checkup.network
    size = "" if network.size is None else f", {network.size / 1e6:,.1f} MB"
    write(console, f"{network.source} ({network.format}{size})")
    write(console, f"{checkup.headline}\n")
    if network.layers:
        _write_layers(checkup.explanation.rows, console)
        write(console, "\n" + "\n".join(checkup.explanation.sentences) + "\n")
    write(console, "\n".join(finding_lines(checkup.findings)))


def _write_layers(rows: Sequence[Row], console: Console) -> None:
    caption = "Medians, shares and counts of units; min and max of the running variance."
    if len(rows) > LAYERS:
        caption += f" The first {LAYERS:,} of {plural(len(rows), 'layer')}."
    origin = origins(rows) if console.width >= WIDE else ()
    texts = [COLUMNS[0], *(name for _, name in origin)]
    heads = [re.sub("[_ ]", "\n", name).replace("/", "/\n") for name in (*texts, *COLUMNS[1:])]
    lines = []
    for row in rows[:LAYERS]:
        layer, *medians, variance = (cell.partition(" [") for cell in row.cells())
        before = (shortened(getattr(row, key), NAME) for key, _ in origin)
        lines.append([shortened(layer[0], NAME), *before, *(cell[0] for cell in medians), variance[2].rstrip("]")])
    write_rows(console, heads, lines, caption, [row.layer for row in rows[:LAYERS]], left=heads[: len(texts)])
