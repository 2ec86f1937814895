"""Backward in Triton: two launches, each one pass over grad_y, x and what tells act'.

    reduce_sums     → Σg, Σg·(x - mean) and, where wanted, Σg² of each part
    apply_gradient  the parts summed → dbeta, dgamma, Σg²; dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m), dresidual = g

`merge_sums` and `apply_gradient` without partials are the two verbs apart. SOURCE says what g = grad_y·act'(z) is
told by: "x", "residual" (z needs it) or "y" (which keeps the side of the kink).
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu_activations import gradient
from batchnorm.kernels.gpu_tiles import channels_of, first_of, partial, positions, vector


@triton.jit
def at_preactivation(
    grad_y, other, position, inside, off, scale, shift, slope, ACT: tl.constexpr, SOURCE: tl.constexpr
):
    """g of a tile, with z from the arithmetic of forward; `off` is x - mean."""
    g = tl.load(grad_y + position, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == "y":
        z = tl.load(other + position, mask=inside, other=0.0).to(tl.float32)
    else:
        z = off * scale + shift
        if SOURCE == "residual":
            z += tl.load(other + position, mask=inside, other=0.0).to(tl.float32)
    return gradient(g, z, slope, ACT)


@triton.jit(do_not_specialize=["parts"])
def reduce_sums(
    grad_y,
    x,
    other,
    gamma,
    beta,
    mean,
    rstd,
    partials,
    slope,
    values,
    channels,
    span,
    parts,
    part_values,
    ACT: tl.constexpr,
    SOURCE: tl.constexpr,
    ENERGY: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sums of one part; each place of the tile adds up its own values first."""
    program = tl.program_id(0)
    part = program % parts
    own, there = channels_of(program // parts, channels, TILE_CHANNELS)
    start = first_of(part, part_values, WIDE)
    stop = tl.minimum(start + part_values, values)
    centre = vector(mean, own, there, 0.0)
    scale, shift = vector(rstd, own, there, 0.0) * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    places = tl.arange(0, TILE_VALUES)
    level = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    along = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    energy = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    for first in range(start, stop, TILE_VALUES):
        at = first + places
        inside = (at < stop)[:, None] & there[None, :]
        position = positions(at, own, channels, span)
        off = tl.load(x + position, mask=inside, other=0.0).to(tl.float32) - centre
        g = at_preactivation(grad_y, other, position, inside, off, scale, shift, slope, ACT, SOURCE)
        level += g
        along += g * off
        if ENERGY:
            energy += g * g
    tl.store(partials + part * channels + own, tl.sum(level, 0), mask=there)
    tl.store(partials + (parts + part) * channels + own, tl.sum(along, 0), mask=there)
    if ENERGY:
        tl.store(partials + (2 * parts + part) * channels + own, tl.sum(energy, 0), mask=there)


@triton.jit
def _summed(partials, rstd, own, there, channels, parts, PARTS: tl.constexpr):
    """dbeta and dgamma of whole channels."""
    dbeta = tl.sum(partial(partials, 0, parts, own, there, channels, PARTS), 0)
    along = tl.sum(partial(partials, 1, parts, own, there, channels, PARTS), 0)
    dgamma = along * tl.load(rstd + own, mask=there, other=0.0).to(tl.float32)
    return dbeta, dgamma


@triton.jit
def _tell(sums, partials, dbeta, dgamma, own, there, channels, parts, ENERGY: tl.constexpr, PARTS: tl.constexpr):
    """Store the sums of whole channels, (3, C): dbeta, dgamma and, where wanted, Σg²."""
    tl.store(sums + own, dbeta, mask=there)
    tl.store(sums + channels + own, dgamma, mask=there)
    if ENERGY:
        energy = tl.sum(partial(partials, 2, parts, own, there, channels, PARTS), 0)
        tl.store(sums + 2 * channels + own, energy, mask=there)


@triton.jit(do_not_specialize=["parts"])
def merge_sums(
    partials,
    rstd,
    sums,
    channels,
    parts,
    ENERGY: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """sums (3, C): dbeta, dgamma, and Σg² where wanted."""
    own, there = channels_of(tl.program_id(0), channels, TILE_CHANNELS)
    dbeta, dgamma = _summed(partials, rstd, own, there, channels, parts, PARTS)
    _tell(sums, partials, dbeta, dgamma, own, there, channels, parts, ENERGY, PARTS)


@triton.jit(do_not_specialize=["parts"])
def apply_gradient(
    grad_y,
    x,
    other,
    dx,
    dresidual,
    gamma,
    beta,
    mean,
    rstd,
    partials,
    sums,
    dbeta_each,
    dgamma_each,
    slope,
    values,
    channels,
    span,
    parts,
    part_values,
    ACT: tl.constexpr,
    SOURCE: tl.constexpr,
    ENERGY: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx of one part, and dresidual where g differs from grad_y; from its end, as in forward.

    By the summed partials, which `sums` (3, C) gets, where they are given; else by dbeta/m and dgamma/m, None for 0.
    """
    program = tl.program_id(0)
    part = program % parts
    own, there = channels_of(program // parts, channels, TILE_CHANNELS)
    start = first_of(part, part_values, WIDE)
    stop = tl.minimum(start + part_values, values)
    centre, factor = vector(mean, own, there, 0.0), vector(rstd, own, there, 0.0)
    scale, shift = factor * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    if partials is None:
        level, tilt = vector(dbeta_each, own, there, 0.0), vector(dgamma_each, own, there, 0.0)
    else:
        dbeta, dgamma = _summed(partials, rstd, own, there, channels, parts, PARTS)
        if part == 0:
            _tell(sums, partials, dbeta, dgamma, own, there, channels, parts, ENERGY, PARTS)
        level, tilt = (dbeta / values)[None, :], (dgamma / values)[None, :]
    tilt = tilt * factor
    places = tl.arange(0, TILE_VALUES)
    tiles = tl.cdiv(stop - start, TILE_VALUES)
    for tile in range(tiles):
        at = start + (tiles - 1 - tile) * TILE_VALUES + places
        inside = (at < stop)[:, None] & there[None, :]
        position = positions(at, own, channels, span)
        off = tl.load(x + position, mask=inside, other=0.0).to(tl.float32) - centre
        g = at_preactivation(grad_y, other, position, inside, off, scale, shift, slope, ACT, SOURCE)
        tl.store(dx + position, ((g - level - off * tilt) * scale).to(dx.dtype.element_ty), mask=inside)
        if dresidual is not None:
            tl.store(dresidual + position, g.to(dresidual.dtype.element_ty), mask=inside)
