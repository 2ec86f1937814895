"""A check-up -> the page as data: what it says and shows, before any HTML. Tests assert on this."""

from __future__ import annotations

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
from batchnorm.report.charts import NUMBER, RECORDS, Records, Spec, guide_lines, panel, scatter, y_scale
from batchnorm.report.definitions import DEFINITIONS
from batchnorm.report.page import Bar, BarGroup, Entry, Group, Lead, Page, Panel, Part, groups, provenance, unit_table
from batchnorm.report.tables import Table, rounded
from batchnorm.report.terminal import write, write_rows
from batchnorm.runs.run import provenance as recorded
from batchnorm.words import CLASS_NAMES, WORDS, count, plural, share, shortened

COLOUR = "#2f88d0"
POINTS = 4000
"""Units in a scatter: more are one cloud."""
LOWEST_INDEX = -2.0

UNIT_COLUMNS: Mapping[str, str] = {
    **{name: name for name in ("layer", "unit", "gamma", "beta")},
    "running_mean": "running mean",
    "running_var": "running var",
    **{name: name for name in ("class", "undo_index", "undo_angle", "bare_angle")},
    "position_in": "mean/s",
    "position_out": "beta/gamma",
}


def panels(layers: Sequence[Observed], rows: Sequence[Row]) -> tuple[Panel, ...]:
    """Those charts that have something to show."""
    charts = (
        (
            "undo-index",
            "undo_index, layer by layer",
            "undo_index of each layer from the input up: the median unit, and a bar from quartile to quartile.",
            _by_layer(rows, "undo_index", (LOWEST_INDEX, 1.1), guides={"undone": 1.0, "bare": 0.0}),
        ),
        (
            "variance",
            "running variance, layer by layer",
            "Running variance of each layer from the input up: the median unit, a bar from the least to the most.",
            _by_layer(rows, "variance", log=True),
        ),
        (
            "gamma-s",
            "|gamma| against s, unit by unit",
            "Every unit's |gamma| against s; on the dashed line |gamma| equals s.",
            _scatter(layers, "s", "|gamma|"),
        ),
        (
            "beta-mean",
            "beta against running mean, unit by unit",
            "Every unit's beta against its running mean; on the dashed line both are equal.",
            _scatter(layers, "running mean", "beta"),
        ),
    )
    return tuple(Panel(name, title, words, chart) for name, title, words, chart in charts if chart)


def _by_layer(
    rows: Sequence[Row],
    column: str,
    limits: tuple[float, float] | None = None,
    log: bool = False,
    guides: Mapping[str, float] | None = None,
) -> Spec | None:
    """Dots and bars of (low, middle, high) of each layer; on a logarithmic scale, of what is above 0."""
    low, middle, high = np.array([getattr(row, column) for row in rows], np.float64).reshape(-1, 3).T
    if log:
        middle = np.where(middle > 0, middle, np.nan)
        low = np.where(low > 0, low, middle)
    records: Records = [
        {"place": place, "layer": row.layer[:80], "units": row.units, "low": a, "middle": b, "high": c}
        for place, (row, a, b, c) in enumerate(zip(rows, *map(rounded, (low, middle, high)), strict=True), 1)
        if b is not None
    ]
    if not records:
        return None
    scale = y_scale(limits, log)
    axis = alt.Axis(grid=False, tickMinStep=1, format="d")
    x = alt.X("place:Q", title="layer, from the input up", axis=axis, scale=alt.Scale(domain=[0.5, len(rows) + 0.5]))
    tips = [alt.Tooltip("layer:N"), alt.Tooltip("units:Q", format=",d")]
    tips += [alt.Tooltip(f"{name}:Q", format=NUMBER) for name in ("low", "middle", "high")]
    base = alt.Chart(alt.NamedData(RECORDS)).encode(x=x, tooltip=tips)
    y_axis = alt.Axis(format=".2~g" if log else NUMBER, tickCount=5, labelOverlap=True)
    from_low, at_middle = (alt.Y(f"{name}:Q", title=None, scale=scale, axis=y_axis) for name in ("low", "middle"))
    bars = base.mark_rule(strokeWidth=3, opacity=0.35, clip=True, color=COLOUR).encode(y=from_low, y2="high:Q")
    dots = base.mark_circle(size=36, opacity=1, clip=True, color=COLOUR).encode(y=at_middle)
    return panel(alt.layer(*guide_lines(guides or {}, scale), bars, dots), records)


