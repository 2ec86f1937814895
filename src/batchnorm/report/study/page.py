"""Build a study's page as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.report.definitions import DEFINITIONS
from batchnorm.report.page import Page, listed, provenance, ran, unfinished, unit_table
from batchnorm.report.study import charts
from batchnorm.report.study.answer import QUESTION, Answer
from batchnorm.report.study.charts import LEARNING
from batchnorm.report.study.numbers import Study, last_step
from batchnorm.report.study.sections import sections
from batchnorm.report.study.terminal import COLUMNS, COLUMNS_NOTE, GRADIENT_NOTE, Row, Summary
from batchnorm.report.tables import Table, Words, rounded
from batchnorm.words import count, listing, plural

TABLE_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class StudyPage(Page):
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
