"""Which regime is worth it: each arm against the one it would replace, seed by seed.

An arm is better (worse) where at least SEEDS seeds were run, every seed says so, and the median difference in accuracy
is at least POINTS. Anything else is no difference seen, whichever way it points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchnorm.runs.run import Run
from batchnorm.words import Spread

SEEDS = 3
POINTS = 1.0
REFERENCE = "batch norm"
REFERENCES = {"padded sequences": "padding counted"}
"""The arm that the others of a part are compared with, where it is not batch norm."""
TABLE = "results"
MEASURED = ("accuracy", "loss", "statistics_error")


@dataclass(frozen=True)
class Arm:
    """One arm of a case over the seeds; `gain` is its accuracy above the reference's, in points, empty for itself."""

    part: str
    case: str
    name: str
    accuracy: Spread
    loss: Spread
    statistics_error: Spread
    gain: tuple[float, ...]
    reference: str

    @property
    def points(self) -> float:
        """The median gain."""
        return float(np.median(self.gain)) if self.gain else float("nan")

    @property
    def verdict(self) -> str:
        """ "better", "worse", "no difference seen", "too few seeds"; empty for the reference."""
        if not self.gain:
            return ""
        if len(self.gain) < SEEDS:
            return "too few seeds"
        if abs(self.points) >= POINTS and (min(self.gain) > 0 or max(self.gain) < 0):
            return "better" if self.points > 0 else "worse"
        return "no difference seen"


def arms(run: Run) -> list[Arm]:
    """Every arm of every case, in the order in which they were measured; empty where nothing was."""
    if TABLE not in run.tables():
        return []
    rows = run.table(TABLE).to_pylist()
    cases: dict[tuple[str, str], dict[str, dict[int, dict[str, float]]]] = {}
    for row in rows:
        seeds = cases.setdefault((row["part"], row["case"]), {}).setdefault(row["arm"], {})
        seeds[row["seed"]] = row
    found = []
    for (part, case), by_arm in cases.items():
        reference = REFERENCES.get(part, REFERENCE)
        against = by_arm.get(reference, {})
        for name, seeds in by_arm.items():
            shared = [] if name == reference else sorted(seeds.keys() & against.keys())
            gain = tuple(100 * (seeds[s]["accuracy"] - against[s]["accuracy"]) for s in shared)
            accuracy, loss, error = (Spread.of([row[column] for row in seeds.values()]) for column in MEASURED)
            found.append(Arm(part, case, name, accuracy, loss, error, gain, reference))
    return found


def sentences(found: Sequence[Arm]) -> list[tuple[str, str]]:
    """For each regime: its name, and where it was better, worse, or made no difference, with the points."""
    names = [*dict.fromkeys(arm.name for arm in found if arm.gain)]
    told = []
    for name in names:
        mine = [arm for arm in found if arm.name == name]
        pieces = []
        for verdict in ("better", "worse", "no difference seen", "too few seeds"):
            for reference in dict.fromkeys(arm.reference for arm in mine):
                there = [arm for arm in mine if (arm.verdict, arm.reference) == (verdict, reference)]
                if there:
                    places = ", ".join(f"{arm.case} ({arm.points:+.1f})" for arm in there)
                    against = {"better": "better than", "worse": "worse than"}.get(verdict, f"{verdict} against")
                    pieces.append(f"{against} {reference}: {places}")
        told.append((name, "; ".join(pieces)))
    return told


def headline(found: Sequence[Arm]) -> str:
    """The answer in a sentence."""
    if not found:
        return "Nothing was measured."
    if any(arm.verdict == "too few seeds" for arm in found):
        return f"Fewer than {SEEDS} seeds: the figures are there, but no verdict."
    better = [name for name, _ in sentences(found) if any(a.verdict == "better" for a in found if a.name == name)]
    if not better:
        return "None of the regimes was better than what it would replace in every seed."
    return f"Somewhere better than what they would replace, in every seed: {', '.join(better)}."
