"""Forward and backward in Triton, one launch each: a program holds all values of its channels in registers.

Between reducing them and applying the result nothing is read again: forward reads x once and writes y once, backward
reads grad_y, x and what tells act' once. For channels that a program can hold (`gpu_plan.resident`); programs need not
wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu_activations import value as activated
from batchnorm.kernels.gpu_backward import at_preactivation
from batchnorm.kernels.gpu_tiles import channels_of, positions, vector


@triton.jit
def forward(
    x,
    y,
    residual,
    gamma,
    beta,
    moments,
    eps,
    slope,
    values,
    channels,
    span,
    ACT: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """y, and moments (3, C): mean, m2 and rstd. m2 is summed about the mean, once that is known."""
    own, there = channels_of(tl.program_id(0), channels, TILE_CHANNELS)
    at = tl.arange(0, TILE_VALUES)
    inside = (at < values)[:, None] & there[None, :]
    position = positions(at, own, channels, span)
    origin = tl.load(x + own.to(tl.int64) * span, mask=there, other=0.0).to(tl.float32)
    held = tl.load(x + position, mask=inside, other=0.0).to(tl.float32)
    found = origin + tl.sum(tl.where(inside, held - origin[None, :], 0.0), 0) / values
    centre = found[None, :]
    off = tl.where(inside, held - centre, 0.0)
    # What rounding the mean leaves is the mean of the deviations, and is taken out of their squares.
    left = tl.sum(off, 0) / values
    m2 = tl.sum(tl.where(inside, (off - left[None, :]) * (off - left[None, :]), 0.0), 0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(m2 / values + eps))
    tl.store(moments + own, found, mask=there)
    tl.store(moments + channels + own, m2, mask=there)
    tl.store(moments + 2 * channels + own, inverse, mask=there)
    scale, shift = inverse[None, :] * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    z = (held - centre) * scale + shift
    if residual is not None:
        z += tl.load(residual + position, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + position, activated(z, slope, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    grad_y,
    x,
    other,
    dx,
    dresidual,
    gamma,
    beta,
    mean,
    rstd,
    sums,
    slope,
    values,
    channels,
    span,
    ACT: tl.constexpr,
    SOURCE: tl.constexpr,
    ENERGY: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """dx and dresidual, and sums (3, C): dbeta, dgamma and, where wanted, Σg². SOURCE is as in `gpu_backward`."""
    own, there = channels_of(tl.program_id(0), channels, TILE_CHANNELS)
    at = tl.arange(0, TILE_VALUES)
    inside = (at < values)[:, None] & there[None, :]
    position = positions(at, own, channels, span)
    centre, factor = vector(mean, own, there, 0.0), vector(rstd, own, there, 0.0)
    scale, shift = factor * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    off = tl.load(x + position, mask=inside, other=0.0).to(tl.float32) - centre
    g = at_preactivation(grad_y, other, position, inside, off, scale, shift, slope, ACT, SOURCE)
    dbeta, dgamma = tl.sum(g, 0)[None, :], tl.sum(g * off, 0)[None, :] * factor
    row = own[None, :]
    tl.store(sums + row, dbeta, mask=there[None, :])
    tl.store(sums + channels + row, dgamma, mask=there[None, :])
    if ENERGY:
        tl.store(sums + 2 * channels + row, tl.sum(g * g, 0)[None, :], mask=there[None, :])
    level, tilt = dbeta / values, dgamma / values * factor
    tl.store(dx + position, ((g - level - off * tilt) * scale).to(dx.dtype.element_ty), mask=inside)
    if dresidual is not None:
        tl.store(dresidual + position, g.to(dresidual.dtype.element_ty), mask=inside)
