"""What gamma and beta do, in numbers: pure functions, per unit, of what the kernels already hold.

Every argument is an array over units (C,), or one number for all, unless said otherwise, and every result is such an
array, in float64; nothing here imports torch. Symbols, for one unit and one batch of m values:

    mean, var      of the unit's input x over the batch, var biased
    s              sqrt(var + eps), what x is divided by
    gamma, beta    the learned scale and shift: y = gamma·(x - mean)/s + beta
    g              the gradient at y; dbeta = Σg, dgamma = Σg·xhat, energy = Σg²

"Undone" means that y = x again: gamma = s and beta = mean. Every unit is in exactly one of CLASSES (`unit_class`).
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
"""From here on a unit has gone half of the way back to the identity, or more."""
MOVED = 0.1
"""A tenth of the way, either way, is a move; less is none."""
SAME = 0.1
"""Where x̂ is within a tenth of a deviation of x (RMS), there is nothing to undo."""
DEAD_SHARE = 0.01
"""Of the RMS over the layer's units: the next layer cannot make use of less."""
LEAST_BARE_ANGLE = 1.0
"""In degrees: an angle smaller than this is no measure for another."""

CLASSES = ("undone", "toward", "neither", "away", "nothing_to_undo", "dead", "unknown")
"""In the order in which they are drawn; `unit_class` gives positions in it."""
CLASS_DEFINITIONS: Mapping[str, str] = {
    "unknown": "a needed value is missing or not finite",
    "dead": f"|gamma|·sqrt(var/(var + eps)) is 0, or below {DEAD_SHARE:.0%} of its RMS over the layer's units",
    "nothing_to_undo": f"bare normalization is already the identity: sqrt((1 - s)² + mean²) < {SAME:g}",
    "undone": f"undo_index >= {UNDONE:g}",
    "toward": f"{MOVED:g} <= undo_index < {UNDONE:g}",
    "neither": f"-{MOVED:g} < undo_index < {MOVED:g}",
    "away": f"undo_index <= -{MOVED:g}",
}
"""What puts a unit into a class. The first row that holds wins."""


def class_names(codes: ArrayLike) -> list[str]:
    """What `unit_class` returns, as words; unknown where a code is NaN."""
    found = np.nan_to_num(np.asarray(codes, np.float64), nan=float(CLASSES.index("unknown"))).astype(np.int64)
    return [CLASSES[code] for code in found.ravel().tolist()]


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


@_quiet()
def bare_distance(mean: ArrayLike, var: ArrayLike, eps: ArrayLike) -> Array:
    """sqrt((1 - s)² + mean²): the RMS of xhat - x over the batch, exact up to eps. Range: >= 0; 0: x is normalized."""
    return np.hypot(1 - scale(var, eps), _f64(mean))


