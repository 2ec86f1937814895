"""What gamma and beta do, in numbers: pure functions, per unit, of what the kernels already hold.

Every argument is an array over units (C,), or one number for all, unless said otherwise, and every result is such an
array, in float64; nothing here imports torch. Symbols, for one unit and one batch of m values:

    mean, var      of the unit's input x over the batch, var biased
    s              sqrt(var + eps), what x is divided by
    gamma, beta    the learned scale and shift: y = gamma·(x - mean)/s + beta
    g              the gradient at y; dbeta = Σg, dgamma = Σg·xhat, energy = Σg²

"Undone" means that y = x again: gamma = s and beta = mean.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm.spec import ACTIVATIONS

Array = NDArray[np.float64]

PERCENTILES = (15, 50, 85)
DEAD_GAMMA = 1e-2
LINEAR_REGIME = 0.9


def _quiet() -> np.errstate:
    """What cannot be known is NaN in the result, not a warning: a study goes on when one of its networks diverges."""
    return np.errstate(divide="ignore", invalid="ignore", over="ignore")


@_quiet()
def scale(var: ArrayLike, eps: ArrayLike) -> Array:
    """s = sqrt(var + eps). Range: s > 0; s = 0 only where both are 0."""
    return np.sqrt(_f64(var) + _f64(eps))


@_quiet()
def undo_distance(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """sqrt((gamma - s)² + (beta - mean)²): the RMS of y - x over the batch, exact up to eps. Range: >= 0; 0: undone."""
    return np.hypot(_f64(gamma) - scale(var, eps), _f64(beta) - _f64(mean))


def normalized_distance(gamma: ArrayLike, beta: ArrayLike) -> Array:
    """sqrt((gamma - 1)² + beta²): the RMS of y - xhat over the batch, exact up to eps. Range: >= 0; 0 is bare."""
    return np.hypot(_f64(gamma) - 1, _f64(beta))


@_quiet()
def undo_index(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """1 - undo_distance / sqrt((1 - s)² + mean²).

    1: the identity is restored. 0: as far from the identity as bare normalization (gamma = 1, beta = 0). Below 0:
    farther still, without bound. NaN where bare normalization is the identity (the denominator is 0).
    """
    bare = np.hypot(1 - scale(var, eps), _f64(mean))
    return np.where(bare == 0, np.nan, 1 - undo_distance(mean, var, eps, gamma, beta) / bare)


@_quiet()
def nearer_undone(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """1 where y is nearer to x than to xhat (undo_distance < normalized_distance), 0 where not, NaN where unknown."""
    undone, bare = undo_distance(mean, var, eps, gamma, beta), normalized_distance(gamma, beta)
    return np.where(np.isnan(undone) | np.isnan(bare), np.nan, undone < bare)


@_quiet()
def position_in(mean: ArrayLike, var: ArrayLike, eps: ArrayLike) -> Array:
    """mean/s: how many deviations the input's mean lies above zero; free of the scale of the weights below."""
    return _f64(mean) / scale(var, eps)


@_quiet()
def position_out(gamma: ArrayLike, beta: ArrayLike) -> Array:
    """beta/gamma: the same for the output. Infinite or NaN where gamma = 0. Equal to position_in where undone."""
    return _f64(beta) / _f64(gamma)


def positive_share(values: ArrayLike) -> Array:
    """The share of `values` (m, C) above 0, per unit: `positive_in` of x, `positive_out` of y.

    Range: 0..1; NaN where there are no values, or one of them is NaN.
    """
    return _share(_f64(values) > 0, _f64(values))


def percentiles(values: NDArray[np.floating]) -> Array:
    """The {15, 50, 85}th percentiles of each unit (3, C) of values (m, C), interpolated linearly; NaN of no values.

    They are selected, not sorted for, in the type the values have: NumPy's own percentile is several times slower here.
    """
    if len(values) == 0:
        return np.full((len(PERCENTILES), *values.shape[1:]), np.nan)
    place = np.asarray(PERCENTILES) / 100 * (len(values) - 1)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, len(values) - 1)
    chosen = np.unique([*below, *above, len(values) - 1])  # the last is NaN where any value is
    ordered = np.partition(np.ascontiguousarray(values.T), chosen, axis=1).astype(np.float64)
    found = ordered[:, below] * (1 - (place - below)) + ordered[:, above] * (place - below)
    return np.asarray(np.where(np.isnan(ordered[:, -1:]), np.nan, found).T)


@_quiet()
def gradient_diverted(
    dgamma: ArrayLike, dbeta: ArrayLike, energy: ArrayLike, var: ArrayLike, eps: ArrayLike, m: ArrayLike
) -> Array:
    """(dbeta²/m + dgamma²/(m·var/(var + eps))) / Σg²: the share of the gradient's energy that stays in beta and gamma.

    That much of g never reaches the layers below, whatever gamma and beta are: it is the part of g along 1 and along
    xhat, and ||1||² = m, ||xhat||² = m·var/(var + eps). Range: 0..1. NaN where no gradient arrived (Σg² = 0); a
    constant input (var = 0) has no xhat, and only the first term counts.
    """
    var, dgamma, dbeta, energy, eps, m = (_f64(each) for each in (var, dgamma, dbeta, energy, eps, m))
    along_xhat = np.where(var == 0, 0.0, dgamma**2 * (var + eps) / (m * var))
    return np.where(energy > 0, (dbeta**2 / m + along_xhat) / energy, np.nan)


