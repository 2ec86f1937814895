"""The small charts of a layer: which curves each draws, and how. Specifications only; the page fills in a layer's data.

Every run has its colour everywhere, from Okabe and Ito's, chosen to be told apart by colour-blind readers on white and
on black. A line is the median over units, a band the 15th to the 85th percentile; the second of two curves in a chart
is dotted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from batchnorm.report.charts import (
    GUIDE,
    NUMBER,
    RECORDS,
    SQUARE,
    Spec,
    guide_lines,
    pointed,
    step_axis,
    word_tip,
    y_scale,
)
from batchnorm.report.charts import panel as drawn

COLOURS = ("#2f88d0", "#dd6a1f", "#159b76", "#b06fc4", "#c9a100", "#d55e88", "#56a8c9", "#8c8c8c")
PERCENT = "~%"
POWERS = ".2~g"


@dataclass(frozen=True)
class Curves:
    """A chart: `series` are the curves that it draws, by their names in a `LayerReading`, with what they are called.

    `limits` cut off what lies outside; `log` draws positive values only.
    """

    id: str
    title: str
    series: Mapping[str, str]
    form: str = NUMBER
    limits: tuple[float, float] | None = None
    log: bool = False
    guides: Mapping[str, float] | None = None


def _single(name: str, title: str, **options: Any) -> Curves:
    return Curves(name, title, {name: name}, **options)


_SHARE: Mapping[str, Any] = {"form": PERCENT, "limits": (0.0, 1.0)}

LAYER: tuple[Curves, ...] = (
    _single("undo_index", "undo_index", limits=(-2.0, 1.1), guides={"undone": 1.0, "bare": 0.0}),
    Curves("undo_angle", "undo_angle in degrees, and bare_angle dotted", {"undo_angle": "undo", "bare_angle": "bare"},
           guides={"undone": 0.0}),
    Curves("classes", "share of units undone, and away dotted", {"undone": "undone", "away": "away"}, **_SHARE),
    Curves("position", "position: mean/s, and beta/gamma dotted", {"position_in": "in", "position_out": "out"},
           limits=(-5.0, 5.0)),
    _single("gradient_diverted", "gradient diverted", **_SHARE),
    _single("eval_gap", "train/eval gap", log=True, form=POWERS),
    _single("dead", "dead units", **_SHARE),
    Curves("drift_location", "drift of location a step: in, and out dotted",
           {"drift_in_location": "in", "drift_out_location": "out"}, log=True, form=POWERS),
    Curves("drift_scale", "drift of scale a step: in, and out dotted",
           {"drift_in_log_scale": "in", "drift_out_log_scale": "out"}, log=True, form=POWERS),
    _single("effective_lr", "effective learning rate, lr/‖w‖²", log=True, form=POWERS),
    Curves("noise", "batch noise: of the mean, and of log s dotted",
           {"noise_mean": "mean", "noise_log_scale": "log s"}, log=True, form=POWERS),
    Curves("percentiles", "input percentiles 15, 50, 85 (typical unit)", {"percentiles": "x"}),
    Curves("positive", "share above zero: in, and out dotted", {"positive_in": "in", "positive_out": "out"}, **_SHARE),
    _single("linear_share", "share in the activation's linear regime", **_SHARE),
    _single("shift", "covariate shift ‖G − G′‖", log=True, form=POWERS),
    _single("cosine", "cosine between G and G′", limits=(-1.0, 1.0)),
)  # fmt: skip


def present(panels: Sequence[Curves], names: set[str]) -> list[Curves]:
    """The charts that have something to draw in some layer."""
    return [panel for panel in panels if names & panel.series.keys()]


def spec(panel: Curves, labels: Sequence[str], last: int) -> Spec:
    """Vega-Lite over records of step, run, side, low, median and high, up to step `last`."""
    scale = y_scale(panel.limits, panel.log)
    axis = alt.Axis(format=panel.form, tickCount=5, labelOverlap=True)
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(labels))]
    base = alt.Chart(alt.NamedData(RECORDS)).encode(
        x=step_axis(last),
        color=alt.Color("run:N", legend=None, scale=alt.Scale(domain=list(labels), range=colours)),
        detail="side:N",
    )
    sides = list(panel.series.values())
    dash = alt.StrokeDash("side:N", legend=None, scale=alt.Scale(domain=sides, range=[[1, 0], [2, 2]][: len(sides)]))
    tips = [word_tip("run"), *([word_tip("side")] if len(sides) > 1 else [])]
    tips += [alt.Tooltip("step:Q", format=",d")]
    tips += [alt.Tooltip(f"{name}:Q", format=".4~g") for name in ("median", "low", "high")]
    y = alt.Y("median:Q", title=None, scale=scale, axis=axis)
    layers: list[Any] = [
        base.mark_area(opacity=0.16, clip=True).encode(y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"),
        base.mark_line(strokeWidth=1.8, clip=True).encode(y=y, strokeDash=dash),
        pointed(base, tips, y=y),
    ]
    return drawn(alt.layer(*guide_lines(panel.guides or {}, scale), *layers), [])


def scatter(x: str, y: str, labels: Sequence[str]) -> Spec:
    """y against x, a point a unit, with the identity line. The page fits frame and line to the layer's units."""
    frame = alt.Scale(domain=[0, 1], nice=False, zero=False)
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(labels))]
    identity = (
        alt.Chart(alt.InlineData(values=[{"from": 0, "to": 1}]))
        .mark_rule(strokeDash=[4, 3], color=GUIDE, clip=True)
        .encode(x=alt.X("from:Q", scale=frame, title=x), x2="to:Q", y=alt.Y("from:Q", scale=frame, title=y), y2="to:Q")
    )
    axis = alt.Axis(format=NUMBER, tickCount=5)
    tips = [alt.Tooltip("run:N"), alt.Tooltip("unit:Q"), alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]
    points = (
        alt.Chart(alt.NamedData(RECORDS))
        .mark_circle(size=14, opacity=0.5, clip=True)
        .encode(
            x=alt.X("x:Q", title=x, scale=frame, axis=axis),
            y=alt.Y("y:Q", title=y, scale=frame, axis=axis),
            color=alt.Color("run:N", legend=None, scale=alt.Scale(domain=list(labels), range=colours)),
            tooltip=tips,
        )
    )
    return drawn(alt.layer(identity, points), [], SQUARE)
