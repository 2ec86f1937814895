"""The sums of backward in Triton, over g = grad_y·act'(z): reduced part by part, summed in the order of the parts.

    reduce_sums   grad_y, x and, where there is one, y → Σg, Σg·(x - mean) and, where wanted, Σg² of each part
    merge_sums    the parts summed → dbeta, dgamma and Σg²

SOURCE says what act' is computed by: z of "x", or "y", where a residual was added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton.activations import gradient, gradient_by_y
from batchnorm.kernels.gpu._triton.tiles import (
    SIZES,
    channels_of,
    known,
    publish,
    tell,
    tile_at,
    tiles_of,
    total,
    vector,
)


@triton.jit
def gradient_of(
    grad_y,
    x,
    other,
    at,
    inside,
    centre,
    scale,
    shift,
    slope,
    ACT: tl.constexpr,
    SOURCE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """x - mean and g of a tile, both 0 where there is none, with z from the arithmetic of forward."""
    here = tl.load(x + at, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32)
    off = tl.where(inside, here - centre, 0.0)  # what is computed of it must stay finite
    g = tl.load(grad_y + at, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32)
    if SOURCE == "y":
        y = tl.load(other + at, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32)
        below = gradient_by_y(g, y, ACT)
    else:
        below = gradient(g, off * scale + shift, slope, ACT)
    return off, below


@triton.jit
def sums_of(
    grad_y,
    x,
    other,
    centre,
    scale,
    shift,
    slope,
    strip,
    ACT: tl.constexpr,
    SOURCE: tl.constexpr,
    ENERGY: tl.constexpr,
    PITCH: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Σg, Σg·(x - mean) and Σg² of a strip; each place of the tile adds up its own values first."""
    first, stop, own, there, places, channels, span = strip
    level = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    along = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    energy = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    for tile in tl.range(first, stop, num_stages=STAGES):
        at, inside = tile_at(tile, own, there, places, channels, span, PITCH, TILE_VALUES)
        off, g = gradient_of(grad_y, x, other, at, inside, centre, scale, shift, slope, ACT, SOURCE, KEPT)
        level += g
        along += g * off
        if ENERGY:
            energy += g * g
    return tl.sum(level, 0), tl.sum(along, 0), tl.sum(energy, 0)


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
    ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums of one part."""
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    part = tl.program_id(0) % parts
    own, there = channels_of(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    first, stop = tiles_of(part, places, part_places, TILE_VALUES, WIDE)
    centre = vector(mean, own, there, 0.0)
    scale, shift = vector(rstd, own, there, 0.0) * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    strip = first, stop, own, there, places, channels, span
    level, along, energy = sums_of(
        grad_y, x, other, centre, scale, shift, slope, strip,
        ACT, SOURCE, ENERGY, PITCH, TILE_VALUES, TILE_CHANNELS, STAGES, "",
    )  # fmt: skip
    tell(partials, 0, part, parts, own, there, channels, level)
    tell(partials, 1, part, parts, own, there, channels, along)
    if ENERGY:
        tell(partials, 2, part, parts, own, there, channels, energy)


@triton.jit
def summed(
    partials,
    rstd,
    own,
    there,
    channels,
    parts,
    ENERGY: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """dbeta, dgamma and, where it is wanted, Σg² of whole channels."""
    dbeta = total(partials, 0, parts, own, there, channels, ROWS, TILE_CHANNELS)
    along = total(partials, 1, parts, own, there, channels, ROWS, TILE_CHANNELS)
    energy = total(partials, 2, parts, own, there, channels, ROWS, TILE_CHANNELS) if ENERGY else dbeta
    return dbeta, along * tl.load(rstd + own, mask=there, other=0.0).to(tl.float32), energy


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
    ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dbeta, dgamma, and Σg² where wanted, of whole channels."""
    own, there = channels_of(tl.program_id(0), channels, TILE_CHANNELS)
    level, tilt, squares = summed(partials, rstd, own, there, channels, parts, ENERGY, ROWS, TILE_CHANNELS)
    publish(dbeta, own, there, level)
    publish(dgamma, own, there, tilt)
    publish(energy, own, there, squares)
