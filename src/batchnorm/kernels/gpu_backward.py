"""Backward in Triton: two passes over grad_y, x and what tells act', and where there are many parts a launch between.

    reduce_sums     → Σg, Σg·(x - mean) and, where wanted, Σg² of each part
    merge_sums      the parts summed → dbeta, dgamma and Σg²
    apply_gradient  dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m), dresidual = g; of few parts, it sums them itself

SOURCE says what g = grad_y·act'(z) is told by: "x", "residual" (z needs it) or "y" (which keeps the side of the kink).
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu_activations import gradient
from batchnorm.kernels.gpu_forward import SIZES, publish
from batchnorm.kernels.gpu_tiles import channels_of, known, tell, tile_at, tiles_of, told, vector


@triton.jit
def at_preactivation(
    grad_y, other, position, inside, off, scale, shift, slope, ACT: tl.constexpr, SOURCE: tl.constexpr
):
    """g of a tile, 0 where there is none, with z from the arithmetic of forward; `off` is x - mean."""
    g = tl.load(grad_y + position, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == "y":
        z = tl.load(other + position, mask=inside, other=0.0).to(tl.float32)
    else:
        z = off * scale + shift
        if SOURCE == "residual":
            z += tl.load(other + position, mask=inside, other=0.0).to(tl.float32)
    return gradient(g, z, slope, ACT)


@triton.jit
def deviation(x, position, inside, centre):
    """x - mean of a tile, and 0 where there is none: what is computed of it must stay finite."""
    return tl.where(inside, tl.load(x + position, mask=inside, other=0.0).to(tl.float32) - centre, 0.0)


@triton.jit(do_not_specialize=[*SIZES, "slope"])
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
    places,
    channels,
    span,
    parts,
    part_places,
    ACT: tl.constexpr,
    SOURCE: tl.constexpr,
    ENERGY: tl.constexpr,
    PITCH: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums of one part; each place of the tile adds up its own values first."""
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    part = tl.program_id(0) % parts
    own, there = channels_of(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    first, stop = tiles_of(part, places, part_places, TILE_VALUES, WIDE)
    centre = vector(mean, own, there, 0.0)
    scale, shift = vector(rstd, own, there, 0.0) * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    level = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    along = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    energy = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    for tile in tl.range(first, stop, num_stages=STAGES):
        at, inside = tile_at(tile, own, there, places, channels, span, PITCH, TILE_VALUES)
        off = deviation(x, at, inside, centre)
        g = at_preactivation(grad_y, other, at, inside, off, scale, shift, slope, ACT, SOURCE)
        level += g
        along += g * off
        if ENERGY:
            energy += g * g
    tell(partials, 0, part, parts, own, there, channels, tl.sum(level, 0))
    tell(partials, 1, part, parts, own, there, channels, tl.sum(along, 0))
    if ENERGY:
        tell(partials, 2, part, parts, own, there, channels, tl.sum(energy, 0))


@triton.jit
def summed(partials, rstd, own, there, channels, parts, PARTS: tl.constexpr):
    """dbeta and dgamma of whole channels."""
    dbeta = tl.sum(told(partials, 0, parts, own, there, channels, PARTS), 0)
    along = tl.sum(told(partials, 1, parts, own, there, channels, PARTS), 0)
    return dbeta, along * tl.load(rstd + own, mask=there, other=0.0).to(tl.float32)


@triton.jit
def energy_of(partials, own, there, channels, parts, ENERGY: tl.constexpr, PARTS: tl.constexpr):
    """Σg² of whole channels where it is wanted, None where not."""
    return tl.sum(told(partials, 2, parts, own, there, channels, PARTS), 0) if ENERGY else None


@triton.jit(do_not_specialize=SIZES)
def merge_sums(
    partials,
    rstd,
    dbeta,
    dgamma,
    energy,
    values,
    places,
    channels,
    span,
    parts,
    part_places,
    ENERGY: tl.constexpr,
    PITCH: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dbeta, dgamma, and Σg² where wanted, of whole channels."""
    own, there = channels_of(tl.program_id(0), channels, TILE_CHANNELS)
    level, tilt = summed(partials, rstd, own, there, channels, parts, PARTS)
    publish(dbeta, own, there, level)
    publish(dgamma, own, there, tilt)
    publish(energy, own, there, energy_of(partials, own, there, channels, parts, ENERGY, PARTS))


@triton.jit(do_not_specialize=[*SIZES, "share", "slope"])
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
    dbeta,
    dgamma,
    energy,
    share,
    slope,
    values,
    places,
    channels,
    span,
    parts,
    part_places,
    ACT: tl.constexpr,
    SOURCE: tl.constexpr,
    ENERGY: tl.constexpr,
    PITCH: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of one part, and dresidual where g differs from grad_y; from its end, as in forward.

    By dbeta and dgamma, None for 0; where there are partials these are summed first, and dbeta, dgamma and Σg²
    published. `share` of each is every value's: 1/m.
    """
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    part = tl.program_id(0) % parts
    own, there = channels_of(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    first, stop = tiles_of(part, places, part_places, TILE_VALUES, WIDE)
    centre, factor = vector(mean, own, there, 0.0), vector(rstd, own, there, 0.0)
    scale, shift = factor * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    if partials is None:
        level, tilt = vector(dbeta, own, there, 0.0), vector(dgamma, own, there, 0.0)
    else:
        found_level, found_tilt = summed(partials, rstd, own, there, channels, parts, PARTS)
        if part == 0:
            publish(dbeta, own, there, found_level)
            publish(dgamma, own, there, found_tilt)
            publish(energy, own, there, energy_of(partials, own, there, channels, parts, ENERGY, PARTS))
        level, tilt = found_level[None, :], found_tilt[None, :]
    level, tilt = level * share, tilt * share * factor
    for back in tl.range(0, stop - first, num_stages=STAGES):
        at, inside = tile_at(stop - 1 - back, own, there, places, channels, span, PITCH, TILE_VALUES)
        off = deviation(x, at, inside, centre)
        g = at_preactivation(grad_y, other, at, inside, off, scale, shift, slope, ACT, SOURCE)
        tl.store(dx + at, ((g - level - off * tilt) * scale).to(dx.dtype.element_ty), mask=inside)
        if dresidual is not None:
            tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=inside)
