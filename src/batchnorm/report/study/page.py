"""A study's Run -> the page as data: what it says and shows, before any HTML. Tests assert on this."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.report.charts import NUMBER
from batchnorm.report.definitions import DEFINITIONS
from batchnorm.report.page import Page, Panel, Section, provenance, ran
from batchnorm.report.study import charts, dynamics
from batchnorm.report.study.answer import QUESTION, Answer
from batchnorm.report.study.charts import (
    LEARNING,
    NORMALIZED,
    Frame,
    from_zero,
    joined,
    layer_panels,
    per_layer,
    some,
)
from batchnorm.report.study.numbers import Study, last_step
from batchnorm.report.study.terminal import COLUMNS, COLUMNS_NOTE, GRADIENT_NOTE, Row, Summary
from batchnorm.report.tables import Table, rounded
from batchnorm.words import count, listing

OUTLYING = 0.002
TABLE_DIGITS = 4


@dataclass(frozen=True)
class Column:
    """A column of the unit table: the name in the Run, what its header says, and whether it holds numbers."""

    name: str
    header: str
    numeric: bool = True


@dataclass(frozen=True)
class UnitTable:
    """Every unit at the last step of its arm and seed, column by column; words are codes into `names`."""

    columns: tuple[Column, ...]
    values: dict[str, list[float | int | None]]
    names: dict[str, list[str]]

    def __len__(self) -> int:
        return len(next(iter(self.values.values()), []))

    def data(self) -> dict[str, Any]:
        """For the page's script."""
        columns = [{"name": each.name, "header": each.header, "numeric": each.numeric} for each in self.columns]
        return {"columns": columns, "values": self.values, "names": self.names}


@dataclass(frozen=True, kw_only=True)
class StudyPage(Page):
    """A study's page."""

    template = "study"
    scripts = ("units",)
    columns = COLUMNS
    note = f"{COLUMNS_NOTE} {GRADIENT_NOTE}"
    style = staticmethod(charts.style)

    answer: Answer
    summary: tuple[Row, ...]
    units: UnitTable

    @property
    def links(self) -> list[tuple[str, str]]:
        return [*((section.id, section.title) for section in self.sections), ("units", "Every unit")]

    def data(self) -> dict[str, Any]:
        return {
            "charts": {panel.id: panel.chart for section in self.sections for panel in section.panels},
            "units": self.units.data(),
        }


UNIT_COLUMNS = (
    Column("arm", "arm", numeric=False),
    Column("seed", "seed"),
    Column("layer", "layer", numeric=False),
    Column("unit", "unit"),
    Column("step", "step"),
    Column("undo_index", "undo_index"),
    Column("undo_distance", "undo_distance"),
    Column("class", "class", numeric=False),
    Column("undo_angle", "undo_angle"),
    Column("bare_angle", "bare_angle"),
    Column("gamma", "gamma"),
    Column("s", "s"),
    Column("beta", "beta"),
    Column("mean", "mean"),
    Column("position_in", "position in"),
    Column("position_out", "position out"),
    Column("positive_in", "positive in"),
    Column("positive_out", "positive out"),
    Column("gradient_diverted", "gradient diverted"),
    Column("noise_mean", "noise, mean"),
    Column("noise_log_scale", "noise, log scale"),
    Column("linear_share", "linear share"),
    Column("dead", "dead"),
)


def build(summary: Summary) -> StudyPage:
    """The page of a study, whatever of it there is."""
    study, found = summary.study, summary.answer
    info = study.run.info
    done = {"Run": ran(info, "command", "status", "started", "ended"), "Configuration": info.get("config")}
    return StudyPage(
        title=QUESTION,
        subtitle=_subtitle(study),
        notices=_notices(study),
        lead=found.lead,
        headline=found.headline,
        parts=found.parts,
        answer=found,
        summary=summary.rows,
        sections=tuple(_sections(study)),
        units=_units(study),
        definitions=DEFINITIONS,
        provenance=provenance(info, done),
    )


