"""The charts of a check-up: each layer's numbers from the input up, and every unit's gamma against s."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from batchnorm.checks.explain import Row
from batchnorm.checks.findings import Observed
from batchnorm.report.charts import (
    GUIDE,
    NUMBER,
    SQUARE,
    Records,
    Spec,
    guide_lines,
    panel,
    y_scale,
)
from batchnorm.report.study.panels import Panel
from batchnorm.report.tables import Value

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
    frame = alt.Scale(domain=[plain(low - margin), plain(high + margin)], nice=False, zero=False)
    diagonal = (
        alt.Chart(alt.InlineData(values=[{"from": low - margin, "to": high + margin}]))
        .mark_rule(strokeDash=[4, 3], color=GUIDE, clip=True)
        .encode(x=alt.X("from:Q", scale=frame, title=x), x2="to:Q", y=alt.Y("from:Q", scale=frame, title=y), y2="to:Q")
    )
    axis = alt.Axis(format=NUMBER, tickCount=5)
    tips = [alt.Tooltip("layer:N"), alt.Tooltip("unit:Q"), alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]
    dots = (
        alt.Chart(alt.NamedData("records"))
        .mark_circle(size=14, opacity=0.5, clip=True, color=COLOUR)
        .encode(
            x=alt.X("x:Q", title=x, scale=frame, axis=axis),
            y=alt.Y("y:Q", title=y, scale=frame, axis=axis),
            tooltip=tips,
        )
    )
    return panel(alt.layer(diagonal, dots), records, SQUARE)