@_quiet()
def undo_index(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """1 - undo_distance / bare_distance.

    1: the identity is restored. 0: as far from the identity as bare normalization (gamma = 1, beta = 0). Below 0:
    farther still, without bound. NaN where there is nothing to undo (bare_distance < 0.1): a small denominator would
    make the index arbitrarily large without any meaning.
    """
    bare = bare_distance(mean, var, eps)
    return np.where(bare < SAME, np.nan, 1 - undo_distance(mean, var, eps, gamma, beta) / bare)


@_quiet()
def undo_angle(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> Array:
    """The angle between (gamma, beta) and (s, mean), in degrees: how far y is from x up to a positive factor.

    0: y = c·x with c > 0, which the next layer can absorb. 180: y = -c·x. Multiplying the weights below by c > 0
    multiplies s and mean by c and changes neither this angle nor what the network computes, up to eps. Range: 0..180;
    NaN where gamma = beta = 0.
    """
    return _angle(gamma, beta, scale(var, eps), _f64(mean))


@_quiet()
def bare_angle(mean: ArrayLike, var: ArrayLike, eps: ArrayLike) -> Array:
    """The angle between (1, 0) and (s, mean), in degrees: undo_angle at gamma = 1 and beta = 0. Range: 0..90."""
    return _angle(1.0, 0.0, scale(var, eps), _f64(mean))


@_quiet()
def angle_ratio(undo: ArrayLike, bare: ArrayLike) -> Array:
    """undo_angle / bare_angle. 0: undone up to a factor. 1: as far off as bare normalization. NaN where bare < 1°."""
    undo, bare = _f64(undo), _f64(bare)
    return np.where(bare < LEAST_BARE_ANGLE, np.nan, undo / bare)


def undoing(mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike) -> dict[str, Array]:
    """s and every measure of how far gamma and beta undo, by name: the columns that studies store."""
    return {
        "s": scale(var, eps),
        "undo_distance": undo_distance(mean, var, eps, gamma, beta),
        "undo_index": undo_index(mean, var, eps, gamma, beta),
        "undo_angle": undo_angle(mean, var, eps, gamma, beta),
        "bare_angle": bare_angle(mean, var, eps),
    }


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
    flags = derivative(_f64(y), act, slope) >= LINEAR_REGIME * _steepest(act, slope)
    return _share(flags, _f64(y))


@_quiet()
def output_deviation(var: ArrayLike, eps: ArrayLike, gamma: ArrayLike) -> Array:
    """|gamma|·sqrt(var/(var + eps)): the standard deviation of y over the batch, exactly.

    Range: >= 0; NaN where var < 0.
    """
    var = np.where(_f64(var) < 0, np.nan, _f64(var))
    return np.abs(_f64(gamma)) * np.sqrt(var / (var + _f64(eps)))


def silent(act: str | None, positive_out: ArrayLike) -> NDArray[np.bool_]:
    """Whether a ReLU or ReLU6 lets nothing of a unit pass: `positive_out`, the share of y > 0 in the batch, is 0."""
    return np.asarray((_f64(positive_out) == 0) & (act in ("relu", "relu6")))


@_quiet()
def dead(var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, silent: ArrayLike = False) -> Array:
    """1 for a unit that passes nothing on, else 0; NaN where that is unknown. The last axis counts a layer's units.

    Dead is a unit whose output_deviation is 0, or below 1 % of its RMS over the layer's units. `silent` are units known
    to be dead for another reason: behind a ReLU or ReLU6, those without any y > 0 in the batch.
    """
    deviation = output_deviation(var, eps, gamma)
    known = np.isfinite(deviation)
    finite = np.where(known, deviation, 0.0)
    largest = np.max(finite, axis=-1, keepdims=True, initial=0.0)  # divided by it, the squares do not overflow
    squares = np.where(largest > 0, finite / largest, 0.0) ** 2
    count = np.maximum(known.sum(axis=-1, keepdims=True), 1)
    rms = largest * np.sqrt(squares.sum(axis=-1, keepdims=True) / count)
    lost = (deviation == 0) | (deviation < DEAD_SHARE * rms) | np.asarray(silent, bool)
    return np.where(known, lost.astype(np.float64), np.nan)


def unit_class(
    mean: ArrayLike, var: ArrayLike, eps: ArrayLike, gamma: ArrayLike, beta: ArrayLike, silent: ArrayLike = False
) -> Array:
    """The class of each unit, as its position in CLASSES. The last axis counts a layer's units.

    CLASS_DEFINITIONS has the rules; the first that holds of unknown, dead, nothing_to_undo, undone, toward, neither and
    away wins. `silent` is that of `dead`.
    """
    lost = dead(var, eps, gamma, silent)
    index = undo_index(mean, var, eps, gamma, beta)
    bare = bare_distance(mean, var, eps)
    known = np.isfinite(undo_distance(mean, var, eps, gamma, beta)) & np.isfinite(bare) & ~np.isnan(lost)
    rules = (
        (~known, "unknown"),
        (lost == 1, "dead"),
        (bare < SAME, "nothing_to_undo"),
        (index >= UNDONE, "undone"),
        (index >= MOVED, "toward"),
        (index > -MOVED, "neither"),
    )
    codes = [float(CLASSES.index(name)) for _, name in rules]
    return np.select(np.broadcast_arrays(*(flags for flags, _ in rules)), codes, float(CLASSES.index("away")))


@cache
def _steepest(act: str | None, slope: float) -> float:
    """max act', to within the grid: every activation here is steepest within 10 of zero."""
    return float(derivative(np.linspace(-10, 10, 20001), act, slope).max())


def _angle(x: ArrayLike, y: ArrayLike, a: ArrayLike, b: ArrayLike) -> Array:
    """Between the vectors (x, y) and (a, b), in degrees."""
    x, y = _shrunk(_f64(x), _f64(y))
    a, b = _shrunk(_f64(a), _f64(b))
    return np.asarray(np.degrees(np.arctan2(np.abs(x * b - y * a), x * a + y * b)))


def _shrunk(x: Array, y: Array) -> tuple[Array, Array]:
    """The vector divided by its largest component, so that products neither overflow nor vanish."""
    largest = np.maximum(np.abs(x), np.abs(y))
    return x / largest, y / largest


def _f64(values: ArrayLike) -> Array:
    return np.asarray(values, np.float64)


def _share(flags: NDArray[np.bool_], values: Array) -> Array:
    """The mean of `flags` over the batch, where all the `values` they are about are known."""
    if len(flags) == 0:
        return np.full(flags.shape[1:], np.nan)
    return np.where(np.isnan(values).any(axis=0), np.nan, flags.mean(axis=0))