def _subtitle(study: Study) -> str:
    config = {
        "data": "unknown data",
        "inputs": "?",
        "classes": "?",
        "act": "?",
        "batch": "?",
        "lr": "?",
        **study.config,
    }
    widths = "-".join(str(width) for width in _listed(config.get("hidden"))) or "?"
    seeds = len(_listed(config.get("seeds")))
    return (
        f"{config['data']}: {config['inputs']}-{widths}-{config['classes']} {config['act']} network, batches of "
        f"{config['batch']}, learning rate {config['lr']}, {count(study.planned('steps', math.nan))} steps, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _notices(study: Study) -> tuple[str, ...]:
    status = study.run.info.get("status")
    last = study.curves["step"].max() if len(study.curves) else math.nan
    reached = f"step {count(float(last))}" if last == last else "no step"
    notices = []
    if status == "interrupted":
        notices.append(f"This Run was interrupted: it got to {reached}. What follows is about what was measured.")
    elif status == "running":
        notices.append(f"This Run has not ended, or was killed: it got to {reached}.")
    elif status == "failed":
        notices.append(f"This Run failed: it got to {reached}. What follows is about what was measured.")
    if study.diverged:
        lost = listing(f"{arm} (seed {seed}, step {count(step)})" for seed, arm, step in study.diverged)
        notices.append(f"Diverged, and left out of the answer's numbers: {lost}.")
    return tuple(notices)


def _units(study: Study) -> UnitTable:
    """The last step of each arm and seed: a seed that was cut short is listed where it stopped. The arms that learn
    gamma and beta come first."""
    parts = [
        last_step(study.units.rows(arm=arm, seed=seed))
        for arm in sorted(study.arms, key=lambda arm: arm not in LEARNING)
        for seed in np.unique(study.units["seed"]).tolist()
    ]
    parts = [part for part in parts if len(part)]
    values: dict[str, list[float | int | None]] = {}
    names: dict[str, list[str]] = {}
    for column in UNIT_COLUMNS:
        if column.numeric:
            joined = np.concatenate([part[column.name] for part in parts]) if parts else np.zeros(0)
            values[column.name] = rounded(joined, TABLE_DIGITS)
        else:
            names[column.name] = _all_names(study.units, column.name)
            codes = [part.words[column.name].codes for part in parts if column.name in part.words]
            values[column.name] = np.concatenate(codes).tolist() if codes else [0] * sum(map(len, parts))
    return UnitTable(UNIT_COLUMNS, values, names)


def _all_names(table: Table, column: str) -> list[str]:
    return table.words[column].names if column in table.words else [""]


def _sections(study: Study) -> list[Section]:
    """All sections, in the order of the page; one that has nothing to show has no panels."""
    return [
        _accuracy(study),
        _undo(study),
        _gamma_beta(study),
        _angle(study),
        _optimal(study),
        dynamics.percentiles(study),
        dynamics.gradient(study),
        dynamics.drift(study),
        dynamics.noise(study),
        dynamics.activation(study),
    ]


def _accuracy(study: Study) -> Section:
    panels = []
    for column, domain, form in (("accuracy", (0.0, 1.0), "~%"), ("loss", None, NUMBER)):
        spread = study.curves.spreads(column, ("arm", "step"))
        if some(spread):
            chart = charts.curves(spread, f"held-out {column}", domain=domain, form=form)
            panels.append(Panel(column, f"Held-out {column}", f"Held-out {column} against step, by arm.", chart))
    return Section(
        "accuracy",
        "Four ways to train the same network",
        (
            "The same network, from the same weights, on the same batches, four times: without batch normalization "
            "(none); with it, its scale gamma and shift beta starting at 1 and 0 and learned (learned); with gamma and "
            "beta held at 1 and 0 (fixed); and with gamma and beta set so that they undo the normalization exactly at "
            "the start, then learned (undone). In inference mode, none and undone start as the same function.",
        ),
        tuple(panels),
        tuple(study.arms),
        "Lines are medians over seeds, bands their range. Steps are on a logarithmic scale, with step 0 at the left.",
        columns=2,
    )


def _undo(study: Study) -> Section:
    table = per_layer(study, "undo_index", LEARNING)
    low = table["low"][np.isfinite(table["low"])]
    domain = (max(float(low.min(initial=-0.2)), -1.5) - 0.05, 1.15)
    return Section(
        "undo",
        "Do gamma and beta go back to the identity?",
        (
            "Normalization turns a unit's input x into x̂, with mean 0 and deviation 1. Gamma and beta can turn it "
            "back: with gamma = s and beta = mean, the output y is x again. The undo_index says how far they went: 1 "
            "is all the way, 0 is as far away as at gamma = 1 and beta = 0, and below 0 is farther still. Held fixed, "
            "it is 0 always. Each line is the median unit of a layer.",
        ),
        layer_panels(table, "undo_index", "undo", domain=domain, guides={"undone": 1.0, "bare": 0.0}),
        LEARNING,
        "Lines are medians over seeds of the median over units; bands are the range over seeds. Values below -1.5 are "
        f"cut off.{_probe_words(study)}",
    )


def _probe_words(study: Study) -> str:
    """Why a network that is set to undo can start a little below 1."""
    probe, train = study.planned("probe", math.nan), study.planned("train", math.nan)
    if not probe < train:
        return ""
    return (
        f" mean and s are those of a probe of {count(probe)} training rows; undone was set on all {count(train)}, and "
        "starts at 1 to within the probe's sampling."
    )


def _gamma_beta(study: Study) -> Section:
    ends = joined(study, LEARNING)
    gammas: list[Panel] = []
    betas: list[Panel] = []
    outside = 0
    for place, layer in enumerate(ends.names("layer")):
        units = ends.rows(layer=layer)
        for panels, x, y, x_title, y_title in (
            (gammas, "s", "gamma", "s, the input's deviation", "gamma"),
            (betas, "mean", "beta", "mean of the input", "beta"),
        ):
            frame = charts.frame(units[x], units[y], OUTLYING)
            outside += _outside(units, x, y, frame)
            chart = charts.against(units, x, y, x_title, y_title, frame, {"bare": 1.0 if y == "gamma" else 0.0})
            words = f"{y} against {x}, a point for each unit of {layer} at the last step."
            panels.append(Panel(f"{y}-{place}", f"{layer}: {y} against {x}", words, chart))
    return Section(
        "gamma-beta",
        "Unit by unit: gamma against s, beta against mean",
        (
            "Each point is a unit at the last step. On the dashed line, gamma equals the input's deviation s and beta "
            "its mean: there, batch normalization is undone. A horizontal row of points at gamma = 1 or beta = 0 is "
            "bare normalization.",
            "One caution: multiply the weights below a unit by a constant, and s and mean grow with it while what the "
            "network computes stays the same. Part of the distance from the line is this arbitrary scale; the angle "
            "below is free of it.",
        ),
        (*gammas, *betas),
        LEARNING,
        f"All seeds. {count(outside)} outlying units lie outside the frames." if outside else "All seeds.",
        dashed=False,
    )


def _angle(study: Study) -> Section:
    table = per_layer(study, "undo_angle", NORMALIZED)
    return Section(
        "angle",
        "Free of the weights' scale: the angle",
        (
            "The output is gamma times x̂ plus beta, the input is s times x̂ plus the mean. The undo_angle is the angle "
            "between the two, seen as vectors (gamma, beta) and (s, mean): 0° means that the output is the input times "
            "a positive factor, which the next layer can absorb. Multiplying the weights below by a constant changes s "
            "and mean alike, and not the angle. In the arm fixed it is what bare normalization has, at its weights.",
        ),
        layer_panels(
            table,
            "undo_angle",
            "angle",
            domain=from_zero(table, 10.0),
            guides={"undone": 0.0},
            axis="undo_angle, degrees",
        ),
        NORMALIZED,
        "Lines are medians over seeds of the median over units; bands are the range over seeds.",
    )


def _optimal(study: Study) -> Section:
    ends = last_step(study.optimal)
    panels = []
    for x, y, x_title in (("s", "gamma", "s, the input's deviation"), ("mean", "beta", "mean of the input")):
        if (np.isfinite(ends[x]) & np.isfinite(ends[y])).any():
            chart = charts.against(ends.labelled("arm", "optimal"), x, y, x_title, y, charts.frame(ends[x], ends[y]))
            words = f"{y} against {x} where undoing is optimal, a point for each unit at the last step."
            panels.append(Panel(f"optimal-{y}", f"{y} against {x}", words, chart))
    index = study.optimal.medians("undo_index", ("seed", "step")).spreads("undo_index", ("step",))
    if some(index):
        low = float(np.nanmin(index["low"]))
        domain = (min(max(low, -1.5), 0.0) - 0.05, 1.15)
        guides = {"undone": 1.0, "bare": 0.0}
        chart = charts.curves(index.labelled("arm", "optimal"), "undo_index", domain=domain, guides=guides)
        words = "undo_index against step where undoing is optimal."
        panels.append(Panel("optimal-index", "undo_index", words, chart))
    return Section(
        "optimal",
        "Where undoing is the right answer",
        (
            "A control: one batch normalization layer is asked to return its own un-normalized input, so the loss is "
            "smallest where gamma = s and beta = mean. If the points lie on the line here but not in the charts "
            "of the previous sections, then gamma and beta could find the identity, and in the network the loss does "
            "not send them there.",
        ),
        tuple(panels),
    )


def _outside(units: Table, x: str, y: str, frame: Frame) -> int:
    drawn = np.isfinite(units[x]) & np.isfinite(units[y])
    inside = np.ones(len(units), bool)
    for column, (low, high) in ((x, frame.x), (y, frame.y)):
        inside &= (units[column] >= low) & (units[column] <= high)
    return int((drawn & ~inside).sum())
