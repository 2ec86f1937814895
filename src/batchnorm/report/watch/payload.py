"""What the page's script reads: every curve and every unit's last values, packed; charts as specifications.

Nothing here is drawn until it is chosen: a map of all layers needs medians only, and one layer's curves are unpacked
when that layer is looked at. Numbers are packed: float32 without its last eight bits of mantissa, three bytes, four
characters. Sign, exponent and 15 bits of mantissa are 4.8 significant digits over the whole range, NaN included;
watch.js unpacks them. A ResNet-50's page holds about a million numbers.

Every run has its colour everywhere, from Okabe and Ito's, chosen to be told apart by colour-blind readers on white and
on black. A line is the median over units, a band the 15th to the 85th percentile; the second of two curves in a chart
is dotted.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray

from batchnorm.report.charts import (
    NUMBER,
    RECORDS,
    Spec,
    bands,
    guide_lines,
    scatter,
    step_axis,
    word_tip,
    y_scale,
)
from batchnorm.report.charts import panel as drawn
from batchnorm.report.watch.numbers import UNIT_COLUMNS, Curve, LayerReading
from batchnorm.report.watch.rows import Summary
from batchnorm.verdict import CLASS_NAMES
from batchnorm.words import shortened

KEPT = np.uint32(0xFFFFFF00)
HALF = np.uint32(0x80)


def pack(values: NDArray[np.float64]) -> str:
    """Row by row. What is not finite becomes NaN."""
    finite = np.where(np.abs(values) < 3e38, values, np.nan).astype("<f4")
    bits = np.ascontiguousarray(finite).view("<u4").ravel()
    rounded = np.where(np.isnan(finite).ravel(), np.uint32(0x7FC00000), (bits + HALF) & KEPT).astype("<u4")
    return base64.b64encode(rounded.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()).decode("ascii")


def unpack(text: str) -> NDArray[np.float64]:
    """What `pack` wrote, in one row."""
    parts = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 3)
    whole = np.zeros((len(parts), 4), np.uint8)
    whole[:, 1:] = parts
    return whole.view("<f4").ravel().astype(np.float64)


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
    base = alt.Chart(alt.NamedData(RECORDS)).encode(
        x=step_axis(last),
        color=_run_colours(labels),
        detail="side:N",
    )
    sides = list(panel.series.values())
    dash = alt.StrokeDash("side:N", legend=None, scale=alt.Scale(domain=sides, range=[[1, 0], [2, 2]][: len(sides)]))
    tips = [word_tip("run"), *([word_tip("side")] if len(sides) > 1 else [])]
    tips += [alt.Tooltip("step:Q", format=",d")]
    layers = bands(base, None, scale, axis, tips, dash, opacity=0.16)
    return drawn(alt.layer(*guide_lines(panel.guides or {}, scale), *layers), [])


def units_scatter(x: str, y: str, labels: Sequence[str]) -> Spec:
    """y against x, a point a unit, with the identity line. The page fits frame and line to the layer's units."""
    frame = alt.Scale(domain=[0, 1], nice=False, zero=False)
    tips = [alt.Tooltip("run:N"), alt.Tooltip("unit:Q"), alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]
    return scatter([], ("x", "y"), (x, y), (frame, frame), (0, 1), tips, _run_colours(labels))


def _run_colours(labels: Sequence[str]) -> alt.Color:
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(labels))]
    return alt.Color("run:N", legend=None, scale=alt.Scale(domain=list(labels), range=colours))


# What the map shows: a curve's name, what it is called, and the scale that its colours are on.
MAPS = (
    ("undo_index", "undo_index (median over units)", "diverging"),
    ("gradient_diverted", "gradient diverted (median over units)", "share"),
    ("dead", "dead units (share)", "share"),
    ("eval_gap", "train/eval gap (median over units)", "decades"),
)
HEADERS = {
    "undo_index": "undo_index",
    "undo_angle": "undo_angle",
    "bare_angle": "bare_angle",
    "input_mean": "mean",
}
SCATTERS = (("s", "gamma"), ("input_mean", "beta"))


def payload(runs: Sequence[Summary], layers: Sequence[str], logged: Sequence[str]) -> dict[str, Any]:
    """JSON values; numbers of layers in `LAYER`'s and `UNIT_COLUMNS`' order, packed."""
    names = [run.label for run in runs]
    last = max((run.reading.last_step or 0 for run in runs), default=0)
    known = {name for run in runs for layer in run.reading.layers for name in layer.curves}
    place = {name: at for at, name in enumerate(layers)}
    drawn = present(LAYER, known)
    return {
        "layers": [{"name": name[:1000], "short": shortened(name, 48)} for name in layers],
        "runs": [_run(run, place) for run in runs],
        "last": last,
        "maps": [{"id": name, "title": title, "scale": scale} for name, title, scale in MAPS if name in known],
        "panels": [
            {
                "id": panel.id,
                "title": panel.title,
                "series": [[name, side] for name, side in panel.series.items()],
                "limits": panel.limits,
                "log": panel.log,
                "spec": spec(panel, names, last),
            }
            for panel in drawn
        ],
        "scatters": [
            {"x": x, "y": y, "title": f"{y} against {HEADERS.get(x, x)}", "spec": units_scatter(x, y, names)}
            for x, y in SCATTERS
        ],
        "classes": [*CLASS_NAMES.values()],
        "logged": _logged(runs, logged, names),
        "columns": [*(["run"] if len(runs) > 1 else []), "unit", *UNIT_COLUMNS],
        "headers": HEADERS,
    }


def _run(run: Summary, place: dict[str, int]) -> dict[str, Any]:
    steps = run.reading.steps
    return {
        "label": run.label,
        "steps": steps.tolist(),
        "layers": {
            place[layer.name]: {
                "units": layer.units,
                "at": layer.at,
                "about": [row.kind, row.producer and f"fed by {row.producer}"],
                "curves": {name: _curve(curve, steps) for name, curve in layer.curves.items()},
                "last": _last(layer),
            }
            for layer, row in zip(run.reading.layers, run.layers, strict=True)
        },
    }


def _curve(curve: Curve, steps: np.ndarray) -> dict[str, Any]:
    packed: dict[str, Any] = {"rows": len(curve.values), "values": pack(curve.values)}
    return (
        packed
        if curve.steps is steps or np.array_equal(curve.steps, steps)
        else packed | {"steps": curve.steps.tolist()}
    )


def _last(layer: LayerReading) -> str | None:
    if layer.at is None:
        return None
    return pack(np.stack([layer.last[name] for name in UNIT_COLUMNS]))


def _logged(runs: Sequence[Summary], logged: Sequence[str], labels: list[str]) -> list[dict[str, Any]]:
    """A chart a name: the mean of each stretch of steps, and the range in it."""
    charts = []
    for name in logged:
        curves = []
        last = 0
        for run in runs:
            scalar = next((each for each in run.reading.scalars if each.name == name), None)
            if scalar is not None:
                steps = scalar.steps.tolist()
                last = max(last, *steps)
                curves.append({"run": run.label, "steps": steps, "rows": 3, "values": pack(scalar.values)})
        panel = Curves("logged", name, {"logged": name})
        charts.append({"title": shortened(name), "curves": curves, "spec": spec(panel, labels, last)})
    return charts
