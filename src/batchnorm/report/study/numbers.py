"""Compute the numbers behind a study's answer: per seed first, then over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from batchnorm import quantities as q
from batchnorm.quantities import CLASSES
from batchnorm.report.page import listed
from batchnorm.report.tables import Array, Table, Words
from batchnorm.runs.run import Run
from batchnorm.words import ClassCounts, Spread, is_live, quantile


@dataclass(frozen=True)
class Study:
    """The tables and the configuration of a study's Run."""

    run: Run
    curves: Table
    units: Table
    start: Table
    parting: Table
    optimal: Table
    config: Mapping[str, Any]
    diverged: tuple[tuple[int, str, int], ...]

    @classmethod
    def read(cls, run: Run) -> Study:
        """Read any Run; missing tables are empty. Raises RunError if a table is damaged."""
        config = run.info.get("config")
        config = config if isinstance(config, dict) else {}
        tables = {name: Table.read(run, name) for name in ("curves", "units", "start", "parting", "optimal")}
        for name in ("units", "optimal"):
            tables[name] = _classified(tables[name], config)
        return cls(run=run, config=config, diverged=_diverged(run), **tables)

    @property
    def arms(self) -> list[str]:
        """The arms measured, in the order of the configuration."""
        measured = [*dict.fromkeys([*self.curves.names("arm"), *self.units.names("arm")])]
        planned = self.config.get("arms")
        order = [arm for arm in planned if arm in measured] if isinstance(planned, list) else []
        return [*dict.fromkeys([*order, *measured])]

    def planned(self, key: str, default: float) -> float:
        value = self.config.get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else default

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.planned("classes", math.nan)

    def sound(self, table: Table, arm: str) -> Table:
        rows = table.rows(arm=arm)
        return rows.where(~np.isin(rows["seed"], [seed for seed, other, _ in self.diverged if other == arm]))

    def end(self, table: Table, arm: str) -> Table:
        return last_step(self.sound(table, arm))


@np.errstate(invalid="ignore", over="ignore")
def _classified(units: Table, config: Mapping[str, Any]) -> Table:
    """Add the column `code`, the class's position in CLASSES.

    Studies before version 3 stored no classes: compute them here.
    """
    if "class" in units.words:
        codes, names = units.words["class"]
        positions = [CLASSES.index(name if name in CLASSES else "unknown") for name in names]
        return units.with_column("code", np.array(positions, np.float64)[codes])
    if not len(units) or "gamma" not in units.numbers:
        return units
    eps = config.get("eps")
    eps = float(eps) if isinstance(eps, int | float) else 1e-5
    mean, s, gamma, beta = (units[name] for name in ("mean", "s", "gamma", "beta"))
    var = np.maximum(s**2 - eps, 0.0)
    silent = q.silent(config.get("act"), units["positive_out"])
    scale = np.where(np.array(units.texts("arm")) == "none", s, gamma)
    code, dead = np.empty(len(units)), np.empty(len(units))
    for rows in units.groups("seed", "arm", "step", "layer"):
        code[rows] = q.unit_class(mean[rows], var[rows], eps, gamma[rows], beta[rows], silent[rows])
        dead[rows] = q.dead(var[rows], eps, scale[rows], silent[rows])
    computed = {**q.undoing(mean, var, eps, gamma, beta), "s": s, "dead": dead, "code": code}
    stored = {name: values for name, values in units.numbers.items() if name != "nearer_undone"}
    return Table({**stored, **computed}, {**units.words, "class": Words(code.astype(np.int64), [*CLASSES])})


def last_step(table: Table) -> Table:
    return table.where(table["step"] == table["step"].max()) if len(table) else table


def _diverged(run: Run) -> tuple[tuple[int, str, int], ...]:
    return tuple(
        (int(entry["seed"]), str(entry["arm"]), int(entry["step"]))
        for entry in listed(run.info.get("diverged"))
        if isinstance(entry, dict) and "arm" in entry
        if isinstance(entry.get("seed"), int) and isinstance(entry.get("step"), int)
    )


ENOUGH_OF_THE_PLAN = 0.1
ENOUGH_STEPS = 20
NEAR_THE_BEST = 0.95
ABOVE_CHANCE = 1.5


