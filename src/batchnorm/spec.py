"""Batch normalization as the paper defines it, in float64 NumPy: the truth that every kernel is held against.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", 2015.
Slow and plain on purpose. Input x is (N, C) or (N, C, *spatial); each channel has m = N·S values in a batch.

    mean, var    of the batch, var biased (divided by m)
    rstd         1 / sqrt(var + eps)
    xhat         (x - mean)·rstd
    z            gamma·xhat + beta [+ residual]
    y            act(z)
    g            the gradient at z
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Activation(NamedTuple):
    """A function of z and its derivative; `slope` is the negative slope, which only leaky_relu has."""

    value: Callable[[Array, float], Array]
    derivative: Callable[[Array, float], Array]


class Gradients(NamedTuple):
    """What backward hands down: to the input (N, C, *), to gamma and beta (C,), and to the residual (N, C, *)."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array


# --- Algorithm 1: the transform over a mini-batch ---------------------------------------------------------------------


def statistics(x: ArrayLike) -> tuple[Array, Array]:
    """mean = Σx/m and var = Σ(x - mean)²/m of each channel, (C,) each; NaN where m = 0."""
    x = np.asarray(x, np.float64)
    axes = _all_but_channels(x)
    m = count(x)
    if m == 0:
        nothing = np.full(x.shape[1], np.nan)
        return nothing, nothing.copy()
    mean = x.sum(axes) / m
    var = ((x - _over(mean, x)) ** 2).sum(axes) / m
    return mean, var


def normalize(x: ArrayLike, mean: ArrayLike, var: ArrayLike, eps: float) -> Array:
    """xhat = (x - mean) / sqrt(var + eps)."""
    x = np.asarray(x, np.float64)
    return (x - _over(mean, x)) / np.sqrt(_over(var, x) + eps)


def scale_and_shift(xhat: Array, gamma: ArrayLike | None = None, beta: ArrayLike | None = None) -> Array:
    """gamma·xhat + beta; None stands for gamma = 1 and for beta = 0."""
    z = xhat if gamma is None else _over(gamma, xhat) * xhat
    return z if beta is None else z + _over(beta, xhat)


def forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    act: str | None = None,
    slope: float = 0.01,
) -> Array:
    """y = act(gamma·xhat + beta [+ residual]) with the statistics of this batch (training)."""
    z = _preactivation(x, *statistics(x), gamma, beta, eps, residual)
    return ACTIVATIONS[act].value(z, slope)


def backward(
    grad_y: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    act: str | None = None,
    slope: float = 0.01,
) -> Gradients:
    """dbeta = Σg, dgamma = Σg·xhat, dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m), dresidual = g (training)."""
    mean, var = statistics(x)
    z = _preactivation(x, mean, var, gamma, beta, eps, residual)
    g = np.asarray(grad_y, np.float64) * ACTIVATIONS[act].derivative(z, slope)
    xhat = normalize(x, mean, var, eps)
    m = max(count(xhat), 1)
    dbeta = g.sum(_all_but_channels(g))
    dgamma = (g * xhat).sum(_all_but_channels(g))
    below = g - _over(dbeta, g) / m - xhat * _over(dgamma, g) / m
    return Gradients(scale_and_shift(below, gamma) / np.sqrt(_over(var, g) + eps), dgamma, dbeta, g)


# --- Algorithm 2: the running statistics, and inference with them -----------------------------------------------------


def update_running(
    running_mean: ArrayLike, running_var: ArrayLike, x: ArrayLike, momentum: float
) -> tuple[Array, Array]:
    """running ← (1 - momentum)·running + momentum·batch, where the batch's variance is unbiased (divided by m - 1).

    An empty batch has no statistics and moves nothing.
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
    z = _preactivation(x, running_mean, running_var, gamma, beta, eps, residual)
    return ACTIVATIONS[act].value(z, slope)


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
    """dx = gamma·rstd·g: the statistics are constants, nothing is projected out."""
    z = _preactivation(x, running_mean, running_var, gamma, beta, eps, residual)
    g = np.asarray(grad_y, np.float64) * ACTIVATIONS[act].derivative(z, slope)
    xhat = normalize(x, running_mean, running_var, eps)
    dx = scale_and_shift(g, gamma) / np.sqrt(_over(running_var, g) + eps)
    axes = _all_but_channels(g)
    return Gradients(dx, (g * xhat).sum(axes), g.sum(axes), g)


# --- the activations that a layer can fuse ----------------------------------------------------------------------------


def _sigmoid(z: Array) -> Array:
    return np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))


def _normal_cdf(z: Array) -> Array:
    return np.asarray(0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2))))


def _normal_pdf(z: Array) -> Array:
    return np.asarray(np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))


def _sigmoid_derivative(z: Array) -> Array:
    s = _sigmoid(z)
    return s * (1 - s)


def _silu_derivative(z: Array) -> Array:
    s = _sigmoid(z)
    return s * (1 + z * (1 - s))


def _hardswish_derivative(z: Array) -> Array:
    return np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, z / 3 + 0.5))


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(lambda z, _: z, lambda z, _: np.ones_like(z)),
    "relu": Activation(lambda z, _: np.maximum(z, 0), lambda z, _: np.where(z > 0, 1.0, 0.0)),
    "relu6": Activation(lambda z, _: np.clip(z, 0, 6), lambda z, _: np.where((z > 0) & (z < 6), 1.0, 0.0)),
    "leaky_relu": Activation(lambda z, a: np.where(z > 0, z, a * z), lambda z, a: np.where(z > 0, 1.0, a)),
    "elu": Activation(
        lambda z, _: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
        lambda z, _: np.where(z > 0, 1.0, np.exp(np.minimum(z, 0))),
    ),
    "gelu": Activation(lambda z, _: z * _normal_cdf(z), lambda z, _: _normal_cdf(z) + z * _normal_pdf(z)),
    "silu": Activation(lambda z, _: z * _sigmoid(z), lambda z, _: _silu_derivative(z)),
    "hardswish": Activation(lambda z, _: z * np.clip(z + 3, 0, 6) / 6, lambda z, _: _hardswish_derivative(z)),
    "sigmoid": Activation(lambda z, _: _sigmoid(z), lambda z, _: _sigmoid_derivative(z)),
    "tanh": Activation(lambda z, _: np.tanh(z), lambda z, _: 1 - np.tanh(z) ** 2),
}


# --- shapes -----------------------------------------------------------------------------------------------------------


def count(x: NDArray[np.generic]) -> int:
    """m = N·S, the number of values that each channel has in the batch."""
    return math.prod(x.shape) // x.shape[1] if x.shape[1] else 0


def _preactivation(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    eps: float,
    residual: ArrayLike | None,
) -> Array:
    z = scale_and_shift(normalize(x, mean, var, eps), gamma, beta)
    return z if residual is None else z + np.asarray(residual, np.float64)


def _all_but_channels(x: NDArray[np.generic]) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _over(per_channel: ArrayLike, x: NDArray[np.generic]) -> Array:
    """Per-channel values (C,) shaped to broadcast over x."""
    return np.asarray(per_channel, np.float64).reshape(1, -1, *[1] * (x.ndim - 2))
