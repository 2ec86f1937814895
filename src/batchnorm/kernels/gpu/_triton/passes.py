"""The second pass, in Triton.

    apply            y = act(gamma·(x - mean)·rstd + beta [+ residual]); the running statistics move, too
    apply_gradient   dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m), and dresidual = g

Each merges the parts of the first pass (`reductions`) itself where they are few.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton.activations import value as activated
from batchnorm.kernels.gpu._triton.reductions import gathered, gradient_of, inverse_deviation, origin_of, summed
from batchnorm.kernels.gpu._triton.tiles import SIZES, channels_of, known, publish, tile_at, tiles_of, vector


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
def normalize(
    x, y, residual, centre, scale, shift, slope, strip,
    ACT: tl.constexpr, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr, STAGES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """y of a strip, from its end: what the pass before has read last is still in the L2."""
    first, stop, own, there, places, channels, span = strip
    for back in tl.range(0, stop - first, num_stages=STAGES):
        at, inside = tile_at(stop - 1 - back, own, there, places, channels, span, PITCH, TILE_VALUES)
        here = tl.load(x + at, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32)
        z = (here - centre) * scale + shift
        if residual is not None:
            z += tl.load(residual + at, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32)
        tl.store(y + at, activated(z, slope, ACT).to(y.dtype.element_ty), mask=inside, eviction_policy=KEPT)


@triton.jit(do_not_specialize=[*SIZES, "eps", "momentum", "slope"])
def apply(
    x, y, residual, gamma, beta, mean, m2, rstd, partials, running_mean, running_var, eps, momentum, slope, values,
    places, channels, span, parts, part_places,
    ACT: tl.constexpr, PITCH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def descend(
    grad_y, x, other, dx, dresidual, centre, scale, shift, lift, slant, slope, strip,
    ACT: tl.constexpr, SOURCE: tl.constexpr, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr, STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
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
    grad_y, x, other, dx, dresidual, gamma, beta, mean, rstd, partials, dbeta, dgamma, energy, share, slope, values,
    places, channels, span, parts, part_places,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
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
