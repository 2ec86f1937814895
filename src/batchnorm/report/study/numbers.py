"""Compute the numbers behind a study's answer: per seed first, then over seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchnorm import quantities as q
from batchnorm.quantities import CLASSES
from batchnorm.report.page import listed
from batchnorm.report.tables import Array, Mask, Table, Words
from batchnorm.runs.run import Run
from batchnorm.words import ClassCounts, Spread, is_live


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


SAME_FUNCTION = 1e-4
ENOUGH_OF_THE_PLAN = 0.1
ENOUGH_STEPS = 20
NEAR_THE_BEST = 0.95
ABOVE_CHANCE = 1.5


@dataclass(frozen=True)
class Could:
    """How the logits of `undone` and `none` differ at step 0.

    `largest` is over all seeds, in inference mode. `rms` is per batch in training mode, `relative` the same in units of
    the logits' standard deviation.
    """

    largest: float
    seeds: int
    rms: Spread
    relative: Spread

    @property
    def reached(self) -> bool:
        return self.largest <= SAME_FUNCTION


@dataclass(frozen=True)
class End:
    """Gamma and beta at the end of an arm; `index` is the median undo_index over units.

    `seeds` has the classes of each seed. `layers` is the median undo_index per layer, from the input up, in the median
    seed, `layer_classes` the classes per layer over all seeds. `angle` and `bare_angle` are medians over live units.
    `enough` says whether enough steps were measured, `trained` whether the network got better than guessing: before
    that, gamma and beta are still near their initial values.
    """

    step: float
    index: Spread
    seeds: tuple[ClassCounts, ...]
    enough: bool
    trained: bool
    layers: tuple[float, ...]
    layer_classes: Mapping[str, ClassCounts]
    angle: Spread
    bare_angle: Spread

    @property
    def classes(self) -> ClassCounts:
        return ClassCounts.total_of(self.seeds)

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


@dataclass(frozen=True)
class Diverted:
    """gradient_diverted, median over units: at step 0, and in the median later step.

    `layers` is the highest median over units per layer, from the input up, in the median seed.
    """

    start: Spread
    after: Spread
    layers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Parting:
    """When the held-out losses of `undone` and `none` part.

    `step` is the first measured step where they differ by more than the seeds, NaN if none is; `stays` the share of
    later steps where they still do; `distance` the relative distance of their logits.
    """

    seeds: int
    step: float
    stays: float
    distance: Spread
    distance_step: float


@dataclass(frozen=True)
class Faster:
    """First measured steps at the target accuracy; `ratio` is none's over undone's (above 1: `undone` is faster)."""

    target: float
    undone: Spread
    none: Spread
    ratio: Spread
    best_undone: float
    best_none: float
    chance: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.target) and math.isfinite(self.chance)

    @property
    def learners(self) -> list[str]:
        bests = {"undone": self.best_undone, "none": self.best_none}
        return [arm for arm, best in bests.items() if NEAR_THE_BEST * best >= ABOVE_CHANCE * self.chance]


@dataclass(frozen=True)
class Findings:
    could: Could
    learned: End
    fixed: End
    undone: End
    optimal: End
    diverted: Mapping[str, Diverted]
    parting: Parting
    faster: Faster
    diverged: Mapping[str, int]


def find(study: Study) -> Findings:
    """Compute all numbers. Missing arms, seeds, steps or values give NaN with count 0, never an error."""
    return Findings(
        could=_could(study),
        learned=_end_of_arm(study, "learned"),
        fixed=_end_of_arm(study, "fixed"),
        undone=_end_of_arm(study, "undone"),
        optimal=ends(last_step(study.optimal)),
        diverted={arm: diverted(study.sound(study.units, arm)) for arm in ("undone", "learned")},
        parting=_parting(study),
        faster=_faster(study),
        diverged=Counter(arm for _, arm, _ in study.diverged),
    )


def _could(study: Study) -> Could:
    inference, training = study.start.rows(mode="inference"), study.start.rows(mode="training")
    largest = inference["max"][np.isfinite(inference["max"])]
    squares = training.with_column("square", training["rms"] ** 2).means("square", ("seed",))
    rms = np.sqrt(squares["square"])
    deviation = training.means("logit_std", ("seed",))["logit_std"]
    relative = rms / np.where(deviation > 0, deviation, np.nan)
    seeds = len(np.unique(inference["seed"]))
    return Could(float(largest.max()) if largest.size else math.nan, seeds, Spread.of(rms), Spread.of(relative))


def _end_of_arm(study: Study, arm: str) -> End:
    best, chance = _best(study.sound(study.curves, arm)), 1 / study.planned("classes", math.nan)
    trained = not NEAR_THE_BEST * best < ABOVE_CHANCE * chance
    return ends(study.end(study.units, arm), study.planned("steps", math.nan), trained)


def ends(rows: Table, planned: float = math.nan, trained: bool = True) -> End:
    """Gamma and beta of these units; `enough` compares their step with the number of `planned` steps, if any."""
    step = float(rows["step"].max()) if len(rows) else math.nan
    live = rows.where(is_live(rows["code"]))
    angles = (Spread.of(live.medians(name, ("seed",))[name]) for name in ("undo_angle", "bare_angle"))
    return End(
        step,
        Spread.of(rows.medians("undo_index", ("seed",))["undo_index"]),
        tuple(ClassCounts.of(rows["code"][group]) for group in rows.groups("seed")),
        step >= ENOUGH_STEPS and not step < ENOUGH_OF_THE_PLAN * planned,
        trained,
        _by_layer(rows, "undo_index", ("seed",)),
        {layer: ClassCounts.of(rows.rows(layer=layer)["code"]) for layer in rows.names("layer")},
        *angles,
    )


def diverted(rows: Table) -> Diverted:
    known = rows.medians("gradient_diverted", ("seed", "step"))
    after = known.where(known["step"] > 0).medians("gradient_diverted", ("seed",))
    return Diverted(
        Spread.of(known.rows(step=0)["gradient_diverted"]),
        Spread.of(after["gradient_diverted"]),
        _by_layer(rows, "gradient_diverted", ("seed", "step")),
    )


def _by_layer(rows: Table, column: str, by: tuple[str, ...]) -> tuple[float, ...]:
    """Per layer, from the input up: the highest median over units in a seed's groups, in the median seed."""
    peaks = rows.medians(column, ("layer", *by)).spreads(column, ("layer", "seed")).medians("high", ("layer",))
    return tuple(peaks["high"].tolist())


