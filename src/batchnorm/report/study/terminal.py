"""A study's answer and a row of numbers per arm: in the terminal, as JSON and as a notebook card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Console

from batchnorm import words
from batchnorm.report.study.answer import Answer, answer
from batchnorm.report.study.numbers import Diverted, End, Study
from batchnorm.report.tables import jsonable
from batchnorm.report.terminal import write, write_rows
from batchnorm.runs.run import Run
from batchnorm.words import Spread, accuracy, index, number, percent


@dataclass(frozen=True)
class Row:
    """One arm in the summary table: numbers over its seeds, at the last step unless noted otherwise."""

    arm: str
    step: float
    accuracy: Spread
    loss: Spread
    undo_index: Spread
    undone: Spread
    away: Spread
    classes: words.ClassCounts
    undo_angle: Spread
    gradient_diverted: Spread
    dead: Spread
    diverged: int

    def cells(self) -> tuple[str, ...]:
        return (
            f"{self.arm} (diverged in {self.diverged})" if self.diverged else self.arm,
            *(getattr(self, name).cell(form) for name, form in FORMS.items()),
        )


FORMS: Mapping[str, Callable[[float], str]] = {
    "accuracy": accuracy,
    "loss": words.loss,
    "undo_index": index,
    "undone": percent,
    "away": percent,
    "gradient_diverted": percent,
    "dead": number,
}
COLUMNS = ("arm", "accuracy", "loss", "undo_index", "undone", "away", "gradient diverted", "dead units")
COLUMNS_NOTE = (
    "Median and range over seeds, on held-out data at the last step. undo_index is the median over units; undone and "
    "away are shares of the units of all seeds; dead units are counts. Empty: not measured, or not defined for that "
    "arm."
)
GRADIENT_NOTE = "gradient diverted: the median over all units and all measured steps after step 0."


@dataclass(frozen=True)
class Summary:
    """A study's tables, its answer, and a row per measured arm."""

    study: Study
    answer: Answer
    rows: tuple[Row, ...]


def summarize(runs: Sequence[Run]) -> Summary:
    """Summarize one study. Raises RunError only if a table is damaged."""
    (run,) = runs
    study = Study.read(run)
    return Summary(study, answer(study), tuple(_row(study, arm) for arm in study.arms))


def show(summary: Summary, console: Console) -> None:
    """Print the arms in 80 columns, without gradient diverted and with ranges below the medians, then the answer."""
    columns = [i for i, name in enumerate(COLUMNS) if name != "gradient diverted"]
    heads = [COLUMNS[i].replace(" ", "\n") for i in columns]
    rows = ([row.cells()[i].replace(" [", "\n[") for i in columns] for row in summary.rows)
    write_rows(console, heads, rows, COLUMNS_NOTE, left=COLUMNS[:1])
    write(console, "\n" + "\n\n".join(summary.answer.lines()))


def describe(summary: Summary) -> dict[str, Any]:
    run = summary.study.run
    return {
        "run": str(run.path),
        "status": run.info.get("status"),
        "answer": jsonable(summary.answer),
        "classes": {row.arm: row.classes.as_dict() for row in summary.rows},
        "summary": jsonable(summary.rows),
    }


def card(summary: Summary) -> Markup:
    lines = Markup("").join(Markup("<p>{}</p>").format(line) for line in summary.answer.lines())
    return Markup("<div><p><b>{}</b></p>{}</div>").format(str(summary.study.run.path), lines)


def _row(study: Study, arm: str) -> Row:
    curve, end = study.end(study.curves, arm), End(study.end(study.units, arm))
    dead, seeds = end.rows["dead"], end.rows["seed"]
    counts = [float(np.sum(dead[seeds == seed] == 1)) for seed in np.unique(seeds)]
    return Row(
        arm=arm,
        step=float(curve["step"].max()) if len(curve) else math.nan,
        accuracy=Spread.of(curve["accuracy"]),
        loss=Spread.of(curve["loss"]),
        undo_index=end.index,
        undone=end.share("undone"),
        away=end.share("away"),
        classes=end.classes,
        undo_angle=end.median("undo_angle", live=True),
        gradient_diverted=Diverted.of_arm(study, arm).after,
        dead=Spread.of(counts if np.isfinite(dead).any() else []),
        diverged=sum(other == arm for _, other, _ in study.diverged),
    )
