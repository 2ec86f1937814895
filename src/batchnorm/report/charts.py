"""Charts as Vega-Lite made by Altair: parts that all share, and a study's, each as wide as its container.

Each arm has one colour and dash everywhere. The colours are Okabe and Ito's, which colour-blind readers can distinguish
on white and on black. Axes, labels and background get their colours from the page. In a study's charts a line is the
median over seeds, a band the range. `watch.page` and `checkup.page` make those of trainings and check-ups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import vl_convert
from numpy.typing import ArrayLike

from batchnorm.report.tables import Array, Table, Value, rounded

HEIGHT = 190
SQUARE = 250
NUMBER = ".4~g"
GUIDE = "#8a8a8a"
COLOUR = "#2f88d0"
"""Of points that belong to no arm or run."""
STEP_LABEL = "datum.value < 1000 ? format(datum.value, 'd') : format(datum.value / 1000, '~g') + 'k'"
RECORDS = "records"
NEAREST = "nearest"

Records = list[dict[str, Value]]
Domain = tuple[float, float]
LayerSpread = tuple[str, int, tuple[float, float, float]]
"""A layer's name, its units, and low, middle and high of a quantity over them."""
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
    """The scale of the y axis: its domain, or that of the data if None, linear or logarithmic."""
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


# --- a study's charts -------------------------------------------------------------------------------------------------

OTHER_ARM = "#b06fc4"


class Style(NamedTuple):
    """The colour and dash pattern of an arm's lines."""

    colour: str
    dash: tuple[int, ...] = ()


class Frame(NamedTuple):
    """The visible domains of both axes."""

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
    table, scale = _drawable(table, log), y_scale(domain, log)
    arms, records = table.names("arm"), table.records("step", "arm", "median", "low", "high")
    ends = domain or [*table["low"], *table["high"]]
    axis = _decade_axis(ends) if log else alt.Axis(format=form, tickCount=5)
    dash = alt.StrokeDash(
        "arm:N", legend=None, scale=alt.Scale(domain=arms, range=[list(style(arm).dash) or [1, 0] for arm in arms])
    )
    base = _over_steps(table, color=_colours(arms))
    layers = bands(base, title, scale, axis, [word_tip("arm"), _step_tip()], dash, opacity=0.2)
    return panel(alt.layer(*guide_lines(guides or {}, scale, title), *layers), records)


def drift(table: Table, title: str) -> Spec:
    """Input (solid) and output (dotted) drift per arm against step, on a logarithmic scale without 0."""
    table = _drawable(table, log=True)
    y = alt.Y("median:Q", title=title, scale=y_scale(None, True), axis=_decade_axis(table["median"]))
    base = _over_steps(table, y=y, color=_colours(table.names("arm")))
    dash = alt.StrokeDash("side:N", scale=alt.Scale(domain=["in", "out"], range=[[1, 0], [2, 2]]), legend=None)
    tips = [word_tip("arm"), word_tip("side"), _step_tip(), alt.Tooltip("median:Q", format=".3~g")]
    lines = base.mark_line(strokeWidth=1.6).encode(strokeDash=dash, detail="arm:N")
    return panel(alt.layer(lines, pointed(base, tips)), table.records("step", "arm", "side", "median"))


def against(table: Table, x: str, y: str, frame: Frame, guides: Mapping[str, float] | None = None) -> Spec:
    """y against x, a point per unit, clipped to the frame. On the identity line a unit is undone.

    `guides` are horizontal lines by name, drawn if they lie inside of the frame.
    """
    table = table.where(np.isfinite(table[x]) & np.isfinite(table[y]))
    records = table.records("arm", "seed", "unit", x, y)
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
    between = (label, *guide_lines(inside, y_scale, titles[1]))
    colours = _colours(table.names("arm"))
    return scatter(records, (x, y), titles, (x_scale, y_scale), frame.x, tips, colours, between, clip=False)


def percentiles(table: Table, side: str, arm: str, domain: Domain, title: str) -> Spec:
    """The 15th to 85th percentile of one unit's `side` ("in" or "out") against step, as a band around the median."""
    names = {f"{side}_p15": "low", f"{side}_p50": "median", f"{side}_p85": "high"}
    table = table.where(np.logical_and.reduce([np.isfinite(table[name]) for name in names]))
    records = Table({"step": table["step"], **{new: table[old] for old, new in names.items()}}).records
    scale, axis = y_scale(domain, False), alt.Axis(format=NUMBER, tickCount=5)
    base = _over_steps(table, color=alt.value(style(arm).colour))
    layers = bands(base, title, scale, axis, [_step_tip()], alt.value([1, 0]), opacity=0.22)
    return panel(alt.layer(*layers), records("step", *names.values()))


