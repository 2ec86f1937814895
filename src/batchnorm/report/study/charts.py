"""Tables -> charts, as Vega-Lite that Altair wrote: one small chart a panel, as wide as its container.

An arm has the same colour and dash everywhere, from Okabe and Ito's colours, chosen to be told apart by colour-blind
readers on white and on black. Axes, labels and background get their colours from the page, not here. Over seeds, a line
is the median and a band the range.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import vl_convert

from batchnorm.report.charts import (
    GUIDE,
    NUMBER,
    RECORDS,
    Domain,
    Records,
    Spec,
    bands,
    guide_lines,
    panel,
    pointed,
    scatter,
    step_axis,
    vega_lite_version,
    word_tip,
    y_scale,
)  # fmt: skip
from batchnorm.report.page import Panel, Section
from batchnorm.report.study.numbers import Study
from batchnorm.report.tables import Array, Table, Value
from batchnorm.runs.run import RunError

OTHER_ARM = "#b06fc4"


@dataclass(frozen=True)
class Style:
    """How an arm is drawn."""

    colour: str
    dash: tuple[int, ...] = ()


class Frame(NamedTuple):
    """The part of the plane that a scatter of y against x shows."""

    x: Domain
    y: Domain


STYLES: Mapping[str, Style] = {
    "none": Style("#8c8c8c", (6, 3)),
    "learned": Style("#2f88d0"),
    "fixed": Style("#159b76", (2, 2)),
    "undone": Style("#dd6a1f"),
}


def style(arm: str) -> Style:
    """An arm's style; one that is not among the four has one too."""
    return STYLES.get(arm, Style(OTHER_ARM, (8, 2, 2, 2)))


def curves(
    table: Table,
    title: str,
    *,
    domain: Domain | None = None,
    log: bool = False,
    form: str = NUMBER,
    guides: Mapping[str, float] | None = None,
) -> Spec:
    """median, low and high of each arm against step, `title` on the axis; `guides` are horizontal lines by name."""
    records = [r for r in table.records("step", "arm", "median", "low", "high") if _drawable(r["median"], log)]
    if log:
        records = [r if _drawable(r["low"], log) else {**r, "low": r["median"]} for r in records]
    arms = [*dict.fromkeys(str(r["arm"]) for r in records)]
    base = alt.Chart(alt.NamedData(RECORDS)).encode(x=_steps(records), color=_colours(arms))
    scale = y_scale(domain, log)
    axis = alt.Axis(format=form, tickCount=5)
    if log:
        shown = [*domain] if domain else [float(r[name] or 1) for r in records for name in ("low", "high")]
        axis = alt.Axis(values=_decades(shown), format=".0e")
    tips = [word_tip("arm"), alt.Tooltip("step:Q", format=",d")]
    layers = bands(base, title, scale, axis, tips, _dashes(arms), opacity=0.2)
    return panel(alt.layer(*guide_lines(guides or {}, scale, title), *layers), records)


def drift(table: Table, title: str) -> Spec:
    """Input (solid) and output (dotted) drift of each arm against step, on a logarithmic scale; 0 is not drawn."""
    records = [r for r in table.records("step", "arm", "side", "median") if _drawable(r["median"], True)]
    arms = [*dict.fromkeys(str(r["arm"]) for r in records)]
    decades = _decades([float(r["median"] or 1) for r in records])
    base = alt.Chart(alt.NamedData(RECORDS)).encode(
        x=_steps(records),
        y=alt.Y("median:Q", title=title, scale=y_scale(None, True), axis=alt.Axis(values=decades, format=".0e")),
        color=_colours(arms),
    )
    dash = alt.StrokeDash("side:N", scale=alt.Scale(domain=["in", "out"], range=[[1, 0], [2, 2]]), legend=None)
    tips = [word_tip("arm"), word_tip("side"), alt.Tooltip("step:Q", format=",d")]
    points = pointed(base, [*tips, alt.Tooltip("median:Q", format=".3~g")])
    lines = base.mark_line(strokeWidth=1.6).encode(strokeDash=dash, detail="arm:N")
    return panel(alt.layer(lines, points), records)


