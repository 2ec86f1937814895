"""Quantities that measure what gamma and beta do: pure functions, per unit, of sums that the kernels compute.

Unless noted, arguments are arrays over units (C,) or one number for all, and results are float64 arrays (C,). Nothing
here imports torch. Symbols, for one unit and one batch of m values:

    mean, var      of the unit's input x over the batch, var biased
    s              sqrt(var + eps), the divisor of x
    gamma, beta    the learned scale and shift: y = gamma·(x - mean)/s + beta
    g              the gradient at y; dbeta = Σg, dgamma = Σg·xhat, energy = Σg²

"Undone" means that y = x: gamma = s and beta = mean. Every unit is in exactly one of CLASSES (`unit_class`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm.spec import derivative

Array = NDArray[np.float64]

PERCENTILES = (15, 50, 85)
LINEAR_REGIME = 0.9

UNDONE = 0.5
"""Threshold of undo_index: from it on, the unit is at least halfway from bare normalization to the identity."""
MOVED = 0.1
"""Threshold of |undo_index|: a smaller change does not count."""
SAME = 0.1
"""Threshold of bare_distance: if the RMS of x̂ - x is smaller, there is nothing to undo."""
DEAD_SHARE = 0.01
"""Threshold of the output's deviation, relative to its RMS over the layer's units: a unit below it is dead."""
LEAST_BARE_ANGLE = 1.0
"""In degrees: with a smaller bare_angle, angle_ratio is undefined."""

CLASSES = ("undone", "toward", "neither", "away", "nothing_to_undo", "dead", "unknown")
"""In the order in which charts draw them; `unit_class` returns indices."""
CLASS_DEFINITIONS: Mapping[str, str] = {
    "unknown": "a needed value is missing or not finite",
    "dead": f"|gamma|·sqrt(var/(var + eps)) is 0, or below {DEAD_SHARE:.0%} of its RMS over the layer's units",
    "nothing_to_undo": f"bare normalization is already the identity: sqrt((1 - s)² + mean²) < {SAME:g}",
    "undone": f"undo_index >= {UNDONE:g}",
    "toward": f"{MOVED:g} <= undo_index < {UNDONE:g}",
    "neither": f"-{MOVED:g} < undo_index < {MOVED:g}",
    "away": f"undo_index <= -{MOVED:g}",
}
"""The condition of each class. The first that is true wins."""


def class_names(codes: ArrayLike) -> list[str]:
    """The names of the codes that `unit_class` returns; NaN is unknown."""
    indices = np.nan_to_num(np.asarray(codes, np.float64), nan=float(CLASSES.index("unknown"))).astype(np.int64)
    return [CLASSES[index] for index in indices.ravel().tolist()]


def _quiet() -> np.errstate:
    """Silence NumPy's warnings: undefined values become NaN, and a study goes on if one of its networks diverges."""
    return np.errstate(divide="ignore", invalid="ignore", over="ignore")


@_quiet()
def scale(var: ArrayLike, eps: ArrayLike) -> Array:
    """s = sqrt(var + eps). Range: s > 0; s = 0 only where both are 0."""
    return np.sqrt(_f64(var) + _f64(eps))