@_quiet()
def eval_gap(mean: ArrayLike, var: ArrayLike, running_mean: ArrayLike, running_var: ArrayLike, eps: ArrayLike) -> Array:
    """sqrt(((mean - running_mean)/r)² + (s/r - 1)²), r = sqrt(running_var + eps): how far inference is from training.

    The RMS over the batch of y in inference minus y in training, in units of |gamma|, exact up to eps. Range: >= 0;
    0: both normalize this batch alike. About sqrt(1.5/m) where the running statistics are those of the population and
    the batch's m values are independent and normal.
    """
    r = scale(running_var, eps)
    return np.hypot((_f64(mean) - _f64(running_mean)) / r, scale(var, eps) / r - 1)


@_quiet()
def effective_lr(lr: ArrayLike, weight_norm: ArrayLike) -> Array:
    """lr/||w||²: how fast the direction of a unit's weights turns, which is all that matters behind a norm.

    `weight_norm` is the Euclidean norm of the weights that produce the unit. Range: >= 0; NaN where they are unknown.
    """
    return _f64(lr) / _f64(weight_norm) ** 2


class BatchNoise(NamedTuple):
    """How much a batch's own statistics differ from batch to batch: the part that no constant gamma, beta can undo."""

    mean: Array
    log_scale: Array


@_quiet()
def batch_noise(means: ArrayLike, variances: ArrayLike, eps: ArrayLike) -> BatchNoise:
    """Var over batches of mean_B, divided by the mean variance within them, and Var over batches of log s_B.

    `means` and `variances` are (batches, C), at fixed weights. Range: >= 0. About 1/m and 1/(2m) for m independent
    normal values a batch. The variances over batches are unbiased; NaN from fewer than two batches.
    """
    means, variances = _f64(means), _f64(variances)
    if len(means) < 2:
        nothing = np.full(means.shape[1:], np.nan)
        return BatchNoise(nothing, nothing.copy())
    within = variances.mean(axis=0)
    relative = means.var(axis=0, ddof=1) / within
    return BatchNoise(relative, np.log(scale(variances, eps)).var(axis=0, ddof=1))


class Drift(NamedTuple):
    """How far a distribution moved per step: its location in deviations, and the logarithm of its deviation."""

    location: Array
    log_scale: Array


@_quiet()
def drift(
    location: ArrayLike, deviation: ArrayLike, next_location: ArrayLike, next_deviation: ArrayLike, steps: float = 1
) -> Drift:
    """|Δlocation|/|deviation| and |Δlog|deviation||, per step, between two moments `steps` apart. Range: >= 0.

    `drift_in` is of (mean, s), on the same rows at both moments so that sampling is no drift; `drift_out` of
    (beta, gamma), which is the output's distribution by construction.
    """
    before, after = np.abs(_f64(deviation)), np.abs(_f64(next_deviation))
    location_moved = np.abs(_f64(next_location) - _f64(location)) / before
    return Drift(location_moved / steps, np.abs(np.log(after) - np.log(before)) / steps)


@_quiet()
def linear_share(y: ArrayLike, act: str | None, slope: float = 0.01) -> Array:
    """The share of pre-activations y (m, C) where act'(y) >= 0.9·max act': the paper's "linear regime".

    Range: 0..1; NaN where there are no values, or one of them is NaN.
    """
    flags = ACTIVATIONS[act].derivative(_f64(y), slope) >= LINEAR_REGIME * _steepest(act, slope)
    return _share(flags, _f64(y))


def dead(act: str | None, gamma: ArrayLike | None = None, positive_out: ArrayLike | None = None) -> Array:
    """1 for a lost unit, else 0: |gamma| < 1e-2 under any activation; under ReLU also no y > 0 in the batch.

    Pass what there is: gamma None where there is no scale, positive_out None where the batch was not looked at.
    """
    if gamma is None and positive_out is None:
        raise ValueError("dead() needs gamma, positive_out or both")
    lost: NDArray[np.bool_] = np.asarray(False)
    if gamma is not None:
        lost = lost | (np.abs(_f64(gamma)) < DEAD_GAMMA)
    if positive_out is not None and act in ("relu", "relu6"):
        lost = lost | (_f64(positive_out) == 0)
    return lost.astype(np.float64)


@cache
def _steepest(act: str | None, slope: float) -> float:
    """max act', to within the grid: every activation here is steepest within 10 of zero."""
    return float(ACTIVATIONS[act].derivative(np.linspace(-10, 10, 20001), slope).max())


def _f64(values: ArrayLike) -> Array:
    return np.asarray(values, np.float64)


def _share(flags: NDArray[np.bool_], values: Array) -> Array:
    """The mean of `flags` over the batch, where all the `values` they are about are known."""
    if len(flags) == 0:
        return np.full(flags.shape[1:], np.nan)
    return np.where(np.isnan(values).any(axis=0), np.nan, flags.mean(axis=0))