def legend(entries: Sequence[str]) -> Spec:
    """The arms by name, in a row, for a picture."""
    records: Records = [{"arm": arm, "place": place} for place, arm in enumerate(entries)]
    x = alt.X("place:Q", axis=None, scale=alt.Scale(domain=[-0.1, len(entries)]))
    base = alt.Chart(alt.NamedData(RECORDS)).encode(x=x, color=_colours(list(entries)))
    names = base.mark_text(align="left", dx=10, fontSize=12, color=GUIDE).encode(text="arm:N")
    return {**panel(alt.layer(base.mark_square(size=90), names), records, 16), "width": 90 * len(entries)}


def span(*columns: Array, tails: float = 0.0, pad: float = 0.04) -> Domain:
    """The range of the columns' finite values, without a share `tails` at each end. (0, 1) without values."""
    joined = np.concatenate([column[np.isfinite(column)] for column in columns])
    if joined.size == 0:
        return (0.0, 1.0)
    low, high = (float(value) for value in np.quantile(joined, [tails, 1 - tails]))
    room = pad * (high - low) or max(abs(high), 1.0) * pad
    return (low - room, high + room)


def spread_by_layer(
    layers: Sequence[LayerSpread],
    limits: Domain | None = None,
    log: bool = False,
    guides: Mapping[str, float] | None = None,
) -> Spec | None:
    """Dots and bars of (low, middle, high) per layer; a logarithmic scale shows only positive values."""
    low, middle, high = np.array([spread for *_, spread in layers], np.float64).reshape(-1, 3).T
    if log:
        middle = np.where(middle > 0, middle, np.nan)
        low = np.where(low > 0, low, middle)
    records: Records = [
        {"place": place, "layer": name[:80], "units": units, "low": a, "middle": b, "high": c}
        for place, ((name, units, _), a, b, c) in enumerate(
            zip(layers, *map(rounded, (low, middle, high)), strict=True), 1
        )
        if b is not None
    ]
    if not records:
        return None
    scale = y_scale(limits, log)
    axis = alt.Axis(grid=False, tickMinStep=1, format="d")
    x = alt.X("place:Q", title="layer, input first", axis=axis, scale=alt.Scale(domain=[0.5, len(layers) + 0.5]))
    tips = [alt.Tooltip("layer:N"), alt.Tooltip("units:Q", format=",d")]
    tips += [alt.Tooltip(f"{name}:Q", format=NUMBER) for name in ("low", "middle", "high")]
    base = alt.Chart(alt.NamedData(RECORDS)).encode(x=x, tooltip=tips)
    y_axis = alt.Axis(format=".2~g" if log else NUMBER, tickCount=5, labelOverlap=True)
    from_low, at_middle = (alt.Y(f"{name}:Q", title=None, scale=scale, axis=y_axis) for name in ("low", "middle"))
    bars = base.mark_rule(strokeWidth=3, opacity=0.35, clip=True, color=COLOUR).encode(y=from_low, y2="high:Q")
    dots = base.mark_circle(size=36, opacity=1, clip=True, color=COLOUR).encode(y=at_middle)
    return panel(alt.layer(*guide_lines(guides or {}, scale), bars, dots), records)


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


def _drawable(table: Table, log: bool) -> Table:
    """The rows whose median the scale can show; on a logarithmic one, a `low` that it cannot show is the median."""
    shown = table.where(np.isfinite(table["median"]))
    if not log:
        return shown
    shown = shown.where(shown["median"] > 0)
    return shown.with_column("low", np.where(shown["low"] > 0, shown["low"], shown["median"]))


def _decade_axis(values: ArrayLike) -> alt.Axis:
    logs = np.log10(values)
    powers = range(math.ceil(logs.min()), math.floor(logs.max()) + 1) if logs.size else range(0)
    return alt.Axis(values=[10.0**power for power in powers[:: (len(powers) - 1) // 4 + 1 or 1]], format=".0e")


def _colours(arms: list[str]) -> alt.Color:
    return alt.Color("arm:N", legend=None, scale=alt.Scale(domain=arms, range=[style(arm).colour for arm in arms]))


def _over_steps(table: Table, **channels: Any) -> alt.Chart:
    chart: alt.Chart = alt.Chart(alt.NamedData(RECORDS)).encode(x=step_axis(table["step"].max(initial=0)), **channels)
    return chart


def _step_tip() -> alt.Tooltip:
    return alt.Tooltip("step:Q", format=",d")