@dataclass(frozen=True)
class End:
    """Gamma and beta at the end of an arm, from the rows of its units at the last step.

    `planned` is the number of steps to compare with, if any. `trained` says whether the network got better than
    guessing: before that, gamma and beta are still near their initial values.
    """

    rows: Table
    planned: float = math.nan
    trained: bool = True

    @classmethod
    def of_arm(cls, study: Study, arm: str) -> End:
        learned = not NEAR_THE_BEST * best(study.sound(study.curves, arm)) < ABOVE_CHANCE * study.chance
        return cls(study.end(study.units, arm), study.planned("steps", math.nan), learned)

    @property
    def step(self) -> float:
        return float(self.rows["step"].max()) if len(self.rows) else math.nan

    @property
    def enough(self) -> bool:
        """Whether enough steps were measured."""
        return self.step >= ENOUGH_STEPS and not self.step < ENOUGH_OF_THE_PLAN * self.planned

    def median(self, column: str, live: bool = False) -> Spread:
        """The median over units, by default over all, else over the live ones."""
        rows = self.rows.where(is_live(self.rows["code"])) if live else self.rows
        return Spread.of(rows.medians(column, ("seed",))[column])

    @property
    def index(self) -> Spread:
        return self.median("undo_index")

    @cached_property
    def layers(self) -> tuple[float, ...]:
        """The median undo_index per layer, from the input up, in the median seed."""
        return by_layer(self.rows, "undo_index", ("seed",))

    @cached_property
    def seeds(self) -> tuple[ClassCounts, ...]:
        return tuple(
            ClassCounts.of(self.rows.rows(seed=seed)["code"]) for seed in np.unique(self.rows["seed"]).tolist()
        )

    @cached_property
    def classes(self) -> ClassCounts:
        return ClassCounts.of(self.rows["code"])

    @property
    def measured(self) -> bool:
        return self.classes.units > self.classes["unknown"]

    @property
    def known(self) -> bool:
        return self.enough and self.trained and self.measured

    @property
    def agree(self) -> bool:
        """Whether most units are undone either in all seeds or in none."""
        return len({seed.verdict == "yes" for seed in self.seeds}) < 2

    @property
    def verdict(self) -> str:
        """The verdict of all seeds together; "partly" if they disagree."""
        if not self.known:
            return "too early" if self.measured else "unknown"
        verdict = self.classes.verdict
        return verdict if self.agree or verdict not in ("yes", "no") else "partly"

    def share(self, name: str) -> Spread:
        """The share of a class over all seeds, with the range over seeds."""
        if not self.measured:
            return Spread.of([])
        return replace(Spread.of([seed.share(name) for seed in self.seeds]), median=self.classes.share(name))


class Diverted(NamedTuple):
    """gradient_diverted, median over units: at step 0, and in the median later step.

    `layers` is the highest median over units per layer, from the input up, in the median seed.
    """

    start: Spread
    after: Spread
    layers: tuple[float, ...]

    @classmethod
    def of_arm(cls, study: Study, arm: str) -> Diverted:
        """The diverted gradient of one arm, over all seeds that did not diverge."""
        rows = study.sound(study.units, arm)
        known = rows.medians("gradient_diverted", ("seed", "step"))
        after = known.where(known["step"] > 0).medians("gradient_diverted", ("seed",))
        start, later = (Spread.of(table["gradient_diverted"]) for table in (known.rows(step=0), after))
        return cls(start, later, by_layer(rows, "gradient_diverted", ("seed", "step")))


def by_layer(rows: Table, column: str, by: tuple[str, ...]) -> tuple[float, ...]:
    """Per layer, from the input up: the highest median over units in a seed's groups, in the median seed."""
    peaks = rows.medians(column, ("layer", *by)).spreads(column, ("layer", "seed")).medians("high", ("layer",))
    return tuple(peaks["high"].tolist())


def best(curve: Table) -> float:
    """The highest accuracy of a step, in the median seed."""
    return quantile(curve.medians("accuracy", ("step",))["accuracy"], 1)


def paired(column: str, *tables: Table) -> tuple[Array, list[Array]]:
    """The steps, and a (steps, seeds) matrix of the column per table, NaN without a row."""
    steps, seeds = (np.unique(np.concatenate([table[name] for table in tables])) for name in ("step", "seed"))
    matrices = []
    for table in tables:
        matrix = np.full((len(steps), len(seeds)), np.nan)
        matrix[np.searchsorted(steps, table["step"]), np.searchsorted(seeds, table["seed"])] = table[column]
        matrices.append(matrix)
    return steps, matrices
