"""Build a study's page as data, with the text and the charts of its sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import batchnorm.report.charts as charts
from batchnorm.report.definitions import DEFINITIONS
from batchnorm.report.page import Page, Panel, Section, listed, provenance, ran, unfinished, unit_table
from batchnorm.report.study.answer import QUESTION, Answer
from batchnorm.report.study.numbers import Study, last_step
from batchnorm.report.study.terminal import COLUMNS, COLUMNS_NOTE, GRADIENT_NOTE, Row, Summary
from batchnorm.report.tables import Table, Words, rounded
from batchnorm.words import count, listing, plural, quantile

TABLE_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class StudyPage(Page):
    """The page of a study: its answer, a summary of the arms, sections of charts and a table of units."""

    template = "study"
    scripts = ("units",)
    columns = COLUMNS
    note = f"{COLUMNS_NOTE} {GRADIENT_NOTE}"
    style = staticmethod(charts.style)

    answer: Answer
    summary: tuple[Row, ...]
    units: dict[str, Any]

    @property
    def links(self) -> list[tuple[str, str]]:
        return [*((section.id, section.title) for section in self.sections), ("units", "Every unit")]

    def data(self) -> dict[str, Any]:
        return {
            "charts": {panel.id: panel.chart for section in self.sections for panel in section.panels},
            "units": self.units,
        }


UNIT_COLUMNS = (
    "arm", "seed", "layer", "unit", "step", "undo_index", "undo_distance", "class", "undo_angle", "bare_angle", "gamma",
    "s", "beta", "mean", "position_in", "position_out", "positive_in", "positive_out", "gradient_diverted",
    "noise_mean", "noise_log_scale", "linear_share", "dead",
)  # fmt: skip
WORDS = ("arm", "layer", "class")


def build(summary: Summary) -> StudyPage:
    """Build the page of a study."""
    study, answer = summary.study, summary.answer
    info = study.run.info
    facts = {"Run": ran(info, "command", "status", "started", "ended"), "Configuration": info.get("config")}
    return StudyPage(
        title=QUESTION,
        subtitle=_subtitle(study),
        notices=_notices(study),
        lead=answer.lead,
        headline=answer.headline,
        parts=answer.parts,
        answer=answer,
        summary=summary.rows,
        sections=sections(study),
        units=_units(study),
        definitions=DEFINITIONS,
        provenance=provenance(info, facts),
    )


def _subtitle(study: Study) -> str:
    config = {**dict.fromkeys(("inputs", "classes", "act", "batch", "lr"), "?"), "data": "unknown data", **study.config}
    widths = "-".join(str(width) for width in listed(config.get("hidden"))) or "?"
    return (
        f"{config['data']}: {config['inputs']}-{widths}-{config['classes']} {config['act']} network, batches of "
        f"{config['batch']}, learning rate {config['lr']}, {count(study.planned('steps', math.nan))} steps, "
        f"{plural(len(listed(config.get('seeds'))), 'seed')}"
    )


def _notices(study: Study) -> tuple[str, ...]:
    last = study.curves["step"].max() if len(study.curves) else math.nan
    reached = f"step {count(float(last))}" if last == last else "no step"
    notices = unfinished("This Run", str(study.run.info.get("status")), reached)
    if study.diverged:
        diverged = listing(f"{arm} (seed {seed}, step {count(step)})" for seed, arm, step in study.diverged)
        notices.append(f"Diverged, and not part of the answer's numbers: {diverged}.")
    return tuple(notices)


def _units(study: Study) -> dict[str, Any]:
    """The units at the last step of each arm and seed, learned gamma and beta first."""
    parts = [
        last_step(study.units.rows(arm=arm, seed=seed))
        for arm in sorted(study.arms, key=lambda arm: arm not in LEARNING)
        for seed in np.unique(study.units["seed"]).tolist()
    ]
    joined = Table.stack(parts)
    words = {name: joined.words.get(name, Words(np.zeros(len(joined), np.int64), [""])) for name in WORDS}
    values = {
        name: words[name].codes.tolist() if name in WORDS else rounded(joined[name], TABLE_DIGITS)
        for name in UNIT_COLUMNS
    }
    return unit_table(values, {name: column.names for name, column in words.items()})


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
    return (Panel(name, title, words, charts.curves(table, axis, **options)),) if known else ()


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


def from_zero(table: Table, *others: float) -> charts.Domain:
    high = np.array([*table["high"], *others])
    return (0.0, float(high[np.isfinite(high)].max(initial=0.0)) * 1.08 or 1.0)


OUTLYING = 0.002
OUTLYING_POSITIONS = 0.04
PER_LAYER_NOTE = "Lines are medians over seeds of the median over a layer's units; bands are the range over seeds."


Panels = tuple[Sequence[Panel], str]
"""The panels of a section, and the note below them."""


def sections(study: Study) -> tuple[Section, ...]:
    """All sections in order; a section without data has no panels."""
    arms = tuple(study.arms)
    every: tuple[tuple[Callable[[Study], Panels], str, str, tuple[str, ...], dict[str, Any]], ...] = (
        (accuracy, "accuracy", "Four ways to train the same network", arms, {"columns": 2}),
        (undo, "undo", "Do gamma and beta go back to the identity?", LEARNING, {}),
        (gamma_beta, "gamma-beta", "Unit by unit: gamma against s, beta against mean", LEARNING, {"dashed": False}),
        (angle, "angle", "Free of the weights' scale: the angle", NORMALIZED, {}),
        (optimal, "optimal", "Where undoing is the right answer", (), {}),
        (percentiles, "percentiles", "The input of one activation over training", arms, {"columns": 4}),
        (gradient, "gradient", "What undoing cannot restore: the gradient", NORMALIZED, {}),
        (drift, "drift", "Drift: is the output more stable than the input?", arms, {"dashed": False}),
        (noise, "noise", "What constants cannot undo: the noise of a batch", NORMALIZED, {}),
        (activation, "activation", "Where the data meets the activation", arms, {}),
    )
    return tuple(Section(name, title, *make(study), legend, **options) for make, name, title, legend, options in every)


def accuracy(study: Study) -> Panels:
    """Held-out accuracy and loss against step."""

    def panels(column: str, **options: Any) -> tuple[Panel, ...]:
        title = f"Held-out {column}"
        spreads = study.curves.spreads(column, ("arm", "step"))
        words = f"{title} against step, by arm."
        return curve_panels(spreads, column, title, words, f"held-out {column}", **options)

    note = "Lines are medians over seeds, bands their range. Steps are on a logarithmic scale, with step 0 at the left."
    return (*panels("accuracy", domain=(0.0, 1.0), form="~%"), *panels("loss")), note


def undo(study: Study) -> Panels:
    """undo_index against step, per layer."""
    table = per_layer(study, "undo_index", LEARNING)
    low = table["low"][np.isfinite(table["low"])]
    domain = (max(float(low.min(initial=-0.2)), -1.5) - 0.05, 1.15)
    sampling = ""  # why a network that is set to undo can start slightly below 1
    probe, train = study.planned("probe", math.nan), study.planned("train", math.nan)
    if probe < train:
        sampling = (
            f" mean and s come from a probe of {count(probe)} training rows; undone was set on all {count(train)}, so "
            "it starts at 1 up to the probe's sampling noise."
        )
    panels = layer_panels(table, "undo_index", "undo", domain=domain, guides={"undone": 1.0, "bare": 0.0})
    return panels, f"{PER_LAYER_NOTE} Values below -1.5 are cut off.{sampling}"


def gamma_beta(study: Study) -> Panels:
    """gamma against s and beta against mean at the last step, per layer."""
    ends = joined(study, LEARNING)
    panels = []
    outside = 0
    for x, y, bare in (("s", "gamma", 1.0), ("mean", "beta", 0.0)):
        for place, layer in enumerate(ends.names("layer")):
            units = ends.rows(layer=layer)
            frame = charts.frame(units[x], units[y], OUTLYING)
            outside += _outside(units, x, y, frame)
            words = f"{y} against {x}, a point for each unit of {layer} at the last step."
            chart = charts.against(units, x, y, frame, {"bare": bare})
            panels.append(Panel(f"{y}-{place}", f"{layer}: {y} against {x}", words, chart))
    return panels, f"All seeds. {count(outside)} outlying units lie outside the frames." if outside else "All seeds."


def angle(study: Study) -> Panels:
    table = per_layer(study, "undo_angle", NORMALIZED)
    options: Any = {"domain": from_zero(table, 10.0), "guides": {"undone": 0.0}, "axis": "undo_angle, degrees"}
    return layer_panels(table, "undo_angle", "angle", **options), PER_LAYER_NOTE


def optimal(study: Study) -> Panels:
    """gamma against s, beta against mean and undo_index, where undoing is optimal."""
    ends = last_step(study.optimal).labelled("arm", "optimal")
    panels: list[Panel] = []
    for x, y in (("s", "gamma"), ("mean", "beta")):
        if (np.isfinite(ends[x]) & np.isfinite(ends[y])).any():
            chart = charts.against(ends, x, y, charts.frame(ends[x], ends[y]))
            words = f"{y} against {x} where undoing is optimal, a point for each unit at the last step."
            panels.append(Panel(f"optimal-{y}", f"{y} against {x}", words, chart))
    index = study.optimal.medians("undo_index", ("seed", "step")).spreads("undo_index", ("step",))
    low = index["low"][np.isfinite(index["low"])].min(initial=0.0)
    domain, guides = (max(float(low), -1.5) - 0.05, 1.15), {"undone": 1.0, "bare": 0.0}
    words = "undo_index against step where undoing is optimal."
    index = index.labelled("arm", "optimal")
    panels += curve_panels(index, "optimal-index", "undo_index", words, "undo_index", domain=domain, guides=guides)
    return panels, ""


def percentiles(study: Study) -> Panels:
    """Percentiles of one typical unit's output and input against step, per arm."""
    typical = _typical_unit(study)
    if typical is None:
        return (), ""
    panels: list[Panel] = []
    seed, layer, unit = typical
    rows = {arm: study.units.rows(arm=arm, layer=layer, seed=seed, unit=unit) for arm in study.arms}
    normalized = [arm for arm in study.arms if arm != "none"]
    for side, arms, label in (("out", study.arms, "into the activation"), ("in", normalized, "before normalization")):
        columns = [rows[arm][f"{side}_p{p}"] for arm in arms for p in (15, 85)]
        domain = charts.span(*columns) if columns else (0.0, 1.0)
        for arm in arms:
            if np.isfinite(rows[arm][f"{side}_p50"]).any():
                chart = charts.percentiles(rows[arm], side, arm, domain, label)
                words = f"15th, 50th and 85th percentile against step, {label}, in the arm {arm}."
                panels.append(Panel(f"percentiles-{side}-{arm}", f"{arm}: {label}", words, chart))
    return panels, (
        f"Unit {unit:.0f} of {layer}, seed {seed:.0f}: the unit closest to its layer's median and width at the end, "
        "over all arms. Each row has one vertical scale."
    )


