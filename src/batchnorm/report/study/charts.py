"""The charts of a study, as Vega-Lite made by Altair: one small chart per panel, as wide as its container.

Each arm has one colour and dash everywhere. The colours are Okabe and Ito's, which colour-blind readers can distinguish
on white and on black. Axes, labels and background get their colours from the page. A line is the median over seeds, a
band the range.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import vl_convert

import batchnorm.report.charts as shared
from batchnorm.report.charts import GUIDE, NUMBER, RECORDS, Domain, Records, Spec
from batchnorm.report.page import Panel, Section
from batchnorm.report.study.numbers import Study
from batchnorm.report.tables import Array, Table, Value
from batchnorm.runs.run import RunError

OTHER_ARM = "#b06fc4"


class Style(NamedTuple):
    colour: str
    dash: tuple[int, ...] = ()


class Frame(NamedTuple):
    x: Domain
    y: Domain


STYLES: Mapping[str, Style] = {
    "none": Style("#8c8c8c", (6, 3)),
    "learned": Style("#2f88d0"),
    "fixed": Style("#159b76", (2, 2)),
    "undone": Style("#dd6a1f"),
}


def style(arm: str) -> Style:
    """An arm's style; unknown arms have one too."""
    return STYLES.get(arm, Style(OTHER_ARM, (8, 2, 2, 2)))


TITLES = {
    "s": "s, the input's deviation",
    "mean": "mean of the input",
    "position_in": "position in, mean/s",
    "position_out": "position out, beta/gamma",
}


def curves(
    table: Table,
    title: str,
    *,
    domain: Domain | None = None,
    log: bool = False,
    form: str = NUMBER,
    guides: Mapping[str, float] | None = None,
) -> Spec:
    """median, low and high per arm against step; `title` is the axis title, `guides` are horizontal lines by name."""
    records = [r for r in table.records("step", "arm", "median", "low", "high") if _drawable(r["median"], log)]
    if log:
        records = [r if _drawable(r["low"], log) else {**r, "low": r["median"]} for r in records]
    arms = _arms(records)
    scale = shared.y_scale(domain, log)
    axis = alt.Axis(format=form, tickCount=5)
    if log:
        axis = _decade_axis(domain or [float(r[name] or 1) for r in records for name in ("low", "high")])
    dash = alt.StrokeDash(
        "arm:N", legend=None, scale=alt.Scale(domain=arms, range=[list(style(arm).dash) or [1, 0] for arm in arms])
    )
    base = _over_steps(records, color=_colours(arms))
    layers = shared.bands(base, title, scale, axis, [shared.word_tip("arm"), _step_tip()], dash, opacity=0.2)
    return shared.panel(alt.layer(*shared.guide_lines(guides or {}, scale, title), *layers), records)


def drift(table: Table, title: str) -> Spec:
    """Input (solid) and output (dotted) drift per arm against step, on a logarithmic scale without 0."""
    records = [r for r in table.records("step", "arm", "side", "median") if _drawable(r["median"], True)]
    axis = _decade_axis([float(r["median"] or 1) for r in records])
    y = alt.Y("median:Q", title=title, scale=shared.y_scale(None, True), axis=axis)
    base = _over_steps(records, y=y, color=_colours(_arms(records)))
    dash = alt.StrokeDash("side:N", scale=alt.Scale(domain=["in", "out"], range=[[1, 0], [2, 2]]), legend=None)
    tips = [shared.word_tip("arm"), shared.word_tip("side"), _step_tip(), alt.Tooltip("median:Q", format=".3~g")]
    lines = base.mark_line(strokeWidth=1.6).encode(strokeDash=dash, detail="arm:N")
    return shared.panel(alt.layer(lines, shared.pointed(base, tips)), records)