def against(
    table: Table, x: str, y: str, x_title: str, y_title: str, frame: Frame, guides: Mapping[str, float] | None = None
) -> Spec:
    """y against x, a point per unit, with the identity line, which is undone. Clipped to the frame.

    `guides` are horizontal lines by name; those outside of the frame are left out.
    """
    records = [r for r in table.records("arm", "seed", "unit", x, y) if r[x] is not None and r[y] is not None]
    arms = [*dict.fromkeys(str(r["arm"]) for r in records)]
    across, up = (alt.Scale(domain=list(domain), nice=False, zero=False) for domain in frame)
    label = (
        alt.Chart(alt.InlineData(values=[{"at": frame.x[1], "name": "undone"}]))
        .mark_text(align="right", baseline="bottom", dy=-6, color=GUIDE, fontSize=10)
        .encode(x=alt.X("at:Q", scale=across, title=x_title), y=alt.Y("at:Q", scale=up, title=y_title), text="name:N")
    )
    inside = {name: at for name, at in (guides or {}).items() if frame.y[0] <= at <= frame.y[1]}
    tips = [alt.Tooltip("arm:N"), alt.Tooltip("seed:Q"), alt.Tooltip("unit:Q")]
    tips += [alt.Tooltip(f"{name}:Q", format=".4~g") for name in (x, y)]
    between = (label, *guide_lines(inside, up, y_title))
    return scatter(
        records, (x, y), (x_title, y_title), (across, up), frame.x, tips, _colours(arms), between, clip=False
    )


def percentiles(table: Table, side: str, arm: str, domain: Domain, title: str) -> Spec:
    """The {15, 50, 85}th percentiles of one unit's `side` ("in" or "out") against step, as a band around the median."""
    names = [f"{side}_p15", f"{side}_p50", f"{side}_p85"]
    records = [r for r in table.records("step", *names) if all(r[name] is not None for name in names)]
    scale = y_scale(domain, False)
    colour = style(arm).colour
    base = alt.Chart(alt.NamedData(RECORDS)).encode(x=_steps(records))
    axis = alt.Axis(format=NUMBER, tickCount=5)
    y = {name: alt.Y(f"{name}:Q", title=title, scale=scale, axis=axis) for name in names}
    tips = [alt.Tooltip("step:Q", format=",d"), *(alt.Tooltip(f"{name}:Q", format=".3~g") for name in names)]
    band = alt.layer(
        base.mark_area(opacity=0.22, color=colour, clip=True).encode(y=y[names[0]], y2=f"{names[2]}:Q"),
        base.mark_line(strokeWidth=1, color=colour, clip=True).encode(y=y[names[0]]),
        base.mark_line(strokeWidth=1, color=colour, clip=True).encode(y=y[names[2]]),
        base.mark_line(strokeWidth=2.2, color=colour, clip=True).encode(y=y[names[1]]),
        pointed(base, tips, y=y[names[1]], color=alt.value(colour)),
    )
    return panel(band, records)


def legend(entries: Sequence[str]) -> Spec:
    """The arms by name, in a row: for a picture, which has no page around it."""
    records: Records = [{"arm": arm, "place": place} for place, arm in enumerate(entries)]
    x = alt.X("place:Q", axis=None, scale=alt.Scale(domain=[-0.1, len(entries)]))
    base = alt.Chart(alt.NamedData(RECORDS)).encode(x=x, color=_colours(list(entries)))
    names = base.mark_text(align="left", dx=10, fontSize=12, color=GUIDE).encode(text="arm:N")
    return {**panel(alt.layer(base.mark_square(size=90), names), records, 16), "width": 90 * len(entries)}


def span(*columns: Array, tails: float = 0.0, pad: float = 0.04) -> Domain:
    """A domain that holds the columns' finite values, without a share `tails` of them at each end. (0, 1) for none."""
    joined = np.concatenate([column[np.isfinite(column)] for column in columns])
    if joined.size == 0:
        return (0.0, 1.0)
    low, high = (float(value) for value in np.quantile(joined, [tails, 1 - tails]))
    room = pad * (high - low) or max(abs(high), 1.0) * pad
    return (low - room, high + room)


def decades(values: Array, *others: float) -> Domain:
    """Whole decades that hold the positive ones of these values, for a logarithmic scale. (0.1, 1) for none."""
    known = np.array([*values, *others])
    known = known[np.isfinite(known) & (known > 0)]
    if known.size == 0:
        return (0.1, 1.0)
    return (10.0 ** math.floor(math.log10(known.min())), 10.0 ** math.ceil(math.log10(known.max())))


def frame(x: Array, y: Array, tails: float = 0.0) -> Frame:
    """A frame around the points, high enough for the identity line to cross all of it."""
    both = np.isfinite(x) & np.isfinite(y)
    return Frame(span(x[both], tails=tails), span(x[both], y[both], tails=tails))


def _drawable(value: Value, log: bool) -> bool:
    return isinstance(value, int | float) and (value > 0 or not log)


