"""Forward in Triton: two launches, each one pass over x.

    reduce_moments   x → mean and m2 of each part
    apply            the parts merged → mean, m2, rstd; y = act(gamma·(x - mean)·rstd + beta [+ residual])

`merge_moments` and `apply` with MERGE = False are the two verbs apart. Moments are those of x - origin, origin the
channel's first value: it lies within sqrt(m) deviations of the mean, so that the mean's size costs no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu_activations import value as activated
from batchnorm.kernels.gpu_tiles import channels_of, first_of, merged, partial, positions, vector


@triton.jit(do_not_specialize=["parts"])
def reduce_moments(
    x,
    partials,
    values,
    channels,
    span,
    parts,
    part_values,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean and m2 of one part, relative to origin. Each place of the tile runs Welford's recurrence by itself."""
    program = tl.program_id(0)
    part = program % parts
    own, there = channels_of(program // parts, channels, TILE_CHANNELS)
    start = first_of(part, part_values, WIDE)
    stop = tl.minimum(start + part_values, values)
    origin = tl.load(x + own.to(tl.int64) * span, mask=there, other=0.0).to(tl.float32)[None, :]
    places = tl.arange(0, TILE_VALUES)
    mean = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    m2 = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    seen = 0.0
    for first in range(start, stop, TILE_VALUES):
        at = first + places
        inside = (at < stop)[:, None] & there[None, :]
        here = tl.load(x + positions(at, own, channels, span), mask=inside, other=0.0).to(tl.float32) - origin
        seen += 1.0
        share = 1.0 / seen
        off = tl.where(inside, here - mean, 0.0)
        mean += off * share
        m2 += off * off * (1.0 - share)
    count = tl.maximum((stop - start - places + TILE_VALUES - 1) // TILE_VALUES, 0).to(tl.float32)[:, None]
    centre, squares = merged(count, mean, m2)
    tl.store(partials + part * channels + own, centre, mask=there)
    tl.store(partials + (parts + part) * channels + own, squares, mask=there)


@triton.jit
def _gathered(x, partials, own, there, values, channels, span, parts, part_values, PARTS: tl.constexpr):
    """mean and m2 of whole channels."""
    origin = tl.load(x + own.to(tl.int64) * span, mask=there, other=0.0).to(tl.float32)
    rows = tl.arange(0, PARTS).to(tl.int64)
    count = tl.maximum(tl.minimum(values - rows * part_values, part_values), 0).to(tl.float32)[:, None]
    mean = partial(partials, 0, parts, own, there, channels, PARTS)
    m2 = partial(partials, 1, parts, own, there, channels, PARTS)
    centre, squares = merged(count, mean, m2)
    return origin + centre, squares


@triton.jit(do_not_specialize=["parts"])
def merge_moments(
    x,
    partials,
    moments,
    values,
    channels,
    span,
    parts,
    part_values,
    PARTS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """moments (2, C): mean and m2."""
    own, there = channels_of(tl.program_id(0), channels, TILE_CHANNELS)
    mean, m2 = _gathered(x, partials, own, there, values, channels, span, parts, part_values, PARTS)
    tl.store(moments + own, mean, mask=there)
    tl.store(moments + channels + own, m2, mask=there)


@triton.jit(do_not_specialize=["parts"])
def apply(
    x,
    y,
    residual,
    gamma,
    beta,
    mean,
    rstd,
    partials,
    moments,
    eps,
    slope,
    values,
    channels,
    span,
    parts,
    part_values,
    ACT: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y of one part, from its end: what the first pass read last is still in the L2.

    By mean and rstd where they are given; else by the merged partials, and moments (3, C) gets mean, m2 and rstd.
    """
    program = tl.program_id(0)
    part = program % parts
    own, there = channels_of(program // parts, channels, TILE_CHANNELS)
    start = first_of(part, part_values, WIDE)
    stop = tl.minimum(start + part_values, values)
    if partials is None:
        centre, factor = vector(mean, own, there, 0.0), vector(rstd, own, there, 0.0)
    else:
        found, m2 = _gathered(x, partials, own, there, values, channels, span, parts, part_values, PARTS)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(m2 / values + eps))
        if part == 0:
            tl.store(moments + own, found, mask=there)
            tl.store(moments + channels + own, m2, mask=there)
            tl.store(moments + 2 * channels + own, inverse, mask=there)
        centre, factor = found[None, :], inverse[None, :]
    scale, shift = factor * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    places = tl.arange(0, TILE_VALUES)
    tiles = tl.cdiv(stop - start, TILE_VALUES)
    for tile in range(tiles):
        at = start + (tiles - 1 - tile) * TILE_VALUES + places
        inside = (at < stop)[:, None] & there[None, :]
        position = positions(at, own, channels, span)
        z = (tl.load(x + position, mask=inside, other=0.0).to(tl.float32) - centre) * scale + shift
        if residual is not None:
            z += tl.load(residual + position, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + position, activated(z, slope, ACT).to(y.dtype.element_ty), mask=inside)
