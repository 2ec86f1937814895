"""Batch normalization as the paper defines it, in float64 NumPy: the reference for every kernel.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", 2015.
Simple and slow on purpose. Input x is (N, C) or (N, C, *spatial); each channel has m = N·S values in a batch.

    mean, var    of the batch, var biased (divided by m)
    rstd         1 / sqrt(var + eps)
    xhat         (x - mean)·rstd
    z            gamma·xhat + beta [+ residual]
    y            act(z)
    g            the gradient at z
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm.activations import ACTIVATIONS, Array


class Gradients(NamedTuple):
    """Gradients of the input (N, C, *), of gamma and beta (C,), and of the residual (N, C, *)."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array


# --- Algorithm 1: the transform over a mini-batch ---------------------------------------------------------------------


def statistics(x: ArrayLike) -> tuple[Array, Array]:
    """mean = Σx/m and var = Σ(x - mean)²/m of each channel, (C,) each; NaN where m = 0."""
    x = np.asarray(x, np.float64)
    axes = reduced_axes(x)
    m = count(x)
    if m == 0:
        return np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    mean = x.sum(axes) / m
    var = ((x - _over(mean, x)) ** 2).sum(axes) / m
    return mean, var


def normalize(x: ArrayLike, mean: ArrayLike, var: ArrayLike, eps: float) -> Array:
    """xhat = (x - mean) / sqrt(var + eps)."""
    x = np.asarray(x, np.float64)
    return (x - _over(mean, x)) / np.sqrt(_over(var, x) + eps)


def scale_and_shift(xhat: Array, gamma: ArrayLike | None = None, beta: ArrayLike | None = None) -> Array:
    """gamma·xhat + beta; None means gamma = 1 or beta = 0."""
    z = xhat if gamma is None else _over(gamma, xhat) * xhat
    return z if beta is None else z + _over(beta, xhat)


def forward(x: ArrayLike, gamma: ArrayLike | None = None, beta: ArrayLike | None = None, **how: Any) -> Array:
    """`forward_inference` (with its keywords) by the statistics of this batch (training)."""
    return forward_inference(x, *statistics(x), gamma, beta, **how)


def backward(
    grad_y: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    **how: Any,
) -> Gradients:
    """dbeta = Σg, dgamma = Σg·xhat, dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m), dresidual = g (training)."""
    mean, var = statistics(x)
    _, dgamma, dbeta, g = backward_inference(grad_y, x, mean, var, gamma, beta, eps=eps, **how)
    xhat = normalize(x, mean, var, eps)
    m = max(count(xhat), 1)
    projected = g - _over(dbeta, g) / m - xhat * _over(dgamma, g) / m
    return Gradients(scale_and_shift(projected, gamma) / np.sqrt(_over(var, g) + eps), dgamma, dbeta, g)


# --- Algorithm 2: the running statistics, and inference with them -----------------------------------------------------


def update_running(
    running_mean: ArrayLike, running_var: ArrayLike, x: ArrayLike, momentum: float
) -> tuple[Array, Array]:
    """running ← (1 - momentum)·running + momentum·batch, where the batch's variance is unbiased (divided by m - 1).

    An empty batch changes nothing.
    """
    running_mean, running_var = np.asarray(running_mean, np.float64), np.asarray(running_var, np.float64)
    m = count(np.asarray(x))
    if m == 0:
        return running_mean, running_var
    mean, var = statistics(x)
    unbiased = var * m / (m - 1)
    return (1 - momentum) * running_mean + momentum * mean, (1 - momentum) * running_var + momentum * unbiased


def forward_inference(
    x: ArrayLike,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    act: str | None = None,
    slope: float = 0.01,
) -> Array:
    """y = act(gamma·(x - running_mean)/sqrt(running_var + eps) + beta [+ residual])."""
    z = scale_and_shift(normalize(x, running_mean, running_var, eps), gamma, beta)
    return activation(z if residual is None else z + np.asarray(residual, np.float64), act, slope)


def backward_inference(
    grad_y: ArrayLike,
    x: ArrayLike,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    act: str | None = None,
    slope: float = 0.01,
) -> Gradients:
    """dx = gamma·rstd·g, since the statistics are constants."""
    z = forward_inference(x, running_mean, running_var, gamma, beta, eps=eps, residual=residual)
    g = np.asarray(grad_y, np.float64) * derivative(z, act, slope)
    xhat = normalize(x, running_mean, running_var, eps)
    dx = scale_and_shift(g, gamma) / np.sqrt(_over(running_var, g) + eps)
    axes = reduced_axes(g)
    return Gradients(dx, (g * xhat).sum(axes), g.sum(axes), g)


# --- activations, defined by `batchnorm.activations` ------------------------------------------------------------------


def activation(z: Array, act: str | None, slope: float = 0.01) -> Array:
    """act(z); z where act is None."""
    return z if act is None else ACTIVATIONS[act].value(z, slope)


def derivative(z: Array, act: str | None, slope: float = 0.01) -> Array:
    """act'(z); 1 where act is None."""
    return np.ones_like(z) if act is None else ACTIVATIONS[act].derivative(z, slope)


# --- shapes -----------------------------------------------------------------------------------------------------------


def count(x: NDArray[np.generic]) -> int:
    """m = N·S, the number of values per channel."""
    return math.prod(x.shape) // x.shape[1] if x.shape[1] else 0


def reduced_axes(x: NDArray[np.generic]) -> tuple[int, ...]:
    """The axes that per-channel sums reduce: all but axis 1."""
    return (0, *range(2, x.ndim))


def _over(per_channel: ArrayLike, x: NDArray[np.generic]) -> Array:
    """Per-channel values (C,) shaped to broadcast over x."""
    return np.asarray(per_channel, np.float64).reshape(1, -1, *[1] * (x.ndim - 2))