def gradient(study: Study) -> Panels:
    table = per_layer(study, "gradient_diverted", NORMALIZED)
    panels = layer_panels(table, "gradient diverted", "gradient", domain=from_zero(table), form="~%")
    return panels, PER_LAYER_NOTE


def drift(study: Study) -> Panels:
    """Drift of location and scale per step against step, per layer."""
    panels = []
    by = ("layer", "arm", "step")
    for name in ("location", "log_scale"):
        title = name.replace("_", " ")
        sides = []
        for side in ("in", "out"):
            column = f"drift_{side}_{name}"
            sides.append(study.units.medians(column, (*by, "seed")).spreads(column, by).labelled("side", side))
        both = Table.stack(sides)
        both = both.where(np.isfinite(both["median"]) & (both["median"] > 0))
        for place, layer in enumerate(study.units.names("layer")):
            rows = both.rows(layer=layer)
            if len(rows):
                words = f"Drift of the {title} per step in {layer}, input and output, by arm."
                chart = charts.drift(rows, f"drift of {title} per step")
                panels.append(Panel(f"drift-{name}-{place}", f"{layer}: {title}", words, chart))
    return panels, "Solid: input. Dotted: output. Medians over the units of a layer and over seeds."


def noise(study: Study) -> Panels:
    """Batch noise of the mean and of log s against step, per layer."""
    batch = study.planned("batch", math.nan)
    mean, log_s = (per_layer(study, column, NORMALIZED) for column in ("noise_mean", "noise_log_scale"))
    mean = mean.where(mean["median"] > 0)
    panels: list[Panel] = []
    for table, title, guide, log in ((mean, "mean", 1 / batch, True), (log_s, "log s", 1 / (2 * batch), False)):
        panels += layer_panels(
            table,
            f"Variance over batches of the {title}",
            f"noise-{title.replace(' ', '-')}",
            heading=title,
            axis=f"variance of the {title}",
            domain=charts.decades(table["median"], guide) if log else from_zero(table, guide),
            guides={"of independent values": guide} if guide == guide else None,
            log=log,
        )
    return panels, f"{PER_LAYER_NOTE} The scale of the mean's noise is logarithmic."