def _parting(study: Study) -> Parting:
    undone, none = study.sound(study.curves, "undone"), study.sound(study.curves, "none")
    steps, (a, b) = _paired("loss", undone, none)
    both = np.isfinite(a) & np.isfinite(b)
    step, stays = math.nan, math.nan
    enough = both.sum(axis=1) >= 2
    steps = steps[enough]
    a, b = np.where(both, a, np.nan)[enough], np.where(both, b, np.nan)[enough]
    if len(steps):
        between_arms = np.abs(np.nanmean(a - b, axis=1))
        between_seeds = np.maximum(np.nanmax(a, 1) - np.nanmin(a, 1), np.nanmax(b, 1) - np.nanmin(b, 1))
        apart = between_arms > between_seeds
        if apart.any():
            first = int(np.argmax(apart))
            step, stays = float(steps[first]), float(apart[first:].mean())
    logits = last_step(study.parting)
    deviation = logits["logit_std"]
    distance = Spread.of(logits["rms"] / np.where(deviation > 0, deviation, np.nan))
    last = float(logits["step"].max()) if len(logits) else math.nan
    return Parting(int(both.any(axis=0).sum()), step, stays, distance, last)


def _faster(study: Study) -> Faster:
    undone, none = study.sound(study.curves, "undone"), study.sound(study.curves, "none")
    best_undone, best_none = _best(undone), _best(none)
    target = NEAR_THE_BEST * float(np.minimum(best_undone, best_none))
    steps, matrices = _paired("accuracy", undone, none)
    reached = [_first(steps, matrix >= target) for matrix in matrices]
    ratio = np.maximum(reached[1], 1) / np.maximum(reached[0], 1)
    chance = 1 / study.planned("classes", math.nan)
    at_undone, at_none, times = (Spread.of(values) for values in (*reached, ratio))
    return Faster(target, at_undone, at_none, times, best_undone, best_none, chance)


def _best(curve: Table) -> float:
    medians = curve.medians("accuracy", ("step",))["accuracy"]
    known = medians[np.isfinite(medians)]
    return float(known.max()) if known.size else math.nan


def _first(steps: Array, reached: Mask) -> Array:
    """Per seed (column), the first step that is `reached`; NaN if none is."""
    if reached.size == 0:
        return np.full(reached.shape[1], np.nan)
    return np.where(reached.any(axis=0), steps[np.argmax(reached, axis=0)], np.nan)


def _paired(column: str, *tables: Table) -> tuple[Array, list[Array]]:
    """The steps, and a (steps, seeds) matrix of the column per table, NaN without a row."""
    steps, seeds = (np.unique(np.concatenate([table[name] for table in tables])) for name in ("step", "seed"))
    matrices = []
    for table in tables:
        matrix = np.full((len(steps), len(seeds)), np.nan)
        matrix[np.searchsorted(steps, table["step"]), np.searchsorted(seeds, table["seed"])] = table[column]
        matrices.append(matrix)
    return steps, matrices