@_quiet()
def undo_distance(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """sqrt((gamma - s)² + (beta - mean)²): the RMS of y - x over the batch, exact up to eps. Range: >= 0; 0: undone."""
    return np.hypot(_f64(gamma) - scale(var, eps), _f64(beta) - _f64(mean))


@_quiet()
def bare_distance(mean: ArrayLike, var: ArrayLike, eps: ArrayLike) -> Array:
    """sqrt((1 - s)² + mean²): the RMS of xhat - x over the batch, exact up to eps. Range: >= 0; 0: x is normalized."""
    return np.hypot(1 - scale(var, eps), _f64(mean))


@_quiet()
def undo_index(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """1 - undo_distance / bare_distance.

    1: the identity is restored. 0: as far from the identity as bare normalization (gamma = 1, beta = 0). Below 0:
    farther, without bound. NaN if there is nothing to undo (bare_distance < 0.1): dividing by so small a number would
    make the index large without meaning.
    """
    bare = bare_distance(mean, var, eps)
    return np.where(bare < SAME, np.nan, 1 - undo_distance(mean, var, eps, gamma, beta) / bare)


@_quiet()
def undo_angle(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """The angle between (gamma, beta) and (s, mean), in degrees: how far y is from x up to a positive factor.

    0: y = c·x with c > 0, which the next layer can absorb. 180: y = -c·x. Multiplying the weights below by c > 0
    multiplies s and mean by c; up to eps it changes neither this angle nor the network's output. Range: 0..180; NaN if
    gamma = beta = 0.
    """
    return _angle(gamma, beta, scale(var, eps), _f64(mean))


@_quiet()
def bare_angle(mean: ArrayLike, var: ArrayLike, eps: ArrayLike) -> Array:
    """The angle between (1, 0) and (s, mean), in degrees: undo_angle at gamma = 1 and beta = 0. Range: 0..90."""
    return _angle(1.0, 0.0, scale(var, eps), _f64(mean))


@_quiet()
def angle_ratio(undo: ArrayLike, bare: ArrayLike) -> Array:
    """undo_angle / bare_angle. 0: undone up to a factor. 1: as far as bare normalization. NaN if bare < 1°."""
    undo, bare = _f64(undo), _f64(bare)
    return np.where(bare < LEAST_BARE_ANGLE, np.nan, undo / bare)


def undoing(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> dict[str, Array]:
    """s and every measure of undoing by name: the columns that studies store."""
    return {
        "s": scale(var, eps),
        "undo_distance": undo_distance(mean, var, eps, gamma, beta),
        "undo_index": undo_index(mean, var, eps, gamma, beta),
        "undo_angle": undo_angle(mean, var, eps, gamma, beta),
        "bare_angle": bare_angle(mean, var, eps),
    }


@_quiet()
def position_in(mean: ArrayLike, var: ArrayLike, eps: ArrayLike) -> Array:
    """mean/s: the input's mean in units of its deviation; independent of the scale of the weights below."""
    return _f64(mean) / scale(var, eps)


@_quiet()
def position_out(gamma: ArrayLike, beta: ArrayLike) -> Array:
    """beta/gamma: the output's mean in units of its deviation. Not finite if gamma = 0; position_in if undone."""
    return _f64(beta) / _f64(gamma)


def positive_share(values: ArrayLike) -> Array:
    """The share of `values` (m, C) above 0, per unit: `positive_in` of x, `positive_out` of y.

    Range: 0..1; NaN if there are no values or one of them is NaN.
    """
    return _share(_f64(values) > 0, _f64(values))


def percentiles(values: NDArray[np.floating]) -> Array:
    """The {15, 50, 85}th percentiles (3, C) of values (m, C), interpolated linearly; NaN without values.

    np.partition selects them in the values' type: np.percentile is several times slower here.
    """
    if len(values) == 0:
        return np.full((len(PERCENTILES), *values.shape[1:]), np.nan)
    position = np.asarray(PERCENTILES) / 100 * (len(values) - 1)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, len(values) - 1)
    indices = np.unique([*below, *above, len(values) - 1])  # NaN sorts last
    ordered = np.partition(np.ascontiguousarray(values.T), indices, axis=1).astype(np.float64)
    interpolated = ordered[:, below] * (1 - (position - below)) + ordered[:, above] * (position - below)
    return np.asarray(np.where(np.isnan(ordered[:, -1:]), np.nan, interpolated).T)


@_quiet()
def gradient_diverted(
    dgamma: ArrayLike, dbeta: ArrayLike, energy: ArrayLike, var: ArrayLike, eps: ArrayLike, m: ArrayLike
) -> Array:
    """(dbeta²/m + dgamma²/(m·var/(var + eps))) / Σg²: the share of the gradient's energy that stays in beta and gamma.

    This part of g never reaches the layers below, for any gamma and beta: it is the projection of g onto 1 and xhat,
    with ||1||² = m and ||xhat||² = m·var/(var + eps). Range: 0..1. NaN if no gradient arrived (Σg² = 0). A constant
    input (var = 0) has no xhat, and only the first term counts.
    """
    var, dgamma, dbeta, energy, eps, m = (_f64(values) for values in (var, dgamma, dbeta, energy, eps, m))
    along_xhat = np.where(var == 0, 0.0, dgamma**2 * (var + eps) / (m * var))
    return np.where(energy > 0, (dbeta**2 / m + along_xhat) / energy, np.nan)


@_quiet()
def eval_gap(mean: ArrayLike, var: ArrayLike, running_mean: ArrayLike, running_var: ArrayLike, eps: ArrayLike) -> Array:
    """sqrt(((mean - running_mean)/r)² + (s/r - 1)²), r = sqrt(running_var + eps): the gap between eval and training.

    The RMS over the batch of y in inference minus y in training, in units of |gamma|, exact up to eps. Range: >= 0;
    0: both normalize this batch in the same way. About sqrt(1.5/m) if the running statistics are those of the
    population and the batch's m values are independent and normal.
    """
    r = scale(running_var, eps)
    return np.hypot((_f64(mean) - _f64(running_mean)) / r, scale(var, eps) / r - 1)


@_quiet()
def effective_lr(lr: ArrayLike, weight_norm: ArrayLike) -> Array:
    """lr/||w||²: how fast the direction of a unit's weights changes; the norm makes their scale irrelevant.

    `weight_norm` is the Euclidean norm of the weights that produce the unit. Range: >= 0; NaN if it is unknown.
    """
    return _f64(lr) / _f64(weight_norm) ** 2


class BatchNoise(NamedTuple):
    """How much the statistics vary between batches, which no constant gamma and beta can undo."""

    mean: Array
    log_scale: Array


@_quiet()
def batch_noise(means: ArrayLike, variances: ArrayLike, eps: ArrayLike) -> BatchNoise:
    """Var over batches of mean_B, divided by the mean variance within them, and Var over batches of log s_B.

    `means` and `variances` are (batches, C), at fixed weights. Range: >= 0. About 1/m and 1/(2m) for batches of m
    independent normal values. The variances over batches are unbiased; NaN with fewer than two batches.
    """
    means, variances = _f64(means), _f64(variances)
    if len(means) < 2:
        return BatchNoise(np.full(means.shape[1:], np.nan), np.full(means.shape[1:], np.nan))
    within = variances.mean(axis=0)
    relative = means.var(axis=0, ddof=1) / within
    return BatchNoise(relative, np.log(scale(variances, eps)).var(axis=0, ddof=1))


class Drift(NamedTuple):
    """The change of a distribution per step: of its location in deviations, and of the logarithm of its deviation."""

    location: Array
    log_scale: Array


@_quiet()
def drift(
    location: ArrayLike, deviation: ArrayLike, next_location: ArrayLike, next_deviation: ArrayLike, steps: float = 1
) -> Drift:
    """|Δlocation|/|deviation| and |Δlog|deviation||, per step, between two moments `steps` apart. Range: >= 0.

    `drift_in` is of (mean, s), of the same rows at both moments, so that sampling does not count as drift. `drift_out`
    is of (beta, gamma), which are the output's location and deviation by construction.
    """
    before, after = np.abs(_f64(deviation)), np.abs(_f64(next_deviation))
    location_change = np.abs(_f64(next_location) - _f64(location)) / before
    return Drift(location_change / steps, np.abs(np.log(after) - np.log(before)) / steps)


@_quiet()
def linear_share(y: ArrayLike, act: str | None, slope: float = 0.01) -> Array:
    """The share of pre-activations y (m, C) where act'(y) >= 0.9·max act': the paper's "linear regime".

    Range: 0..1; NaN if there are no values or one of them is NaN.
    """
    flags = derivative(_f64(y), act, slope) >= LINEAR_REGIME * _steepest(act, slope)
    return _share(flags, _f64(y))


@_quiet()
def output_deviation(var: ArrayLike, eps: ArrayLike, gamma: ArrayLike) -> Array:
    """|gamma|·sqrt(var/(var + eps)): the exact standard deviation of y over the batch. Range: >= 0; NaN if var < 0."""
    var = np.where(_f64(var) < 0, np.nan, _f64(var))
    return np.abs(_f64(gamma)) * np.sqrt(var / (var + _f64(eps)))


def silent(act: str | None, positive_out: ArrayLike) -> NDArray[np.bool_]:
    """Whether a ReLU or ReLU6 outputs only zeros: `positive_out`, the share of y > 0 in the batch, is 0."""
    return np.asarray((_f64(positive_out) == 0) & (act in ("relu", "relu6")))


@_quiet()
def dead(var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, silent: ArrayLike = False) -> Array:
    """1 for dead units, 0 for others, NaN if unknown. The last axis is a layer's units.

    A unit is dead if its output_deviation is 0, or below 1 % of its RMS over the layer's units, or if it is `silent`:
    its ReLU or ReLU6 outputs only zeros.
    """
    deviation = output_deviation(var, eps, gamma)
    known = np.isfinite(deviation)
    finite = np.where(known, deviation, 0.0)
    largest = np.max(finite, axis=-1, keepdims=True, initial=0.0)  # dividing by it prevents overflow of the squares
    squares = np.where(largest > 0, finite / largest, 0.0) ** 2
    count = np.maximum(known.sum(axis=-1, keepdims=True), 1)
    rms = largest * np.sqrt(squares.sum(axis=-1, keepdims=True) / count)
    is_dead = (deviation == 0) | (deviation < DEAD_SHARE * rms) | np.asarray(silent, bool)
    return np.where(known, is_dead.astype(np.float64), np.nan)


def unit_class(
    mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike, silent: ArrayLike = False
) -> Array:
    """The class of each unit as an index into CLASSES. The last axis is a layer's units.

    CLASS_DEFINITIONS has the conditions; the first that is true wins, in the order unknown, dead, nothing_to_undo,
    undone, toward, neither, away. `silent` as in `dead`.
    """
    is_dead = dead(var, eps, gamma, silent)
    index = undo_index(mean, var, eps, gamma, beta)
    bare = bare_distance(mean, var, eps)
    known = np.isfinite(undo_distance(mean, var, eps, gamma, beta)) & np.isfinite(bare) & ~np.isnan(is_dead)
    rules = (
        (~known, "unknown"),
        (is_dead == 1, "dead"),
        (bare < SAME, "nothing_to_undo"),
        (index >= UNDONE, "undone"),
        (index >= MOVED, "toward"),
        (index > -MOVED, "neither"),
    )
    codes = [float(CLASSES.index(name)) for _, name in rules]
    return np.select(np.broadcast_arrays(*(flags for flags, _ in rules)), codes, float(CLASSES.index("away")))


@cache
def _steepest(act: str | None, slope: float) -> float:
    """max act' on a grid from -10 to 10, where every activation of this package is steepest."""
    return float(derivative(np.linspace(-10, 10, 20001), act, slope).max())


def _angle(x: ArrayLike, y: ArrayLike, a: ArrayLike, b: ArrayLike) -> Array:
    """The angle between the vectors (x, y) and (a, b) in degrees."""
    x, y = _normalize(_f64(x), _f64(y))
    a, b = _normalize(_f64(a), _f64(b))
    return np.asarray(np.degrees(np.arctan2(np.abs(x * b - y * a), x * a + y * b)))


def _normalize(x: Array, y: Array) -> tuple[Array, Array]:
    """Divide a vector by its largest component, so that products neither overflow nor underflow."""
    largest = np.maximum(np.abs(x), np.abs(y))
    return x / largest, y / largest


def _f64(values: ArrayLike) -> Array:
    return np.asarray(values, np.float64)


def _share(flags: NDArray[np.bool_], values: Array) -> Array:
    """The mean of `flags` over the batch; NaN if one of the `values` is."""
    if len(flags) == 0:
        return np.full(flags.shape[1:], np.nan)
    return np.where(np.isnan(values).any(axis=0), np.nan, flags.mean(axis=0))