def activation(study: Study) -> Panels:
    """Linear share and dead units against step, and position out against position in."""
    units, by = study.units, ("arm", "seed", "step")
    linear = units.medians("linear_share", by).spreads("linear_share", by[::2])
    dead = units.means("dead", by).spreads("dead", by[::2])
    panels: list[Panel] = []
    for table, name, title, axis, domain in (
        (linear, "linear", "linear share", "linear share", (0.0, 1.0)),
        (dead, "dead", "dead units", "share of dead units", from_zero(dead)),
    ):
        words = f"{axis.capitalize()} against step, by arm."
        panels += curve_panels(table, name, title, words, axis, form="~%", domain=domain)
    ends = joined(study, LEARNING)
    if (np.isfinite(ends["position_in"]) & np.isfinite(ends["position_out"])).any():
        frame = charts.frame(ends["position_in"], ends["position_out"], OUTLYING_POSITIONS)
        title = "position out against position in"
        words = f"{title.capitalize()}, a point for each unit at the last step."
        panels.append(Panel("position", title, words, charts.against(ends, "position_in", "position_out", frame)))
    return panels, "Linear share: median over all units. Dead units: their share. Bands are the range over seeds."


def _outside(units: Table, x: str, y: str, frame: charts.Frame) -> int:
    finite = units.where(np.isfinite(units[x]) & np.isfinite(units[y]))
    off = [(finite[name] < low) | (finite[name] > high) for name, (low, high) in ((x, frame.x), (y, frame.y))]
    return int(np.logical_or(*off).sum())


def _typical_unit(study: Study) -> tuple[float, str, float] | None:
    """The first seed, the last layer, and the unit closest to the layer's median and width at the end.

    Distances are in units of the layer's scatter, summed over the arms.
    """
    layers, seeds = study.units.names("layer"), study.units["seed"]
    if not layers or not len(seeds):
        return None
    seed = float(seeds.min())
    last = study.units.rows(layer=layers[-1], seed=seed)
    units = np.unique(last["unit"])
    distance, measured = np.zeros(len(units)), np.zeros(len(units))
    for arm in study.arms:
        end = last_step(last.rows(arm=arm))
        place = np.searchsorted(units, end["unit"])
        with np.errstate(invalid="ignore"):  # infinite percentiles of a diverging network
            for values in (end["out_p50"], end["out_p85"] - end["out_p15"]):
                off = np.abs(values - quantile(values))
                known = np.isfinite(off)
                distance[place[known]] += off[known] / (quantile(off) or 1.0)
                measured[place[known]] += 1
    if not measured.any():
        return None
    distance[measured < measured.max()] = np.inf
    return seed, layers[-1], float(units[np.argmin(distance)])
