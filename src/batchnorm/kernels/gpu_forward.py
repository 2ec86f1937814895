"""Forward in Triton: two passes over x, and where there are many parts a launch between them.

    reduce_moments   x → mean and m2 of each part
    merge_moments    the parts merged → mean, m2 and rstd
    apply            y = act(gamma·(x - mean)·rstd + beta [+ residual]), and the running statistics moved; of few parts,
                     it merges them itself

Moments are those of x - origin, origin the channel's first value: it lies within sqrt(m) deviations of the mean, so
that the mean's size costs no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu_activations import value as activated
from batchnorm.kernels.gpu_tiles import (
    channels_of,
    filled,
    known,
    merged,
    tell,
    tile_at,
    tiles_of,
    told,
    values_of,
    vector,
)

SIZES = ["values", "places", "channels", "span", "parts", "part_places"]
"""No kernel is compiled anew for another size: what it needs to know of them are its constants."""


@triton.jit
def origin_of(x, own, there, span):
    """The first value of each channel, float32."""
    return tl.load(x + own.to(tl.int64) * span, mask=there, other=0.0).to(tl.float32)


@triton.jit
def gathered(
    partials,
    origin,
    own,
    there,
    places,
    channels,
    span,
    parts,
    part_places,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
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
def publish(vector, own, there, value):
    """Store what is known of whole channels; nothing where nobody wants it."""
    if vector is not None:
        tl.store(vector + own, value, mask=there)


@triton.jit
def move(running_mean, running_var, momentum, mean, m2, own, there, values):
    """Move the running statistics: the last that is done, so that what fails has moved nothing."""
    _move(running_mean, mean, momentum, own, there)
    _move(running_var, m2 / (values - 1), momentum, own, there)


@triton.jit
def _move(average, batch, momentum, own, there):
    """average ← (1 - momentum)·average + momentum·batch, exact for 0 and for 1, as torch.lerp is."""
    old = tl.load(average + own, mask=there, other=0.0).to(tl.float32)
    off = batch - old
    new = tl.where(momentum < 0.5, old + momentum * off, batch - off * (1.0 - momentum))
    tl.store(average + own, new.to(average.dtype.element_ty), mask=there)


@triton.jit
def moments_of(
    x,
    origin,
    strip,
    PITCH: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):
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


@triton.jit
def normalize(
    x,
    y,
    residual,
    centre,
    scale,
    shift,
    slope,
    strip,
    ACT: tl.constexpr,
    PITCH: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """y of a strip, from its end: what the pass before has read last is still in the L2."""
    first, stop, own, there, places, channels, span = strip
    for back in tl.range(0, stop - first, num_stages=STAGES):
        at, inside = tile_at(stop - 1 - back, own, there, places, channels, span, PITCH, TILE_VALUES)
        here = tl.load(x + at, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32)
        z = (here - centre) * scale + shift
        if residual is not None:
            z += tl.load(residual + at, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32)
        tl.store(y + at, activated(z, slope, ACT).to(y.dtype.element_ty), mask=inside, eviction_policy=KEPT)


@triton.jit(do_not_specialize=SIZES)
def reduce_moments(
    x,
    partials,
    values,
    places,
    channels,
    span,
    parts,
    part_places,
    PITCH: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
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
    x,
    partials,
    mean,
    m2,
    rstd,
    eps,
    values,
    places,
    channels,
    span,
    parts,
    part_places,
    PITCH: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
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


@triton.jit(do_not_specialize=[*SIZES, "eps", "momentum", "slope"])
def apply(
    x,
    y,
    residual,
    gamma,
    beta,
    mean,
    m2,
    rstd,
    partials,
    running_mean,
    running_var,
    eps,
    momentum,
    slope,
    values,
    places,
    channels,
    span,
    parts,
    part_places,
    ACT: tl.constexpr,
    PITCH: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of one part.

    By mean and rstd; where there are partials these are merged first, and mean, m2 and rstd published. The running
    statistics, where there are any, move by mean and m2.
    """
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    part = tl.program_id(0) % parts
    own, there = channels_of(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    first, stop = tiles_of(part, places, part_places, TILE_VALUES, WIDE)
    if partials is None:
        centre, factor = vector(mean, own, there, 0.0), vector(rstd, own, there, 0.0)
        if running_mean is not None:
            found = tl.load(mean + own, mask=there, other=0.0)
            squares = tl.load(m2 + own, mask=there, other=0.0)
    else:
        origin = origin_of(x, own, there, span)
        found, squares = gathered(
            partials, origin, own, there, places, channels, span, parts, part_places, PITCH, ROWS, TILE_CHANNELS
        )
        inverse = inverse_deviation(squares, values, eps)
        if part == 0:
            publish(mean, own, there, found)
            publish(m2, own, there, squares)
            publish(rstd, own, there, inverse)
        centre, factor = found[None, :], inverse[None, :]
    if running_mean is not None and part == 0:
        move(running_mean, running_var, momentum, found, squares, own, there, values)
    scale, shift = factor * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    strip = first, stop, own, there, places, channels, span
    normalize(x, y, residual, centre, scale, shift, slope, strip, ACT, PITCH, TILE_VALUES, STAGES, "")
