"""Build the page of watched trainings as data, with the data of its scripts.

A layer's curves are unpacked and drawn when it is selected; the map of all layers needs medians only. Numbers are
packed as float32 without the last eight bits of mantissa (three bytes, four characters, 4.8 significant digits), which
watch.js unpacks. A ResNet-50's page has about a million numbers.

Each run has one colour everywhere, from Okabe and Ito's, which colour-blind readers can distinguish on white and on
black. A line is the median over units, a band the 15th to the 85th percentile; the second curve of a chart is dotted.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray

import batchnorm.report.page as pages
from batchnorm.report.charts import NUMBER, RECORDS, Spec, bands, guide_lines, scatter, step_axis, word_tip, y_scale
from batchnorm.report.charts import panel as drawn
from batchnorm.report.definitions import OF_TRAINING
from batchnorm.report.page import Bar, BarGroup, Entry, Facts, Group, Lead, Page, header, listed
from batchnorm.report.watch.answer import QUESTION, RUN_COLUMNS, Summary
from batchnorm.report.watch.numbers import COLUMNS, TEXTS, UNIT_COLUMNS, Curve
from batchnorm.words import CLASS_NAMES, SENTENCES, ClassCounts, count, plural, share, shortened

STEPS: Mapping[str, str] = {"optimizer": "a step() of the optimizer", "forwards": "a forward pass in training mode"}


@dataclass(frozen=True, kw_only=True)
class WatchPage(Page):
    """The page of one or several watched trainings. `layers` has the names of the layers of all runs."""

    template = "watch"
    scripts = ("heatmap", "watch")
    run_columns = RUN_COLUMNS
    layer_columns = COLUMNS
    text_columns = TEXTS
    links = (
        ("findings", "Findings"),
        ("map", "All layers over time"),
        ("layer", "One layer"),
        ("logged", "Logged values"),
    )

    runs: tuple[Summary, ...]
    layers: tuple[str, ...]
    findings: tuple[Group, ...]

    @staticmethod
    def colour(place: int) -> str:
        return COLOURS[place % len(COLOURS)]

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    @property
    def logged(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for run in self.runs for name in run.logged))

    def data(self) -> dict[str, Any]:
        names = [run.label for run in self.runs]
        last = max((run.reading.last_step or 0 for run in self.runs), default=0)
        known = {name for run in self.runs for layer in run.reading.layers for name in layer.curves}
        place = {name: at for at, name in enumerate(self.layers)}
        return {
            "layers": [{"name": name[:1000], "short": shortened(name, 48)} for name in self.layers],
            "runs": [_run(run, place) for run in self.runs],
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
                for panel in LAYER
                if known & panel.series.keys()
            ],
            "scatters": [
                {"x": x, "y": y, "title": f"{y} against {_header(x)}", "spec": units_scatter(x, y, names)}
                for x, y in SCATTERS
            ],
            "classes": [*CLASS_NAMES.values()],
            "logged": _logged(self.runs, self.logged, names),
            "columns": {name: _header(name) for name in (*["run"][: self.several], "unit", *UNIT_COLUMNS)},
        }


def build(runs: Sequence[Summary]) -> WatchPage:
    """The page of one or several watched Runs, also of incomplete ones."""
    layers = tuple(dict.fromkeys(layer.name for run in runs for layer in run.reading.layers))
    place = {name: at for at, name in enumerate(layers)}
    several = len(runs) > 1
    lead, headline = _together(runs) if several else (runs[0].lead, runs[0].headline)
    return WatchPage(
        title=QUESTION,
        subtitle=_subtitle(runs),
        notices=tuple(notice for run in runs for notice in _notices(run, several)),
        lead=lead,
        headline=headline,
        parts=() if several else runs[0].parts,
        runs=tuple(runs),
        layers=layers,
        findings=pages.groups(
            Entry(item, run.label, place[item.layer]) for run in runs for item in run.reading.findings
        ),
        definitions=OF_TRAINING,
        provenance=tuple(facts for run in runs for facts in _provenance(run, several)),
    )


def _together(runs: Sequence[Summary]) -> tuple[Lead, str]:
    """The common answer of several runs, or that they differ, with a bar per run; and the headline."""
    verdicts = {run.verdict for run in runs}
    if len(verdicts) == 1:
        every = "both" if len(runs) == 2 else f"all {count(len(runs))}"
        word, headline = runs[0].lead.word, f"In {every} runs {SENTENCES[runs[0].verdict]}."
    else:
        answers = "; ".join(f"in {run.label} {SENTENCES[run.verdict]}" for run in runs)
        word, headline = "The runs differ", f"The runs differ: {answers}."
    classes = ClassCounts.total_of(run.classes for run in runs)
    bars = tuple(Bar(run.label, run.classes) for run in runs)
    label = f"of {plural(classes.units, 'unit')} in {plural(len(runs), 'run')} are undone"
    return Lead(QUESTION, word, share(classes.share("undone")), label, (BarGroup("", bars),)), headline


def _subtitle(runs: Sequence[Summary]) -> str:
    if len(runs) > 1:
        return f"{count(len(runs))} watched trainings: {', '.join(shortened(run.label, 30) for run in runs[:6])}"
    (run,) = runs
    reading = run.reading
    model = shortened(str(reading.run.info.get("model", "a network")))
    units = plural(sum(layer.units for layer in reading.layers), "unit")
    last = "no step yet" if reading.last_step is None else f"to step {count(reading.last_step)}"
    snapshots = count(len(reading.steps))
    return f"{run.label}: {model}, {plural(len(reading.layers), 'layer')}, {units}, {last} in {snapshots} snapshots"


def _notices(run: Summary, several: bool) -> list[str]:
    info, reading = run.reading.run.info, run.reading
    reached = "no step" if reading.last_step is None else f"step {count(reading.last_step)}"
    head = f"{run.label}: " if several else ""
    notices = pages.unfinished(f"{head}The training", reading.status, reached)
    errors = listed(info.get("errors"))
    notices += [f"{head}While recording: {shortened(str(error), 300)}" for error in errors[:5]]
    if len(errors) > 5:
        notices.append(f"{head}and {count(len(errors) - 5)} more errors while recording, in run.json.")
    skipped = listed(info.get("skipped"))
    if skipped:
        were = plural(len(skipped), "batch norm layer was", "batch norm layers were")
        notices.append(f"{head}{were} not watched: see the end of the page for the reason.")
    return notices


def _provenance(run: Summary, several: bool) -> list[Facts]:
    info = run.reading.run.info
    recording = {
        "schedule": info.get("schedule"),
        "snapshots": count(len(run.reading.steps)),
        "a step is": STEPS.get(str(info.get("counted")), "not known yet"),
        "steps counted": info.get("steps"),
        "processes": info.get("processes"),
        "errors": len(listed(info.get("errors"))) or None,
    }
    skipped = {
        shortened(str(entry.get("name")), 120): f"{entry.get('class')}: {entry.get('why')}"
        for entry in listed(info.get("skipped"))
        if isinstance(entry, Mapping)
    }
    training = pages.ran(info, "model", "status", "started", "ended")
    groups = {"Training": training, "Recording": recording, "Not watched": skipped}
    head = f"{run.label}: " if several else ""
    return [Facts(f"{head}{facts.title}", facts.entries) for facts in pages.provenance(info, groups)]


def pack(values: NDArray[np.float64]) -> str:
    """Pack row by row as base64 of three bytes per number; values that are not finite become NaN."""
    finite = np.where(np.abs(values) < 3e38, values, np.nan).astype("<f4")
    bits = (np.ascontiguousarray(finite).view("<u4").ravel() + np.uint32(0x80)) & np.uint32(0xFFFFFF00)
    rounded = np.where(np.isnan(finite).ravel(), np.uint32(0x7FC00000), bits).astype("<u4")
    return base64.b64encode(rounded.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()).decode("ascii")


COLOURS = ("#2f88d0", "#dd6a1f", "#159b76", "#b06fc4", "#c9a100", "#d55e88", "#56a8c9", "#8c8c8c")


@dataclass(frozen=True)
class Curves:
    """A chart. `names` maps curves of a `LayerReading` to their labels; by default the curve named `id`.

    `limits` bound the vertical axis; `log` makes it logarithmic, for positive values.
    """

    id: str
    title: str
    names: Mapping[str, str] = field(default_factory=dict)
    form: str = NUMBER
    limits: tuple[float, float] | None = None
    log: bool = False
    guides: Mapping[str, float] = field(default_factory=dict)

    @property
    def series(self) -> Mapping[str, str]:
        return self.names or {self.id: self.id}


_POWERS: Mapping[str, Any] = {"log": True, "form": ".2~g"}
_SHARE: Mapping[str, Any] = {"form": "~%", "limits": (0.0, 1.0)}

LAYER: tuple[Curves, ...] = (
    Curves("undo_index", "undo_index", limits=(-2.0, 1.1), guides={"undone": 1.0, "bare": 0.0}),
    Curves("undo_angle", "undo_angle in degrees (bare_angle dotted)", {"undo_angle": "undo", "bare_angle": "bare"},
           guides={"undone": 0.0}),
    Curves("classes", "share of undone units (away dotted)", {"undone": "undone", "away": "away"}, **_SHARE),
    Curves("position", "position: mean/s (beta/gamma dotted)", {"position_in": "in", "position_out": "out"},
           limits=(-5.0, 5.0)),
    Curves("gradient_diverted", "gradient diverted", **_SHARE),
    Curves("eval_gap", "train/eval gap", **_POWERS),
    Curves("dead", "dead units", **_SHARE),
    Curves("drift_location", "drift of the mean per step (input solid, output dotted)",
           {"drift_in_location": "in", "drift_out_location": "out"}, **_POWERS),
    Curves("drift_scale", "drift of the scale per step (input solid, output dotted)",
           {"drift_in_log_scale": "in", "drift_out_log_scale": "out"}, **_POWERS),
    Curves("effective_lr", "effective learning rate, lr/‖w‖²", **_POWERS),
    Curves("noise", "batch noise of the mean (of log s dotted)",
           {"noise_mean": "mean", "noise_log_scale": "log s"}, **_POWERS),
    Curves("percentiles", "input percentiles 15, 50, 85 (typical unit)", {"percentiles": "x"}),
    Curves("positive", "share above zero (output dotted)", {"positive_in": "in", "positive_out": "out"}, **_SHARE),
    Curves("linear_share", "share in the activation's linear regime", **_SHARE),
    Curves("shift", "covariate shift ‖G − G′‖", **_POWERS),
    Curves("cosine", "cosine between G and G′", limits=(-1.0, 1.0)),
)  # fmt: skip


def spec(panel: Curves, labels: Sequence[str], last: int) -> Spec:
    """Vega-Lite for records of step, run, side, low, median and high, up to step `last`."""
    scale = y_scale(panel.limits, panel.log)
    axis = alt.Axis(format=panel.form, tickCount=5, labelOverlap=True)
    base = alt.Chart(alt.NamedData(RECORDS)).encode(x=step_axis(last), color=_run_colours(labels), detail="side:N")
    sides = list(panel.series.values())
    dash = alt.StrokeDash("side:N", legend=None, scale=alt.Scale(domain=sides, range=[[1, 0], [2, 2]][: len(sides)]))
    tips = [word_tip("run"), *([word_tip("side")] if len(sides) > 1 else [])]
    tips += [alt.Tooltip("step:Q", format=",d")]
    layers = bands(base, None, scale, axis, tips, dash, opacity=0.16)
    return drawn(alt.layer(*guide_lines(panel.guides, scale), *layers), [])


def units_scatter(x: str, y: str, labels: Sequence[str]) -> Spec:
    """y against x, a point per unit, with the identity line. The page fits frame and line to the layer's units."""
    frame = alt.Scale(domain=[0, 1], nice=False, zero=False)
    tips = [alt.Tooltip("run:N"), alt.Tooltip("unit:Q"), alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=y)]
    return scatter([], ("x", "y"), (x, y), (frame, frame), (0, 1), tips, _run_colours(labels))


