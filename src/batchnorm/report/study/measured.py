"""What a study measured: its tables, its configuration, its arms, and which rows speak for an arm's end.

An arm is read at the last step that one of its seeds reached; seeds that were cut short of it, and seeds that diverged,
are left out of what is said about the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm import quantities as q
from batchnorm.report.tables import Table, Words
from batchnorm.runs.run import Run


@dataclass(frozen=True)
class Study:
    """The tables of a study's Run, with what its configuration says about reading them."""

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
        """Of any Run: what is missing reads as empty. Raises RunError where a table is damaged."""
        config = run.info.get("config")
        config = config if isinstance(config, dict) else {}
        tables = {name: Table.read(run, name) for name in ("curves", "units", "start", "parting", "optimal")}
        for name in ("units", "optimal"):
            tables[name] = _coded(_classified(tables[name], config))
        return cls(run=run, config=config, diverged=_diverged(run), **tables)

    @property
    def arms(self) -> list[str]:
        """The arms measured, in the order of the configuration."""
        found = [*dict.fromkeys([*self.curves.names("arm"), *self.units.names("arm")])]
        planned = self.config.get("arms")
        order = [arm for arm in planned if arm in found] if isinstance(planned, list) else []
        return [*order, *(arm for arm in found if arm not in order)]

    def planned(self, key: str, default: float) -> float:
        """A number of the configuration."""
        value = self.config.get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else default

    def sound(self, table: Table, arm: str) -> Table:
        """The arm's rows of the seeds in which it did not diverge."""
        rows = table.rows(arm=arm)
        lost = [seed for seed, which, _ in self.diverged if which == arm]
        return rows.where(~np.isin(rows["seed"], lost))

    def end(self, table: Table, arm: str) -> Table:
        """The arm's rows at its last step."""
        return last_step(self.sound(table, arm))


def _coded(units: Table) -> Table:
    """With the class as a number, too: the column `code` has its position in CLASSES."""
    if "class" not in units.words:
        return units
    codes, names = units.words["class"]
    place = [q.CLASSES.index(name) if name in q.CLASSES else q.CLASSES.index("unknown") for name in names]
    return units.with_column("code", np.array(place, np.float64)[codes])


@np.errstate(invalid="ignore", over="ignore")
def _classified(units: Table, config: Mapping[str, Any]) -> Table:
    """A table of units as studies store it since version 3: of an earlier one, the classes are computed here."""
    if "class" in units.words or not len(units) or "gamma" not in units.numbers:
        return units
    eps = config.get("eps")
    eps = float(eps) if isinstance(eps, int | float) else 1e-5
    mean, s, gamma, beta = (units[name] for name in ("mean", "s", "gamma", "beta"))
    var = np.maximum(s**2 - eps, 0.0)
    silent = q.silent(config.get("act"), units["positive_out"])
    without_norm = np.array(units.texts("arm")) == "none"
    code, dead = np.empty(len(units)), np.empty(len(units))
    for rows in units.groups("seed", "arm", "step", "layer"):
        code[rows] = q.unit_class(mean[rows], var[rows], eps, gamma[rows], beta[rows], silent[rows])
        scale = np.where(without_norm[rows], s[rows], gamma[rows])
        dead[rows] = q.dead(var[rows], eps, scale, silent[rows])
    found = {**q.undoing(mean, var, eps, gamma, beta), "s": s, "dead": dead}
    numbers = {name: values for name, values in units.numbers.items() if name != "nearer_undone"}
    return Table({**numbers, **found}, {**units.words, "class": Words(code.astype(np.int64), [*q.CLASSES])})


def last_step(table: Table) -> Table:
    """The rows at the highest step."""
    return table.where(table["step"] == table["step"].max()) if len(table) else table


def _diverged(run: Run) -> tuple[tuple[int, str, int], ...]:
    listed = run.info.get("diverged")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return tuple(
        (int(entry["seed"]), str(entry["arm"]), int(entry["step"]))
        for entry in entries
        if isinstance(entry.get("seed"), int) and isinstance(entry.get("step"), int) and "arm" in entry
    )
