"""A study's Run -> the page as data: what it says and shows, before any HTML. Tests assert on this."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.report.definitions import DEFINITIONS, Definition
from batchnorm.report.provenance import Facts, grouped, ran
from batchnorm.report.study import sections
from batchnorm.report.study.answer import Answer, tell
from batchnorm.report.study.measured import Study, last_step
from batchnorm.report.study.numbers import find
from batchnorm.report.study.panels import LEARNING, Section
from batchnorm.report.study.terminal import Row, summarize
from batchnorm.report.tables import Table, rounded
from batchnorm.runs.run import Run
from batchnorm.words import count, listing

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


@dataclass(frozen=True)
class Page:
    """Everything the report shows, in its order. `notices` stand above all else: cut short, diverged."""

    title: str
    subtitle: str
    notices: tuple[str, ...]
    answer: Answer
    summary: tuple[Row, ...]
    sections: tuple[Section, ...]
    units: UnitTable
    definitions: tuple[Definition, ...]
    provenance: tuple[Facts, ...]


COLUMNS = (
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


def build(run: Run) -> Page:
    """The page of a study's Run, whatever of it there is. Raises RunError where one of its tables is damaged."""
    study = Study.read(run)
    findings = find(study)
    return Page(
        title="Do gamma and beta undo batch normalization?",
        subtitle=_subtitle(study),
        notices=_notices(study),
        answer=tell(findings),
        summary=tuple(summarize(study)),
        sections=tuple(sections.build(study)),
        units=_units(study),
        definitions=DEFINITIONS,
        provenance=tuple(_provenance(run)),
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
    for column in COLUMNS:
        if column.numeric:
            joined = np.concatenate([part[column.name] for part in parts]) if parts else np.zeros(0)
            values[column.name] = rounded(joined, TABLE_DIGITS)
        else:
            names[column.name] = _all_names(study.units, column.name)
            codes = [part.words[column.name].codes for part in parts if column.name in part.words]
            values[column.name] = np.concatenate(codes).tolist() if codes else [0] * sum(map(len, parts))
    return UnitTable(COLUMNS, values, names)


def _all_names(table: Table, column: str) -> list[str]:
    return table.words[column].names if column in table.words else [""]


def _provenance(run: Run) -> list[Facts]:
    info = run.info
    groups = {"Run": ran(info, "command", "status", "started", "ended"), "Configuration": info.get("config")}
    return grouped({**groups, "Versions": info.get("versions"), "Machine": info.get("machine")})