def against(table: Table, x: str, y: str, frame: Frame, guides: Mapping[str, float] | None = None) -> Spec:
    """y against x, a point per unit, clipped to the frame. On the identity line a unit is undone.

    `guides` are horizontal lines by name, drawn if they lie inside of the frame.
    """
    records = [r for r in table.records("arm", "seed", "unit", x, y) if r[x] is not None and r[y] is not None]
    x_scale, y_scale = (alt.Scale(domain=list(domain), nice=False, zero=False) for domain in frame)
    titles = TITLES.get(x, x), TITLES.get(y, y)
    ends = alt.X("at:Q", scale=x_scale, title=titles[0]), alt.Y("at:Q", scale=y_scale, title=titles[1])
    label = (
        alt.Chart(alt.InlineData(values=[{"at": frame.x[1], "name": "undone"}]))
        .mark_text(align="right", baseline="bottom", dy=-6, color=GUIDE, fontSize=10)
        .encode(x=ends[0], y=ends[1], text="name:N")
    )
    inside = {name: value for name, value in (guides or {}).items() if frame.y[0] <= value <= frame.y[1]}
    tips = [alt.Tooltip("arm:N"), alt.Tooltip("seed:Q"), alt.Tooltip("unit:Q")]
    tips += [alt.Tooltip(f"{name}:Q", format=".4~g") for name in (x, y)]
    between = (label, *shared.guide_lines(inside, y_scale, titles[1]))
    colours = _colours(_arms(records))
    return shared.scatter(records, (x, y), titles, (x_scale, y_scale), frame.x, tips, colours, between, clip=False)


def percentiles(table: Table, side: str, arm: str, domain: Domain, title: str) -> Spec:
    """The 15th to 85th percentile of one unit's `side` ("in" or "out") against step, as a band around the median."""
    names = {f"{side}_p15": "low", f"{side}_p50": "median", f"{side}_p85": "high"}
    rows = [r for r in table.records("step", *names) if all(r[name] is not None for name in names)]
    records: Records = [{names.get(name, name): value for name, value in r.items()} for r in rows]
    scale, axis = shared.y_scale(domain, False), alt.Axis(format=NUMBER, tickCount=5)
    base = _over_steps(records, color=alt.value(style(arm).colour))
    layers = shared.bands(base, title, scale, axis, [_step_tip()], alt.value([1, 0]), opacity=0.22)
    return shared.panel(alt.layer(*layers), records)


def legend(entries: Sequence[str]) -> Spec:
    """The arms by name, in a row, for a picture."""
    records: Records = [{"arm": arm, "place": place} for place, arm in enumerate(entries)]
    x = alt.X("place:Q", axis=None, scale=alt.Scale(domain=[-0.1, len(entries)]))
    base = alt.Chart(alt.NamedData(RECORDS)).encode(x=x, color=_colours(list(entries)))
    names = base.mark_text(align="left", dx=10, fontSize=12, color=GUIDE).encode(text="arm:N")
    return {**shared.panel(alt.layer(base.mark_square(size=90), names), records, 16), "width": 90 * len(entries)}


def span(*columns: Array, tails: float = 0.0, pad: float = 0.04) -> Domain:
    """The range of the columns' finite values, without a share `tails` at each end. (0, 1) without values."""
    joined = np.concatenate([column[np.isfinite(column)] for column in columns])
    if joined.size == 0:
        return (0.0, 1.0)
    low, high = (float(value) for value in np.quantile(joined, [tails, 1 - tails]))
    room = pad * (high - low) or max(abs(high), 1.0) * pad
    return (low - room, high + room)


def decades(values: Array, *others: float) -> Domain:
    """The decades that contain the positive values, for a logarithmic scale. (0.1, 1) without values."""
    known = np.array([*values, *others])
    known = known[np.isfinite(known) & (known > 0)]
    if known.size == 0:
        return (0.1, 1.0)
    return (10.0 ** math.floor(math.log10(known.min())), 10.0 ** math.ceil(math.log10(known.max())))


def frame(x: Array, y: Array, tails: float = 0.0) -> Frame:
    """A frame around the points that contains the identity line over the whole width."""
    both = np.isfinite(x) & np.isfinite(y)
    return Frame(span(x[both], tails=tails), span(x[both], y[both], tails=tails))


def _drawable(value: Value, log: bool) -> bool:
    return isinstance(value, int | float) and (value > 0 or not log)


