"""Definitions of the variants of batch norm in float64 NumPy, based on `batchnorm.spec`.

Simple and slow on purpose, with gradients; tests compare the layers with them. A batch spread over processes needs no
definition: it is `spec.forward` and `spec.backward` of the whole batch. `affine` is gamma, or gamma and beta.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm import spec
from batchnorm.activations import Array
from batchnorm.spec import Gradients

# --- masked: statistics over the valid positions, y = 0 elsewhere -----------------------------------------------------


def masked_forward(x: ArrayLike, mask: ArrayLike, *affine: ArrayLike | None, eps: float = 1e-5) -> Array:
    """y of x (N, C, *) at the positions where mask (N, *) is true, with statistics over these positions."""
    x, mask = np.asarray(x, np.float64), np.asarray(mask, bool)
    return _put_back(spec.forward(_rows(x, mask), *affine, eps=eps), x, mask)


def masked_backward(
    grad_y: ArrayLike, x: ArrayLike, mask: ArrayLike, *affine: ArrayLike | None, eps: float = 1e-5
) -> Gradients:
    """What arrives where mask is false reaches nothing."""
    x, grad_y, mask = np.asarray(x, np.float64), np.asarray(grad_y, np.float64), np.asarray(mask, bool)
    found = spec.backward(_rows(grad_y, mask), _rows(x, mask), *affine, eps=eps)
    return Gradients(_put_back(found.dx, x, mask), found.dgamma, found.dbeta, _put_back(found.dresidual, x, mask))


# --- renormalized: xhat·r + d (Ioffe 2017, Algorithm 1) ---------------------------------------------------------------


def renorm_correction(
    x: ArrayLike, running_mean: ArrayLike, running_var: ArrayLike, rmax: float, dmax: float, eps: float = 1e-5
) -> tuple[Array, Array]:
    """r = clip(sigma_B/sigma, 1/rmax, rmax) and d = clip((mean_B - mean)/sigma, -dmax, dmax), sigma² = var + eps."""
    mean, var = spec.statistics(x)
    sigma = np.sqrt(np.asarray(running_var, np.float64) + eps)
    r = np.clip(np.sqrt(var + eps) / sigma, 1 / rmax, rmax)
    return r, np.clip((mean - np.asarray(running_mean, np.float64)) / sigma, -dmax, dmax)


def renorm_forward(x: ArrayLike, r: Array, d: Array, *affine: ArrayLike | None, eps: float = 1e-5) -> Array:
    """y = gamma·(xhat·r + d) + beta."""
    return spec.scale_and_shift(spec.scale_and_shift(spec.normalize(x, *spec.statistics(x), eps), r, d), *affine)


def renorm_backward(
    grad_y: ArrayLike, x: ArrayLike, r: Array, d: Array, *affine: ArrayLike | None, eps: float = 1e-5
) -> Gradients:
    """r and d are constants: dx is that of a batch norm with gamma·r, dgamma = Σ g·(xhat·r + d), dbeta = Σ g."""
    gamma = 1.0 if not affine or affine[0] is None else np.asarray(affine[0], np.float64)
    found = spec.backward(grad_y, x, gamma * r, eps=eps)
    return Gradients(found.dx, found.dgamma * r + found.dbeta * d, found.dbeta, found.dresidual)


# --- virtual batches (Hoffer et al. 2017, Algorithm 1) ----------------------------------------------------------------


def ghost_forward(x: ArrayLike, ghosts: int, *affine: ArrayLike | None, eps: float = 1e-5) -> Array:
    """Each of `ghosts` parts of the batch, as even as they go, is a batch of its own."""
    parts = np.array_split(np.asarray(x, np.float64), ghosts)
    return np.concatenate([spec.forward(part, *affine, eps=eps) for part in parts])


def ghost_backward(
    grad_y: ArrayLike, x: ArrayLike, ghosts: int, *affine: ArrayLike | None, eps: float = 1e-5
) -> Gradients:
    """gamma and beta are shared: their gradients add up."""
    parts = (np.array_split(np.asarray(each, np.float64), ghosts) for each in (grad_y, x))
    found = [spec.backward(g, part, *affine, eps=eps) for g, part in zip(*parts, strict=True)]
    whole = [np.concatenate([each[at] for each in found]) for at in (0, 3)]
    return Gradients(whole[0], sum(f.dgamma for f in found), sum(f.dbeta for f in found), whole[1])  # type: ignore[arg-type]


def ghost_running(
    running_mean: ArrayLike, running_var: ArrayLike, x: ArrayLike, ghosts: int, momentum: float
) -> tuple[Array, Array]:
    """running ← (1 - momentum)·running + momentum·(mean over the parts, each by its size, of what each has)."""
    parts = np.array_split(np.asarray(x, np.float64), ghosts)
    moved = np.array([spec.update_running(running_mean, running_var, part, momentum) for part in parts])
    mean, var = np.average(moved, axis=0, weights=[len(part) for part in parts])
    return mean, var


# --- adapted at test time (Schneider et al. 2020, section 3) ----------------------------------------------------------


def adapted_statistics(
    x: ArrayLike, running_mean: ArrayLike, running_var: ArrayLike, prior: float
) -> tuple[Array, Array]:
    """(prior·running + n·batch)/(prior + n) of the mean and of the biased variance, n the number of samples of x."""
    n, (mean, var) = len(np.asarray(x)), spec.statistics(x)
    share = n / (prior + n)
    return (
        (1 - share) * np.asarray(running_mean, np.float64) + share * mean,
        (1 - share) * np.asarray(running_var, np.float64) + share * var,
    )


def _rows(x: Array, mask: NDArray[np.bool_]) -> Array:
    return np.moveaxis(x, 1, -1)[mask]


def _put_back(rows: Array, x: Array, mask: NDArray[np.bool_]) -> Array:
    whole = np.zeros_like(np.moveaxis(x, 1, -1))
    whole[mask] = rows
    return np.moveaxis(whole, -1, 1)
