"""Units of chosen classes: statistics, gamma and beta, by the definitions read the other way round."""

from __future__ import annotations

import numpy as np

from batchnorm.quantities import CLASSES

MEAN, VAR = 3.0, 16.0
"""With eps near 0 s is 4: the identity is (gamma, beta) = (4, 3), bare normalization is (1, 0)."""
BARE = np.hypot(3.0, 3.0)
# How far from the identity, in units of BARE, and so the undo_index: one minus it.
APART = {"undone": 0.2, "toward": 0.7, "neither": 1.0, "away": 1.6}


def unit(name: str, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """mean, var, gamma and beta of a unit of this class, off to a random side."""
    if name == "unknown":
        return MEAN, VAR, float("nan"), 0.0
    if name == "dead":
        return MEAN, VAR, 0.0, float(rng.normal())
    if name == "nothing_to_undo":
        return 0.02, 1.05, float(rng.uniform(1, 3)), float(rng.normal())
    angle = rng.uniform(-1.2, 1.2) if name != "away" else rng.uniform(0, 2 * np.pi)
    distance = APART[name] * BARE
    gamma = 4 + distance * np.cos(angle)  # on the far side of the identity: gamma stays well away from 0
    return MEAN, VAR, float(gamma if abs(gamma) > 0.5 else 0.5), float(3 + distance * np.sin(angle))


def units(names: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The arrays of a layer with these classes."""
    mean, var, gamma, beta = np.array([unit(name, rng) for name in names]).reshape(-1, 4).T
    return {"mean": mean, "var": var, "gamma": gamma, "beta": beta}


def mixture(rng: np.random.Generator, size: int) -> list[str]:
    """Random classes: of one kind, of a few, or of all; every third time none but the four that move."""
    pool = list(CLASSES[:4]) if rng.random() < 0.35 else list(CLASSES)
    shares = rng.dirichlet(np.full(len(pool), rng.choice([0.05, 0.3, 2.0])))
    return [str(name) for name in rng.choice(pool, size, p=shares)]