def _decade_axis(values: Sequence[float]) -> alt.Axis:
    powers = range(math.ceil(math.log10(min(values))), math.floor(math.log10(max(values))) + 1) if values else range(0)
    return alt.Axis(values=[10.0**power for power in powers[:: (len(powers) - 1) // 4 + 1 or 1]], format=".0e")


def _arms(records: Records) -> list[str]:
    return [*dict.fromkeys(str(r["arm"]) for r in records)]


def _colours(arms: list[str]) -> alt.Color:
    return alt.Color("arm:N", legend=None, scale=alt.Scale(domain=arms, range=[style(arm).colour for arm in arms]))


def _over_steps(records: Records, **channels: Any) -> alt.Chart:
    x = shared.step_axis(max((float(r["step"] or 0) for r in records), default=1.0))
    chart: alt.Chart = alt.Chart(alt.NamedData(RECORDS)).encode(x=x, **channels)
    return chart


def _step_tip() -> alt.Tooltip:
    return alt.Tooltip("step:Q", format=",d")


LEARNING = ("learned", "undone")
NORMALIZED = ("learned", "fixed", "undone")


def per_layer(study: Study, column: str, arms: tuple[str, ...]) -> Table:
    """median, low and high over seeds of the median over a layer's units, by layer, arm and step."""
    units = Table.stack([study.units.rows(arm=arm) for arm in arms])
    return units.medians(column, ("layer", "arm", "seed", "step")).spreads(column, ("layer", "arm", "step"))


def joined(study: Study, arms: tuple[str, ...]) -> Table:
    return Table.stack([study.end(study.units, arm) for arm in arms])


def curve_panels(table: Table, name: str, title: str, words: str, axis: str, **options: Any) -> tuple[Panel, ...]:
    """A panel of `curves`, or none if all medians are unknown."""
    known = np.isfinite(table["median"]).any()
    return (Panel(name, title, words, curves(table, axis, **options)),) if known else ()


def layer_panels(
    table: Table, title: str, name: str, *, heading: str = "", axis: str = "", **options: Any
) -> tuple[Panel, ...]:
    """A panel of curves per layer. `heading` extends its title; `axis` is the axis title, by default `title`."""
    panels: list[Panel] = []
    for place, layer in enumerate(table.names("layer")):
        panel_title = f"{layer}: {heading}" if heading else layer
        words = f"{title} against step in {layer}, by arm."
        panels += curve_panels(table.rows(layer=layer), f"{name}-{place}", panel_title, words, axis or title, **options)
    return tuple(panels)


def from_zero(table: Table, *others: float) -> Domain:
    high = np.array([*table["high"], *others])
    return (0.0, float(high[np.isfinite(high)].max(initial=0.0)) * 1.08 or 1.0)


MAIN = ("accuracy", "undo", "gamma-beta", "optimal", "percentiles", "gradient")
TOTAL_WIDTH = 960
PIXEL_RATIO = 1.5
LONGEST_TITLE = 40
INK = "#333333"
AXIS = {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "gridColor": "#e6e6e6"}
CONFIG = {"background": "white", "view": {"stroke": None}, "axis": AXIS, "title": {"anchor": "start", "color": INK}}


def write_pictures(
    sections: Sequence[Section], folder: str | os.PathLike[str], names: tuple[str, ...] = MAIN
) -> list[Path]:
    """Write one PNG per named section that has charts, and create the folder if missing.

    Raises RunError if a file cannot be written.
    """
    target = Path(folder)
    written = []
    version = shared.vega_lite_version()
    for section in sections:
        if section.id in names and section.panels:
            picture = vl_convert.vegalite_to_png(compose(section), version, scale=PIXEL_RATIO, config=CONFIG)
            path = target / f"{section.id}.png"
            try:
                target.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture)
            except OSError as error:
                raise RunError(f"cannot write pictures into {target}: {error.strerror or error}") from error
            written.append(path)
    return written


def compose(section: Section) -> Spec:
    """One Vega-Lite chart of a section: its panels in rows, with titles, and the legend below."""

    def body(spec: Spec) -> Spec:
        return {key: value for key, value in spec.items() if key not in ("$schema", "config")}

    width = TOTAL_WIDTH // section.columns - 60
    panels = []
    for panel in section.panels:
        title = panel.title if len(panel.title) <= LONGEST_TITLE else f"{panel.title[:LONGEST_TITLE]}…"
        panels.append({**body(panel.chart), "width": width, "title": title})
    starts = range(0, len(panels), section.columns)
    rows: list[Spec] = [{"hconcat": panels[start : start + section.columns], "spacing": 24} for start in starts]
    if section.legend:
        rows.append(body(legend(section.legend)))
    return {"$schema": section.panels[0].chart["$schema"], "vconcat": rows, "spacing": 22}
