"""What a training logged, thinned for drawing: a few hundred points a name, evenly spread on the steps' axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.report.tables import Table

POINTS = 300
MOST_NAMES = 24


@dataclass(frozen=True)
class Scalar:
    """One name: `values` (3, len(steps)) hold the lowest, the mean and the highest value of each stretch of steps."""

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    last: float


def read_scalars(log: Table) -> tuple[Scalar, ...]:
    """Every name that has a finite value, in order of first appearance; at most `MOST_NAMES`."""
    if "name" not in log.words:
        return ()
    codes, names = log.words["name"]
    found = []
    finite = np.isfinite(log["value"])
    for code in dict.fromkeys(codes[finite].tolist()):
        rows = finite & (codes == code)
        found.append(_scalar(names[code], log["step"][rows].astype(np.int64), log["value"][rows]))
        if len(found) == MOST_NAMES:
            break
    return tuple(found)


def _scalar(name: str, steps: NDArray[np.int64], values: NDArray[np.float64]) -> Scalar:
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    place = np.log1p(np.maximum(steps, 0))
    stretch = np.floor(place * (POINTS / max(place[-1], 1e-9))).astype(np.int64)
    _, first, count = np.unique(stretch, return_index=True, return_counts=True)
    mean = np.add.reduceat(values, first) / count
    spread = np.stack([np.minimum.reduceat(values, first), mean, np.maximum.reduceat(values, first)])
    return Scalar(name, steps[first + count - 1], spread, float(values[-1]))