def _scatter(layers: Sequence[Observed], x: str, y: str) -> Spec | None:
    """Of all units, every n-th where there are many. The frame holds 99 of 100 of them; both axes are alike, so that
    the identity is a diagonal."""
    found: list[tuple[float, float, str, int]] = []
    for layer in layers:
        across, up = layer[x.replace(" ", "_")][-1], layer[y.strip("|")][-1]
        up = np.abs(up) if y.startswith("|") else up
        known = np.flatnonzero(np.isfinite(across) & np.isfinite(up))
        found += [(float(across[unit]), float(up[unit]), layer.name[:80], int(unit)) for unit in known]
    if not found:
        return None
    found = found[:: -(-len(found) // POINTS)]
    pairs = (rounded(np.array([point[side] for point in found], np.float64)) for side in (0, 1))
    records: Records = [
        {"x": a, "y": b, "layer": name, "unit": unit} for a, b, (_, _, name, unit) in zip(*pairs, found, strict=True)
    ]
    values = np.array([[each["x"], each["y"]] for each in records], np.float64)
    low, high = np.quantile(values, [0.005, 0.995])
    margin = 0.05 * (high - low) or 1.0
    ends = rounded(np.array([low - margin, high + margin]))
    frame = alt.Scale(domain=ends, nice=False, zero=False)
    tips = [alt.Tooltip("layer:N"), alt.Tooltip("unit:Q"), alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]
    return scatter(records, ("x", "y"), (x, y), (frame, frame), (ends[0], ends[1]), tips, alt.value(COLOUR))


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
    origin: tuple[tuple[str, str], ...]
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
        provenance=provenance(versions, {"What was checked": about}),
    )


def _healthy(found: Checkup) -> Lead:
    errors = found.count("error")
    label = f"found: {found.counted}" if found.findings else "errors: no rule found anything"
    if found.findings and not errors:
        label = f"errors; {label}"
    return Lead("Are they healthy?", "No" if errors else "Yes", count(errors), label)


def _lead(found: Checkup) -> Lead:
    explained = found.explanation
    bars = tuple(Bar(row.layer, row.classes) for row in explained.rows if row.classes.units)
    label = f"of {plural(explained.classes.units, 'unit')} are undone, by the running statistics"
    question = "Do gamma and beta undo it?"
    return Lead(
        question, WORDS[explained.verdict], share(explained.classes.share("undone")), label, (BarGroup("", bars),)
    )


def _parts(found: Checkup) -> tuple[Part, ...]:
    label = "no rule found anything"
    words: tuple[str, ...] = ()
    if found.findings:
        gravest = found.findings[0]
        where = f"`{shortened(gravest.layer, 60)}`: " if gravest.layer else ""
        label = f"with {found.counted}"
        words = (f"The most serious: {where}{gravest.text}.", gravest.kind.advice)
    explained = found.explanation
    return (
        Part("Are they healthy?", "Yes" if found.healthy else "No", label, words),
        Part("Do gamma and beta undo it?", WORDS[explained.verdict], "by the running statistics", explained.sentences),
    )


def _units(layers: Sequence[Observed]) -> dict[str, Any]:
    parts: list[Table] = []
    for place, layer in enumerate(layers):
        if sum(map(len, parts)) >= UNITS:
            break
        mean, var, gamma, beta = (layer[name][-1] for name in ("running_mean", "running_var", "gamma", "beta"))
        own = {
            "layer": np.full(layer.units, float(place)),
            "unit": np.arange(layer.units, dtype=np.float64),
            "position_in": position_in(mean, var, float(layer.settings["eps"])),
            "position_out": position_out(gamma, beta),
        }
        parts.append(Table({name: own[name] if name in own else layer[name][-1] for name in UNIT_COLUMNS}))
    joined = Table.stack(parts)
    joined = joined.with_column("class", np.nan_to_num(joined["class"], nan=float(CLASSES.index("unknown"))))
    names = {"layer": [shortened(layer.name, 80) for layer in layers], "class": [*CLASS_NAMES.values()]}
    return unit_table(UNIT_COLUMNS, {name: rounded(joined[name])[:UNITS] for name in UNIT_COLUMNS}, names)


NAME = 24
WIDE = 110
"""Columns from which on the table says where a layer stands."""
LAYERS = 200
"""Rows of the table: a file may claim a million layers."""


describe = Checkup.as_dict


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
        stands = (shortened(getattr(row, key), NAME) for key, _ in origin)
        lines.append([shortened(layer[0], NAME), *stands, *(each[0] for each in others), variance[2].rstrip("]")])
    write_rows(console, heads, lines, caption, [row.layer for row in rows[:LAYERS]], left=heads[: len(texts)])
