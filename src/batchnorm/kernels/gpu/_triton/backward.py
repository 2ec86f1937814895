"""The second pass of backward in Triton: dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m), and dresidual = g.

It sums the parts of `sums` itself where they are few.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton.sums import gradient_of, summed
from batchnorm.kernels.gpu._triton.tiles import (
    SIZES,
    channels_of,
    known,
    publish,
    tile_at,
    tiles_of,
    vector,
)


@triton.jit
def descend(
    grad_y,
    x,
    other,
    dx,
    dresidual,
    centre,
    scale,
    shift,
    lift,
    slant,
    slope,
    strip,
    ACT: tl.constexpr,
    SOURCE: tl.constexpr,
    PITCH: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """dx = scale·(g - lift - slant·(x - mean)) of a strip, and dresidual where g differs from grad_y; from its end."""
    first, stop, own, there, places, channels, span = strip
    for back in tl.range(0, stop - first, num_stages=STAGES):
        at, inside = tile_at(stop - 1 - back, own, there, places, channels, span, PITCH, TILE_VALUES)
        off, g = gradient_of(grad_y, x, other, at, inside, centre, scale, shift, slope, ACT, SOURCE, KEPT)
        below = (g - lift - off * slant) * scale
        tl.store(dx + at, below.to(dx.dtype.element_ty), mask=inside, eviction_policy=KEPT)
        if dresidual is not None:
            tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=inside, eviction_policy=KEPT)


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
    ROWS: tl.constexpr,
    TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of one part, and dresidual where g differs from grad_y.

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
        found_level, found_tilt, squares = summed(
            partials, rstd, own, there, channels, parts, ENERGY, ROWS, TILE_CHANNELS
        )
        if part == 0:
            publish(dbeta, own, there, found_level)
            publish(dgamma, own, there, found_tilt)
            publish(energy, own, there, squares)
        level, tilt = found_level[None, :], found_tilt[None, :]
    strip = first, stop, own, there, places, channels, span
    descend(
        grad_y, x, other, dx, dresidual, centre, scale, shift, level * share, tilt * share * factor, slope, strip,
        ACT, SOURCE, PITCH, TILE_VALUES, STAGES, "",
    )  # fmt: skip