def _decades(values: Sequence[float]) -> list[float]:
    """The powers of ten among positive values, thinned to about four."""
    if not values:
        return []
    low, high = math.ceil(math.log10(min(values))), math.floor(math.log10(max(values)))
    return [10.0**power for power in range(low, high + 1, max(high - low, 0) // 4 + 1)]


def _colours(arms: list[str]) -> alt.Color:
    return alt.Color("arm:N", legend=None, scale=alt.Scale(domain=arms, range=[style(arm).colour for arm in arms]))


def _dashes(arms: list[str]) -> alt.StrokeDash:
    dashes = [list(style(arm).dash) or [1, 0] for arm in arms]
    return alt.StrokeDash("arm:N", legend=None, scale=alt.Scale(domain=arms, range=dashes))


def _steps(records: Records) -> alt.X:
    return step_axis(max((float(r["step"] or 0) for r in records), default=1.0))


LEARNING = ("learned", "undone")
NORMALIZED = ("learned", "fixed", "undone")


def per_layer(study: Study, column: str, arms: tuple[str, ...]) -> Table:
    """median, low and high over seeds of the median over a layer's units, by layer, arm and step."""
    medians = of(study.units, arms).medians(column, ("layer", "arm", "seed", "step"))
    return medians.spreads(column, ("layer", "arm", "step"))


def pooled(study: Study, column: str, arms: tuple[str, ...]) -> Table:
    """The same over the units of all layers."""
    return of(study.units, arms).medians(column, ("arm", "seed", "step")).spreads(column, ("arm", "step"))


def layer_panels(
    table: Table,
    title: str,
    name: str,
    *,
    domain: Domain | None,
    form: str = NUMBER,
    guides: Mapping[str, float] | None = None,
    heading: str = "",
    axis: str = "",
    log: bool = False,
) -> tuple[Panel, ...]:
    """A panel of curves for each layer; `heading` says in its title what is shown, where a section shows several.

    `axis` is the title of the vertical axis, by default `title`.
    """
    panels = []
    for place, layer in enumerate(table.names("layer")):
        rows = table.rows(layer=layer)
        if some(rows):
            chart = curves(rows, axis or title, domain=domain, form=form, guides=guides, log=log)
            shown = f"{layer}: {heading}" if heading else layer
            panels.append(Panel(f"{name}-{place}", shown, f"{title} against step in {layer}, by arm.", chart))
    return tuple(panels)


def of(table: Table, arms: tuple[str, ...]) -> Table:
    return Table.stack([table.rows(arm=arm) for arm in arms])


def joined(study: Study, arms: tuple[str, ...]) -> Table:
    """The units of these arms at their last steps."""
    return Table.stack([study.end(study.units, arm) for arm in arms])


def some(table: Table) -> bool:
    return bool(np.isfinite(table["median"]).any())


def from_zero(table: Table, *others: float) -> Domain:
    """From 0 to above the highest value of the table's bands and of the others."""
    high = np.array([*table["high"], *others])
    return (0.0, float(high[np.isfinite(high)].max(initial=0.0)) * 1.08 or 1.0)


MAIN = ("accuracy", "undo", "gamma-beta", "optimal", "percentiles", "gradient")
TOTAL_WIDTH = 960
PIXEL_RATIO = 1.5
LONGEST_TITLE = 40
INK = "#333333"


def write_pictures(
    sections: Sequence[Section], folder: str | os.PathLike[str], names: tuple[str, ...] = MAIN
) -> list[Path]:
    """Write one PNG for each section of these names that has charts; the folder is made where missing.

    Raises RunError where a file cannot be written.
    """
    target = Path(folder)
    written = []
    for section in sections:
        if section.id in names and section.panels:
            picture = vl_convert.vegalite_to_png(
                compose(section), vl_version=vega_lite_version(), scale=PIXEL_RATIO, config=_config()
            )
            path = target / f"{section.id}.png"
            try:
                target.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture)
            except OSError as error:
                raise RunError(f"cannot write pictures into {target}: {error.strerror or error}") from error
            written.append(path)
    return written


def compose(section: Section) -> Spec:
    """The panels of a section in rows, each under its title, and the legend below, as one Vega-Lite chart."""
    width = TOTAL_WIDTH // section.columns - 60
    panels = []
    for each in section.panels:
        title = each.title if len(each.title) <= LONGEST_TITLE else f"{each.title[:LONGEST_TITLE]}…"
        body = {key: value for key, value in each.chart.items() if key not in ("$schema", "config")}
        panels.append({**body, "width": width, "title": title})
    rows: list[Spec] = [
        {"hconcat": panels[first : first + section.columns], "spacing": 24}
        for first in range(0, len(panels), section.columns)
    ]
    if section.legend:
        rows.append({k: v for k, v in legend(section.legend).items() if k not in ("$schema", "config")})
    return {"$schema": section.panels[0].chart["$schema"], "vconcat": rows, "spacing": 22}


def _config() -> dict[str, Any]:
    axis = {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "gridColor": "#e6e6e6"}
    return {"background": "white", "view": {"stroke": None}, "axis": axis, "title": {"anchor": "start", "color": INK}}
