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

from batchnorm.record.run import Run
from batchnorm.report.tables import Table


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
        tables = {name: Table.read(run, name) for name in ("curves", "units", "start", "parting", "optimal")}
        return cls(run=run, config=config if isinstance(config, dict) else {}, diverged=_diverged(run), **tables)

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
