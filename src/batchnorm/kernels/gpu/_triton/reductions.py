"""The first pass, in Triton: a batch's moments and the sums of backward, reduced part by part.

    reduce_moments   x → mean and m2 of each part
    merge_moments    the parts merged → mean, m2 and rstd
    reduce_sums      grad_y, x and, where there is one, y → Σg, Σg·(x - mean) and, where wanted, Σg² of each part
    merge_sums       the parts summed → dbeta, dgamma and Σg²

Parts are merged in their order. Moments are those of x - origin, origin the channel's first value: it lies within
sqrt(m) deviations of the mean, so that the mean's size costs no digits. g = grad_y·act'(z), and SOURCE says what act'
is computed by: z of "x", or "y", where a residual was added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton.activations import gradient, gradient_by_y
from batchnorm.kernels.gpu._triton.tiles import (
    SIZES,
    channels_of,
    filled,
    known,
    merged,
    publish,
    tell,
    tile_at,
    tiles_of,
    told,
    total,
    values_of,
    vector,
)


@triton.jit
def origin_of(x, own, there, span):
    """The first value of each channel, float32."""
    return tl.load(x + own.to(tl.int64) * span, mask=there, other=0.0).to(tl.float32)


@triton.jit
def gathered(
    partials, origin, own, there, places, channels, span, parts, part_places,
    PITCH: tl.constexpr, ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """mean and m2 of whole channels: the moments about origin of all parts merged in their order, ROWS at a time."""
    mean = tl.zeros([TILE_CHANNELS], tl.float32)
    m2 = tl.zeros([TILE_CHANNELS], tl.float32)
    count = 0.0
    for first in range(0, parts, ROWS):
        rows = first + tl.arange(0, ROWS)
        each = values_of(rows, places, span, part_places, PITCH)
        means = told(partials, 0, rows, parts, own, there, channels)
        centre, squares = merged(each[:, None], means, told(partials, 1, rows, parts, own, there, channels))
        more = tl.sum(each, 0)
        share = more / (count + more)
        off = centre - mean
        mean += off * share
        m2 += squares + off * off * (count * share)
        count += more
    return origin + mean, m2


@triton.jit
def inverse_deviation(m2, values, eps):
    """rstd."""
    return tl.div_rn(1.0, tl.sqrt_rn(m2 / values + eps))


@triton.jit
def moments_of(
    x, origin, strip,
    PITCH: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Mean and m2 of a strip, relative to origin. Each place of the tile runs Welford's recurrence by itself.

    KEPT says what is to become of it in the L2: "evict_last" where it is read again.
    """
    first, stop, own, there, places, channels, span = strip
    mean = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    m2 = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    seen = 0.0
    for tile in tl.range(first, stop, num_stages=STAGES):
        at, inside = tile_at(tile, own, there, places, channels, span, PITCH, TILE_VALUES)
        here = tl.load(x + at, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32) - origin[None, :]
        seen += 1.0
        share = 1.0 / seen
        off = tl.where(inside, here - mean, 0.0)
        mean += off * share
        m2 += off * off * (1.0 - share)
    return merged(filled(first, stop, places, span, PITCH, TILE_VALUES)[:, None], mean, m2)


@triton.jit(do_not_specialize=SIZES)
def reduce_moments(
    x, partials, values, places, channels, span, parts, part_places,
    PITCH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and m2 of one part, relative to origin."""
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    part = tl.program_id(0) % parts
    own, there = channels_of(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    first, stop = tiles_of(part, places, part_places, TILE_VALUES, WIDE)
    origin = origin_of(x, own, there, span)
    strip = first, stop, own, there, places, channels, span
    mean, m2 = moments_of(x, origin, strip, PITCH, TILE_VALUES, TILE_CHANNELS, STAGES, "")
    tell(partials, 0, part, parts, own, there, channels, mean)
    tell(partials, 1, part, parts, own, there, channels, m2)


@triton.jit(do_not_specialize=[*SIZES, "eps"])
def merge_moments(
    x, partials, mean, m2, rstd, eps, values, places, channels, span, parts, part_places,
    PITCH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """mean, m2 and rstd of whole channels."""
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    own, there = channels_of(tl.program_id(0), channels, TILE_CHANNELS)
    origin = origin_of(x, own, there, span)
    found, squares = gathered(
        partials, origin, own, there, places, channels, span, parts, part_places, PITCH, ROWS, TILE_CHANNELS
    )
    publish(mean, own, there, found)
    publish(m2, own, there, squares)
    publish(rstd, own, there, inverse_deviation(squares, values, eps))


@triton.jit
def gradient_of(
    grad_y, x, other, at, inside, centre, scale, shift, slope,
    ACT: tl.constexpr, SOURCE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
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
    grad_y, x, other, centre, scale, shift, slope, strip,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, STAGES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
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
    grad_y, x, other, gamma, beta, mean, rstd, partials, slope, values, places, channels, span, parts, part_places,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
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
    partials, rstd, own, there, channels, parts,
    ENERGY: tl.constexpr, ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dbeta, dgamma and, where it is wanted, Σg² of whole channels."""
    dbeta = total(partials, 0, parts, own, there, channels, ROWS, TILE_CHANNELS)
    along = total(partials, 1, parts, own, there, channels, ROWS, TILE_CHANNELS)
    energy = total(partials, 2, parts, own, there, channels, ROWS, TILE_CHANNELS) if ENERGY else dbeta
    return dbeta, along * tl.load(rstd + own, mask=there, other=0.0).to(tl.float32), energy


@triton.jit(do_not_specialize=SIZES)
def merge_sums(
    partials, rstd, dbeta, dgamma, energy, values, places, channels, span, parts, part_places,
    ENERGY: tl.constexpr, PITCH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dbeta, dgamma, and Σg² where wanted, of whole channels."""
    own, there = channels_of(tl.program_id(0), channels, TILE_CHANNELS)
    level, tilt, squares = summed(partials, rstd, own, there, channels, parts, ENERGY, ROWS, TILE_CHANNELS)
    publish(dbeta, own, there, level)
    publish(dgamma, own, there, tilt)
    publish(energy, own, there, squares)
