"""A study's Run -> one row of numbers for each arm: the table in the terminal and on the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from batchnorm.report.study.numbers import Study, ends
from batchnorm.runs.run import Run
from batchnorm.verdict import ClassCounts
from batchnorm.words import Spread, accuracy, index, loss, number, percent


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


def summary(run: Run) -> list[Row]:
    """One row for each arm measured. Raises RunError only where one of the Run's tables is damaged."""
    return summarize(Study.read(run))


def summarize(study: Study) -> list[Row]:
    """The same, of tables already read."""
    rows = []
    for arm in study.arms:
        curve, units = study.end(study.curves, arm), study.end(study.units, arm)
        end = ends(units)
        later = study.sound(study.units, arm)
        later = later.where(later["step"] > 0).medians("gradient_diverted", ("seed", "step"))
        dead = units.where(units["dead"] == 1)
        counted = [float(np.sum(dead["seed"] == seed)) for seed in np.unique(units["seed"])]
        rows.append(
            Row(
                arm=arm,
                step=float(curve["step"].max()) if len(curve) else math.nan,
                accuracy=Spread.of(curve["accuracy"]),
                loss=Spread.of(curve["loss"]),
                undo_index=Spread.of(units.medians("undo_index", ("seed",))["undo_index"]),
                undone=end.share("undone"),
                away=end.share("away"),
                classes=end.classes,
                undo_angle=end.angle,
                gradient_diverted=Spread.of(later.medians("gradient_diverted", ("seed",))["gradient_diverted"]),
                dead=Spread.of(counted if np.isfinite(units["dead"]).any() else []),
                diverged=sum(which == arm for _, which, _ in study.diverged),
            )
        )
    return rows
