"""Shared parts of all charts: the step axis, scales, guide lines, bands, scatter plots, and panels with their data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import altair as alt
import vl_convert

from batchnorm.report.tables import Value

HEIGHT = 190
SQUARE = 250
NUMBER = ".4~g"
GUIDE = "#8a8a8a"
STEP_LABEL = "datum.value < 1000 ? format(datum.value, 'd') : format(datum.value / 1000, '~g') + 'k'"
RECORDS = "records"
NEAREST = "nearest"

Records = list[dict[str, Value]]
Domain = tuple[float, float]
Spec = dict[str, Any]


def panel(chart: Any, records: Records, height: int = HEIGHT) -> Spec:
    """The chart's Vega-Lite with its records. Altair never sees them: copying and checking them takes seconds."""
    spec: Spec = chart.properties(width="container", height=height).to_dict(validate=False)
    datasets = spec.pop("datasets", {})
    for layer in spec["layer"]:
        name = layer.pop("data", {"name": RECORDS})["name"]
        if name != RECORDS:
            layer["data"] = {"values": datasets[name]}
    return {**spec, "data": {"values": records}, "config": {"customFormatTypes": True}}


def vega_lite_version() -> str:
    """The Vega-Lite version that Altair writes, or vl_convert's newest if it does not have it."""
    wanted: str = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    available: list[str] = vl_convert.get_vegalite_versions()
    return wanted if wanted in available else available[-1]


@cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed in one script, which sets window.vegaEmbed."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite_version())
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def step_axis(last: float) -> alt.X:
    """The step on a scale of log(1 + step), which includes step 0."""
    ticks = [0, *(10**power for power in range(int(math.log10(max(last, 1))) + 1))]
    if last > 2.5 * ticks[-1]:
        ticks.append(int(last))
    return alt.X(
        "step:Q",
        title="step",
        scale=alt.Scale(type="symlog", constant=1, domain=[0, max(last, 1)], nice=False),
        axis=alt.Axis(values=ticks, labelExpr=STEP_LABEL, grid=False, labelFlush=True),
    )


def y_scale(domain: Domain | None, log: bool) -> alt.Scale:
    shown: Any = alt.Undefined if domain is None else list(domain)
    if log:
        return alt.Scale(type="log", nice=False, domain=shown)
    return alt.Scale(zero=False, domain=shown, nice=alt.Undefined if domain is None else False)


def word_tip(name: str) -> alt.Tooltip:
    """A word in the tooltip of `pointed`. Without a format, Vega-Lite reads it from the wrong record."""
    return alt.Tooltip(f"{name}:N", formatType="truncate", format="80")


def pointed(base: alt.Chart, tooltip: list[alt.Tooltip], **channels: Any) -> alt.Chart:
    """The points of a line chart; only the point nearest to the pointer is visible, with its tooltip."""
    nearest = alt.selection_point(name=NEAREST, nearest=True, on="pointerover", clear="pointerout", empty=False)
    points = base.mark_point(size=50, filled=True, clip=True).encode(
        tooltip=tooltip, opacity=alt.condition(nearest, alt.value(1), alt.value(0)), **channels
    )
    chart: alt.Chart = points.add_params(nearest).properties(name=f"{NEAREST}_points")
    return chart


def guide_lines(guides: Mapping[str, float], scale: alt.Scale, title: str | None = None) -> list[alt.Chart]:
    """Horizontal lines with their names, on an axis with this title."""
    if not guides:
        return []
    records = [{"at": y, "name": name} for name, y in guides.items()]
    base = alt.Chart(alt.InlineData(values=records)).encode(y=alt.Y("at:Q", scale=scale, title=title))
    text = base.mark_text(align="left", baseline="bottom", dx=4, dy=-2, color=GUIDE, fontSize=10)
    return [base.mark_rule(color=GUIDE, strokeDash=[2, 3]), text.encode(x=alt.value(0), text="name:N")]


def bands(
    base: alt.Chart,
    title: str | None,
    scale: alt.Scale,
    axis: alt.Axis,
    tips: list[alt.Tooltip],
    dash: Any,
    opacity: float,
) -> list[Any]:
    """Lines of `median` with a band from `low` to `high`, and a tooltip at the nearest point."""
    tips = [*tips, *(alt.Tooltip(f"{name}:Q", format=".4~g") for name in ("median", "low", "high"))]
    y = alt.Y("median:Q", title=title, scale=scale, axis=axis)
    return [
        base.mark_area(opacity=opacity, clip=True).encode(y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q"),
        base.mark_line(strokeWidth=1.8, clip=True).encode(y=y, strokeDash=dash),
        pointed(base, tips, y=y),
    ]


def scatter(
    records: Records,
    columns: tuple[str, str],
    titles: tuple[str, str],
    scales: tuple[alt.Scale, alt.Scale],
    ends: tuple[Any, Any],
    tips: list[alt.Tooltip],
    colour: Any,
    between: Sequence[alt.Chart] = (),
    clip: bool = True,
) -> Spec:
    """Points of two columns above the identity line between `ends`; `between` is drawn below the points."""
    (x, y), (x_title, y_title), (across, up) = columns, titles, scales
    identity = (
        alt.Chart(alt.InlineData(values=[{"from": ends[0], "to": ends[1]}]))
        .mark_rule(strokeDash=[4, 3], color=GUIDE, clip=clip)
        .encode(
            x=alt.X("from:Q", scale=across, title=x_title),
            x2="to:Q",
            y=alt.Y("from:Q", scale=up, title=y_title),
            y2="to:Q",
        )
    )
    axis = alt.Axis(format=NUMBER, tickCount=5)
    points = (
        alt.Chart(alt.NamedData(RECORDS))
        .mark_circle(size=14, opacity=0.5, clip=True)
        .encode(
            x=alt.X(f"{x}:Q", title=x_title, scale=across, axis=axis),
            y=alt.Y(f"{y}:Q", title=y_title, scale=up, axis=axis),
            color=colour,
            tooltip=tips,
        )
    )
    return panel(alt.layer(identity, *between, points), records, SQUARE)
