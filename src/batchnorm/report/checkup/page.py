"""A check-up -> the page as data: what it says and shows, before any HTML. Tests assert on this."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
from rich.console import Console

from batchnorm.checks.check import COLUMNS, Checkup, Row, origins
from batchnorm.checks.findings import Observed, finding_lines
from batchnorm.quantities import CLASSES, position_in, position_out
from batchnorm.report.charts import (
    NUMBER,
    Records,
    Spec,
    guide_lines,
    panel,
    scatter,
    y_scale,
)
from batchnorm.report.definitions import DEFINITIONS
from batchnorm.report.page import (
    Bar,
    BarGroup,
    Entry,
    Group,
    Lead,
    Page,
    Panel,
    Part,
    groups,
    undone_number,
    unit_table,
)
from batchnorm.report.page import provenance as page_provenance
from batchnorm.report.tables import Value
from batchnorm.report.terminal import write, write_rows
from batchnorm.runs.provenance import provenance
from batchnorm.words import CLASS_NAMES, WORDS, count, plural, shortened

COLOUR = "#2f88d0"
POINTS = 4000
"""Units in a scatter: more are one cloud."""
LOWEST_INDEX = -2.0

UNIT_COLUMNS: Mapping[str, str] = {
    "layer": "layer",
    "unit": "unit",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "running mean",
    "running_var": "running var",
    "class": "class",
    "undo_index": "undo_index",
    "undo_angle": "undo_angle",
    "bare_angle": "bare_angle",
    "position_in": "mean/s",
    "position_out": "beta/gamma",
}


def panels(layers: Sequence[Observed], rows: Sequence[Row]) -> tuple[Panel, ...]:
    """Those charts that have something to show."""
    made = []
    index = _records(rows, [row.undo_index for row in rows])
    if index:
        chart = _by_layer(index, len(rows), (LOWEST_INDEX, 1.1), False, {"undone": 1.0, "bare": 0.0})
        words = "undo_index of each layer from the input up: the median unit, and a bar from quartile to quartile."
        made.append(Panel("undo-index", "undo_index, layer by layer", words, chart))
    variance = _records(rows, [row.variance for row in rows], positive=True)
    if variance:
        chart = _by_layer(variance, len(rows), None, True, {})
        words = "Running variance of each layer from the input up: the median unit, a bar from the least to the most."
        made.append(Panel("variance", "running variance, layer by layer", words, chart))
    scale = _points(layers, "s", "gamma", absolute=True)
    if scale:
        words = "Every unit's |gamma| against s; on the dashed line |gamma| equals s."
        made.append(Panel("gamma-s", "|gamma| against s, unit by unit", words, _scatter(scale, "s", "|gamma|")))
    location = _points(layers, "running_mean", "beta")
    if location:
        words = "Every unit's beta against its running mean; on the dashed line both are equal."
        chart = _scatter(location, "running mean", "beta")
        made.append(Panel("beta-mean", "beta against running mean, unit by unit", words, chart))
    return tuple(made)


def plain(value: Any) -> Value:
    """A number for JSON: whole ones as they are, others to five digits, what is not finite as null."""
    if isinstance(value, int):
        return value
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else None


def _records(rows: Sequence[Row], triples: Sequence[tuple[float, float, float]], positive: bool = False) -> Records:
    found: Records = []
    for at, (row, (low, middle, high)) in enumerate(zip(rows, triples, strict=True)):
        if not math.isfinite(middle) or (positive and middle <= 0):
            continue
        least = min((v for v in (low, middle) if not positive or v > 0), default=middle)
        entry: dict[str, Value] = {"place": at + 1, "layer": row.layer[:80], "units": row.units}
        found.append(entry | {"low": plain(least), "middle": plain(middle), "high": plain(high)})
    return found


def _by_layer(
    records: Records, layers: int, limits: tuple[float, float] | None, log: bool, guides: Mapping[str, float]
) -> Spec:
    scale = y_scale(limits, log)
    axis = alt.Axis(grid=False, tickMinStep=1, format="d")
    x = alt.X("place:Q", title="layer, from the input up", axis=axis, scale=alt.Scale(domain=[0.5, layers + 0.5]))
    tips = [alt.Tooltip("layer:N"), alt.Tooltip("units:Q", format=",d")]
    tips += [alt.Tooltip(f"{name}:Q", format=NUMBER) for name in ("low", "middle", "high")]
    base = alt.Chart(alt.NamedData("records")).encode(x=x, tooltip=tips)
    y_axis = alt.Axis(format=".2~g" if log else NUMBER, tickCount=5, labelOverlap=True)
    bars = base.mark_rule(strokeWidth=3, opacity=0.35, clip=True, color=COLOUR)
    dots = base.mark_circle(size=36, opacity=1, clip=True, color=COLOUR)
    layers_of = [
        *guide_lines(guides, scale),
        bars.encode(y=alt.Y("low:Q", title=None, scale=scale, axis=y_axis), y2="high:Q"),
        dots.encode(y=alt.Y("middle:Q", title=None, scale=scale, axis=y_axis)),
    ]
    return panel(alt.layer(*layers_of), records)


def _points(layers: Sequence[Observed], x: str, y: str, absolute: bool = False) -> Records:
    """Finite pairs of all units, every n-th where there are many."""
    found: list[tuple[float, float, str, int]] = []
    for layer in layers:
        across, up = layer[x][-1], layer[y][-1]
        up = np.abs(up) if absolute else up
        known = np.flatnonzero(np.isfinite(across) & np.isfinite(up))
        found += [(float(across[unit]), float(up[unit]), layer.name[:80], int(unit)) for unit in known]
    stride = -(-len(found) // POINTS) or 1
    return [{"x": plain(a), "y": plain(b), "layer": name, "unit": unit} for a, b, name, unit in found[::stride]]


def _scatter(records: Records, x: str, y: str) -> Spec:
    """The frame holds 99 of 100 units; both axes are alike, so that the identity is a diagonal."""
    values = np.asarray([[each["x"], each["y"]] for each in records], np.float64)
    low, high = (float(each) for each in np.quantile(values, [0.005, 0.995]))
    margin = 0.05 * (high - low) or 1.0
    ends = plain(low - margin), plain(high + margin)
    frame = alt.Scale(domain=list(ends), nice=False, zero=False)
    tips = [alt.Tooltip("layer:N"), alt.Tooltip("unit:Q"), alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]
    return scatter(records, ("x", "y"), (x, y), (frame, frame), ends, tips, alt.value(COLOUR))


TITLE = "The batch norm layers of a checkpoint"
DEFINED = ("class", "undo_distance", "undo_index", "undo_angle, bare_angle", "position in, position out")
UNITS = 20_000
"""Units in the table: a page with more of them opens slowly."""


@dataclass(frozen=True, kw_only=True)
class CheckPage(Page):
    """The page of a check-up: two questions are answered, whether the layers are healthy and whether they undo."""

    template = "check"
    scripts = ("units",)
    links = (("findings", "Findings"), ("layers", "The layers"), ("units", "Every unit"))

    healthy: Lead
    findings: tuple[Group, ...]
    columns: tuple[str, ...]
    origin: tuple[tuple[int, str], ...]
    layers: tuple[Row, ...]
    panels: tuple[Panel, ...]
    units: dict[str, Any]

    def data(self) -> dict[str, Any]:
        return {"charts": {panel.id: panel.chart for panel in self.panels}, "units": self.units}


def summarize(found: Sequence[Checkup]) -> Checkup:
    """A check-up is the summary of what it read."""
    return found[0]


def build(found: Checkup) -> CheckPage:
    """The page of a check-up."""
    network = found.network
    units = sum(layer.units for layer in network.layers)
    notices = []
    if units > UNITS:
        notices.append(f"The table of units shows the first {UNITS:,} of {units:,}.")
    about = {
        "source": shortened(network.source, 200),
        "format": network.format,
        "bytes": None if network.size is None else f"{network.size:,}",
        "tensors": f"{network.tensors:,}",
        "batch norm layers": f"{len(network.layers):,}",
        "units": f"{units:,}",
    }
    versions = {"versions": provenance(())["versions"]}
    return CheckPage(
        title=TITLE,
        subtitle=f"{shortened(network.source, 80)}: {network.format}, {plural(len(network.layers), 'layer')}",
        notices=tuple(notices),
        healthy=_healthy(found),
        lead=_lead(found),
        headline=found.headline[0].upper() + found.headline[1:] + ".",
        parts=_parts(found),
        findings=groups(map(Entry, found.findings)),
        columns=COLUMNS,
        origin=origins(found.explanation.rows),
        layers=found.explanation.rows,
        panels=panels(network.layers, found.explanation.rows),
        units=_units(network.layers),
        definitions=tuple(each for each in DEFINITIONS if each.name in DEFINED),
        provenance=page_provenance(versions, {"What was checked": about}),
    )


def _healthy(found: Checkup) -> Lead:
    errors = found.count("error")
    if errors:
        label = f"found: {found.counted}"
    else:
        label = f"errors; found: {found.counted}" if found.findings else "errors: no rule found anything"
    return Lead("Are they healthy?", "No" if errors else "Yes", count(errors), label)


def _lead(found: Checkup) -> Lead:
    explained = found.explanation
    bars = tuple(Bar(row.layer, row.classes) for row in explained.rows if row.classes.units)
    label = f"of {plural(explained.classes.units, 'unit')} are undone, by the running statistics"
    question = "Do gamma and beta undo it?"
    return Lead(question, WORDS[explained.verdict], undone_number(explained.classes), label, (BarGroup("", bars),))


def _parts(found: Checkup) -> tuple[Part, ...]:
    explained = found.explanation
    gravest = found.findings[0] if found.findings else None
    if gravest is None:
        sick = Part("Are they healthy?", "Yes", "no rule found anything", ())
    else:
        where = f"`{shortened(gravest.layer, 60)}`: " if gravest.layer else ""
        words = (f"The most serious: {where}{gravest.text}.", gravest.kind.advice)
        sick = Part("Are they healthy?", "Yes" if found.healthy else "No", f"with {found.counted}", words)
    sentences = tuple(filter(None, (explained.headline, explained.scale_free)))
    undone = Part("Do gamma and beta undo it?", WORDS[explained.verdict], "by the running statistics", sentences)
    return sick, undone


def _units(layers: Sequence[Observed]) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {name: [] for name in UNIT_COLUMNS}
    for at, layer in enumerate(layers):
        mean, var, gamma, beta = (layer[name][-1] for name in ("running_mean", "running_var", "gamma", "beta"))
        eps = float(layer.settings["eps"])
        rows = {
            "layer": [at] * layer.units,
            "unit": range(layer.units),
            "gamma": gamma,
            "beta": beta,
            "running_mean": mean,
            "running_var": var,
            "class": _codes(layer),
            **{name: layer[name][-1] for name in ("undo_index", "undo_angle", "bare_angle")},
            "position_in": position_in(mean, var, eps),
            "position_out": position_out(gamma, beta),
        }
        for name, values in rows.items():
            columns[name] += [plain(value) for value in values]
        if len(columns["unit"]) >= UNITS:
            break
    names = {"layer": [shortened(layer.name, 80) for layer in layers], "class": [*CLASS_NAMES.values()]}
    return unit_table(UNIT_COLUMNS, {name: values[:UNITS] for name, values in columns.items()}, names)


def _codes(layer: Observed) -> list[int]:
    """Of each unit the position of its class in CLASSES."""
    unknown = CLASSES.index("unknown")
    return [int(code) if code == code else unknown for code in layer["class"][-1].tolist()]


NAME = 24
WIDE = 110
"""Columns from which on the table says where a layer stands."""
LAYERS = 200
"""Rows of the table: a file may claim a million layers."""


def describe(found: Checkup) -> dict[str, Any]:
    """JSON values."""
    return found.as_dict()


def show(found: Checkup, console: Console) -> None:
    """The whole check-up, in 80 columns."""
    network = found.network
    size = "" if network.size is None else f", {network.size / 1e6:,.1f} MB"
    write(console, f"{network.source} ({network.format}{size})")
    write(console, f"{found.headline}\n")
    if network.layers:
        _write_layers(found.explanation.rows, console)
        write(console, "\n" + "\n".join(found.explanation.sentences) + "\n")
    write(console, "\n".join(finding_lines(found.findings)))


def _write_layers(rows: Sequence[Row], console: Console) -> None:
    caption = "Medians over units, shares and counts of them; of the running variance min and max."
    if len(rows) > LAYERS:
        caption += f" The first {LAYERS:,} of {plural(len(rows), 'layer')}."
    origin = origins(rows) if console.width >= WIDE else ()
    texts = [COLUMNS[0], *(name for _, name in origin)]
    heads = [re.sub("[_ ]", "\n", name).replace("/", "/\n") for name in (*texts, *COLUMNS[1:])]
    lines = []
    for row in rows[:LAYERS]:
        layer, *others, variance = (cell.partition(" [") for cell in row.cells())
        stands = (shortened(row.origin[at], NAME) for at, _ in origin)
        lines.append([shortened(layer[0], NAME), *stands, *(each[0] for each in others), variance[2].rstrip("]")])
    write_rows(console, heads, lines, caption, [row.layer for row in rows[:LAYERS]], left=heads[: len(texts)])
