"""Forward and backward in Triton, one launch each: registers hold the whole tensor, each program one tile of it.

Between reducing it and applying the result nothing is read again: forward reads x once and writes y once, backward
reads grad_y, x and what tells act' once. Where several programs share a channel they wait for each other in between,
which asks for a launch that runs all programs at once (a cooperative one).
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton.activations import value as activated
from batchnorm.kernels.gpu._triton.passes import move
from batchnorm.kernels.gpu._triton.reductions import gathered, gradient_of, inverse_deviation, origin_of, summed
from batchnorm.kernels.gpu._triton.tiles import (
    SIZES,
    channels_of,
    known,
    publish,
    tell,
    tile_at,
    values_of,
    vector,
    wait_for_all,
)


@triton.jit(do_not_specialize=[*SIZES, "eps", "momentum", "slope"])
def forward(
    partials, counters, x, y, residual, gamma, beta, mean, m2, rstd, running_mean, running_var, eps, momentum, slope,
    values, places, channels, span, parts, part_places,
    ACT: tl.constexpr, PITCH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y, and the moments published. m2 of a part is summed about its mean, once that is known."""
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    own, there = channels_of(block, channels, TILE_CHANNELS)
    at, inside = tile_at(part, own, there, places, channels, span, PITCH, TILE_VALUES)
    origin = origin_of(x, own, there, span)
    held = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.maximum(values_of(part, places, span, part_places, PITCH), 1.0)
    found = origin + tl.sum(tl.where(inside, held - origin[None, :], 0.0), 0) / count
    off = tl.where(inside, held - found[None, :], 0.0)
    # What rounding the mean leaves is the mean of the deviations, and is taken out of their squares.
    left = tl.sum(off, 0) / count
    squares = tl.sum(tl.where(inside, (off - left[None, :]) * (off - left[None, :]), 0.0), 0)
    if partials is not None:
        tell(partials, 0, part, parts, own, there, channels, (found - origin) + left)
        tell(partials, 1, part, parts, own, there, channels, squares)
        wait_for_all(counters + block, parts)
        found, squares = gathered(
            partials, origin, own, there, places, channels, span, parts, part_places, PITCH, ROWS, TILE_CHANNELS
        )
    inverse = inverse_deviation(squares, values, eps)
    if part == 0:
        publish(mean, own, there, found)
        publish(m2, own, there, squares)
        publish(rstd, own, there, inverse)
        if running_mean is not None:
            move(running_mean, running_var, momentum, found, squares, own, there, values)
    scale, shift = inverse[None, :] * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    z = (held - found[None, :]) * scale + shift
    if residual is not None:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, activated(z, slope, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "share", "slope"])
def backward(
    partials, counters, grad_y, x, other, dx, dresidual, gamma, beta, mean, rstd, dbeta, dgamma, energy, share, slope,
    values, places, channels, span, parts, part_places,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx and dresidual, and the sums published. SOURCE is as in `reductions`, share as in `passes`."""
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    own, there = channels_of(block, channels, TILE_CHANNELS)
    at, inside = tile_at(part, own, there, places, channels, span, PITCH, TILE_VALUES)
    centre, factor = vector(mean, own, there, 0.0), vector(rstd, own, there, 0.0)
    scale, shift = factor * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
    off, g = gradient_of(grad_y, x, other, at, inside, centre, scale, shift, slope, ACT, SOURCE, "")
    level, along = tl.sum(g, 0), tl.sum(g * off, 0)
    tilt = along * tl.reshape(factor, [TILE_CHANNELS])
    squares = tl.sum(g * g, 0)
    if partials is not None:
        tell(partials, 0, part, parts, own, there, channels, level)
        tell(partials, 1, part, parts, own, there, channels, along)
        if ENERGY:
            tell(partials, 2, part, parts, own, there, channels, squares)
        wait_for_all(counters + block, parts)
        level, tilt, squares = summed(partials, rstd, own, there, channels, parts, ENERGY, ROWS, TILE_CHANNELS)
    if part == 0:
        publish(dbeta, own, there, level)
        publish(dgamma, own, there, tilt)
        publish(energy, own, there, squares)
    lift, slant = level[None, :] * share, tilt[None, :] * share * factor
    tl.store(dx + at, ((g - lift - off * slant) * scale).to(dx.dtype.element_ty), mask=inside)
    if dresidual is not None:
        tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=inside)
