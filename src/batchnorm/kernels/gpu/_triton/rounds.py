"""Forward and backward in Triton, one launch each, some channels at a time: those that the L2 holds.

Programs stand in groups. A group reduces the channels of a block, its programs wait for each other, and it applies the
result while what it has read is still in the L2; then it goes on to its next block. Memory is read once. All programs
must run at once (a cooperative launch), since those of a group wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton.passes import descend, move, normalize
from batchnorm.kernels.gpu._triton.reductions import gathered, inverse_deviation, moments_of, origin_of, summed, sums_of
from batchnorm.kernels.gpu._triton.tiles import SIZES, channels_of, known, publish, tell, tiles_of, vector, wait_for_all


@triton.jit(do_not_specialize=[*SIZES, "groups", "eps", "momentum", "slope"])
def forward(
    partials, counters, groups, x, y, residual, gamma, beta, mean, m2, rstd, running_mean, running_var, eps, momentum,
    slope, values, places, channels, span, parts, part_places,
    ACT: tl.constexpr, PITCH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y, and the moments published."""
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    part = tl.program_id(0) % parts
    first, stop = tiles_of(part, places, part_places, TILE_VALUES, WIDE)
    for block in range(tl.program_id(0) // parts, tl.cdiv(channels, TILE_CHANNELS), groups):
        own, there = channels_of(block, channels, TILE_CHANNELS)
        strip = first, stop, own, there, places, channels, span
        origin = origin_of(x, own, there, span)
        found, squares = moments_of(x, origin, strip, PITCH, TILE_VALUES, TILE_CHANNELS, STAGES, "evict_last")
        if partials is not None:
            tell(partials, 0, part, parts, own, there, channels, found)
            tell(partials, 1, part, parts, own, there, channels, squares)
            wait_for_all(counters + block, parts)
            found, squares = gathered(
                partials, origin, own, there, places, channels, span, parts, part_places, PITCH, ROWS, TILE_CHANNELS
            )
        else:
            found += origin
        inverse = inverse_deviation(squares, values, eps)
        if part == 0:
            publish(mean, own, there, found)
            publish(m2, own, there, squares)
            publish(rstd, own, there, inverse)
            if running_mean is not None:
                move(running_mean, running_var, momentum, found, squares, own, there, values)
        scale, shift = inverse[None, :] * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
        normalize(
            x, y, residual, found[None, :], scale, shift, slope, strip, ACT, PITCH, TILE_VALUES, STAGES, "evict_first"
        )


@triton.jit(do_not_specialize=[*SIZES, "groups", "share", "slope"])
def backward(
    partials, counters, groups, grad_y, x, other, dx, dresidual, gamma, beta, mean, rstd, dbeta, dgamma, energy, share,
    slope, values, places, channels, span, parts, part_places,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dresidual, and the sums published. SOURCE is as in `reductions`, share as in `passes`."""
    places, channels, span = known(places, channels, span, PITCH, UNIT)
    part = tl.program_id(0) % parts
    first, stop = tiles_of(part, places, part_places, TILE_VALUES, WIDE)
    for block in range(tl.program_id(0) // parts, tl.cdiv(channels, TILE_CHANNELS), groups):
        own, there = channels_of(block, channels, TILE_CHANNELS)
        strip = first, stop, own, there, places, channels, span
        centre, factor = vector(mean, own, there, 0.0), vector(rstd, own, there, 0.0)
        scale, shift = factor * vector(gamma, own, there, 1.0), vector(beta, own, there, 0.0)
        level, along, squares = sums_of(
            grad_y, x, other, centre, scale, shift, slope, strip,
            ACT, SOURCE, ENERGY, PITCH, TILE_VALUES, TILE_CHANNELS, STAGES, "evict_last",
        )  # fmt: skip
        if partials is not None:
            tell(partials, 0, part, parts, own, there, channels, level)
            tell(partials, 1, part, parts, own, there, channels, along)
            if ENERGY:
                tell(partials, 2, part, parts, own, there, channels, squares)
            wait_for_all(counters + block, parts)
            level, tilt, squares = summed(partials, rstd, own, there, channels, parts, ENERGY, ROWS, TILE_CHANNELS)
        else:
            tilt = along * tl.reshape(factor, [TILE_CHANNELS])
        if part == 0:
            publish(dbeta, own, there, level)
            publish(dgamma, own, there, tilt)
            publish(energy, own, there, squares)
        lift, slant = level[None, :] * share, tilt[None, :] * share * factor
        descend(
            grad_y, x, other, dx, dresidual, centre, scale, shift, lift, slant, slope, strip,
            ACT, SOURCE, PITCH, TILE_VALUES, STAGES, "evict_first",
        )  # fmt: skip