def _run_colours(labels: Sequence[str]) -> alt.Color:
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(labels))]
    return alt.Color("run:N", legend=None, scale=alt.Scale(domain=list(labels), range=colours))


# The quantities of the map: a curve, its title, and the colour scale.
MAPS = (
    ("undo_index", "undo_index (median over units)", "diverging"),
    ("gradient_diverted", "gradient diverted (median over units)", "share"),
    ("dead", "dead units (share)", "share"),
    ("eval_gap", "train/eval gap (median over units)", "decades"),
)
SCATTERS = (("s", "gamma"), ("input_mean", "beta"))


def _header(column: str) -> str:
    return "mean" if column == "input_mean" else header(column)


def _run(run: Summary, place: dict[str, int]) -> dict[str, Any]:
    steps = run.reading.steps
    return {
        "label": run.label,
        "steps": steps.tolist(),
        "layers": {
            place[layer.name]: {
                "units": layer.units,
                "at": layer.step,
                "about": [layer.kind, layer.producer and f"fed by {layer.producer}"],
                "curves": {name: _curve(curve, steps) for name, curve in layer.curves.items()},
                "last": None if layer.step is None else pack(np.stack([layer.last[name] for name in UNIT_COLUMNS])),
            }
            for layer in run.reading.layers
        },
    }


def _curve(curve: Curve, steps: np.ndarray) -> dict[str, Any]:
    different = {} if np.array_equal(curve.steps, steps) else {"steps": curve.steps.tolist()}
    return {"rows": len(curve.values), "values": pack(curve.values), **different}


def _logged(runs: Sequence[Summary], logged: Sequence[str], labels: list[str]) -> list[dict[str, Any]]:
    charts = []
    for name in logged:
        curves = [
            {"run": run.label, "steps": scalar.steps.tolist(), "rows": 3, "values": pack(scalar.values)}
            for run in runs
            for scalar in run.reading.scalars
            if scalar.name == name
        ]
        last = max(max(curve["steps"]) for curve in curves)
        panel = spec(Curves("logged", name, {"logged": name}), labels, max(last, 0))
        charts.append({"title": shortened(name), "curves": curves, "spec": panel})
    return charts
