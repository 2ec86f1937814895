"""A study's Run -> its summary, one row of numbers for each arm and the answer: in the terminal, as JSON, as a card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Console

from batchnorm.report.study.answer import Answer, answer
from batchnorm.report.study.numbers import Study, diverted, ends, find
from batchnorm.report.tables import jsonable
from batchnorm.report.terminal import write, write_rows
from batchnorm.runs.run import Run
from batchnorm.words import ClassCounts, Spread, accuracy, index, loss, number, percent


@dataclass(frozen=True)
class Row:
    """One arm in the summary table; each number over its seeds, at its last step unless said otherwise."""

    arm: str
    step: float
    accuracy: Spread
    loss: Spread
    undo_index: Spread
    undone: Spread
    away: Spread
    classes: ClassCounts
    undo_angle: Spread
    gradient_diverted: Spread
    dead: Spread
    diverged: int

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of COLUMNS."""
        return (
            f"{self.arm} (diverged in {self.diverged})" if self.diverged else self.arm,
            self.accuracy.cell(accuracy),
            self.loss.cell(loss),
            self.undo_index.cell(index),
            self.undone.cell(percent),
            self.away.cell(percent),
            self.gradient_diverted.cell(percent),
            self.dead.cell(number),
        )


COLUMNS = ("arm", "accuracy", "loss", "undo_index", "undone", "away", "gradient diverted", "dead units")
COLUMNS_NOTE = (
    "Median over the seeds and their range, on held-out data at the last step. undo_index is the median over units; "
    "undone and away are shares of the units of all seeds; dead units are counted. Empty: not measured, or not defined "
    "for that arm."
)
GRADIENT_NOTE = "gradient diverted: the median over all units and over the measured steps after step 0."


@dataclass(frozen=True)
class Summary:
    """What is said of a study: its tables, its answer, and a row for each arm measured."""

    study: Study
    answer: Answer
    rows: tuple[Row, ...]


def summarize(runs: Sequence[Run]) -> Summary:
    """Of the one Run of a study. Raises RunError only where one of its tables is damaged."""
    (run,) = runs
    study = Study.read(run)
    return Summary(study, answer(find(study)), tuple(_row(study, arm) for arm in study.arms))


def show(summary: Summary, console: Console) -> None:
    """The arms in 80 columns, then the answer: a range stands below its median, and one column is left out."""
    shown = [place for place, name in enumerate(COLUMNS) if name != "gradient diverted"]
    heads = [COLUMNS[place].replace(" ", "\n") for place in shown]
    rows = ([row.cells()[place].replace(" [", "\n[") for place in shown] for row in summary.rows)
    write_rows(console, heads, rows, COLUMNS_NOTE, left=COLUMNS[:1])
    write(console, "\n" + "\n\n".join(summary.answer.lines()))


def describe(summary: Summary) -> dict[str, Any]:
    """JSON values."""
    run = summary.study.run
    return {
        "run": str(run.path),
        "status": run.info.get("status"),
        "answer": jsonable(summary.answer),
        "classes": {row.arm: row.classes.as_dict() for row in summary.rows},
        "summary": jsonable(summary.rows),
    }


def card(summary: Summary) -> Markup:
    """The answer, for a notebook."""
    lines = Markup("").join(Markup("<p>{}</p>").format(line) for line in summary.answer.lines())
    return Markup("<div><p><b>{}</b></p>{}</div>").format(str(summary.study.run.path), lines)


def _row(study: Study, arm: str) -> Row:
    curve, units = study.end(study.curves, arm), study.end(study.units, arm)
    end = ends(units)
    dead = units["dead"]
    counted = [float(np.sum(dead[units["seed"] == seed] == 1)) for seed in np.unique(units["seed"])]
    return Row(
        arm=arm,
        step=float(curve["step"].max()) if len(curve) else math.nan,
        accuracy=Spread.of(curve["accuracy"]),
        loss=Spread.of(curve["loss"]),
        undo_index=end.index,
        undone=end.share("undone"),
        away=end.share("away"),
        classes=end.classes,
        undo_angle=end.angle,
        gradient_diverted=diverted(study.sound(study.units, arm)).after,
        dead=Spread.of(counted if np.isfinite(dead).any() else []),
        diverged=sum(which == arm for _, which, _ in study.diverged),
    )
