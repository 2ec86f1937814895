"""What all GPU kernels share, in Triton: where a tile lies, per-channel vectors, and the merge of moments.

Sizes are as `gpu.plan` describes them. Statistics and sums are float32, whatever the tensors are.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["values", "places", "channels", "span", "parts", "part_places"]
"""No kernel is compiled anew for another size: what it needs to know of them are its constants."""


@triton.jit
def known(places, channels, span, PITCH: tl.constexpr, UNIT: tl.constexpr):
    """The same, and the compiler knows that UNIT divides what lies side by side: so much it then loads at once."""
    if PITCH == 1:
        channels = channels // UNIT * UNIT
        span = 1
    else:
        places = places // UNIT * UNIT
        span = span // UNIT * UNIT
    return places, channels, span


@triton.jit
def channels_of(block, channels, TILE_CHANNELS: tl.constexpr):
    """The channels of a block, and which of them there are."""
    own = block * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    return own, own < channels


@triton.jit
def tile_at(
    tile, own, there, places, channels, span,
    PITCH: tl.constexpr, TILE_VALUES: tl.constexpr,
):  # fmt: skip
    """Where the values of a tile lie, one row a place, and which of them there are."""
    first = tile * TILE_VALUES
    step = tl.arange(0, TILE_VALUES)
    inside = first + step < places
    apart = channels * span
    if PITCH == 0:
        row = first // span
        along = first - row * span + step
        beyond = (along >= span).to(along.dtype)  # a product, for of tl.where the compiler knows less
        start = row * apart + along + beyond * (apart - span)
    else:
        along = step % PITCH
        start = (first // PITCH + step // PITCH) * apart + along
        inside = inside & (along < span)
    return start[:, None] + (own.to(start.dtype) * span)[None, :], inside[:, None] & there[None, :]


@triton.jit
def tiles_of(part, places, part_places, TILE_VALUES: tl.constexpr, WIDE: tl.constexpr):
    """The first tile of a part, and the one after its last, of the type that positions are computed in."""
    if WIDE:
        part = part.to(tl.int64)
    first = part * (part_places // TILE_VALUES)
    return first, tl.minimum(first + part_places // TILE_VALUES, tl.cdiv(places, TILE_VALUES))


@triton.jit
def values_of(part, places, span, part_places, PITCH: tl.constexpr):
    """How many values a part has, float32; 0 of a part that there is not. Whole slices, or any values."""
    own = tl.maximum(tl.minimum(places - part.to(tl.int64) * part_places, part_places), 0)
    if PITCH > 0:
        own = own // PITCH * span
    return own.to(tl.float32)


@triton.jit
def vector(pointer, own, there, default: tl.constexpr):
    """A per-channel vector as a row, float32; `default` where there is none."""
    if pointer is None:
        return tl.full([1, own.shape[0]], default, tl.float32)
    return tl.load(pointer + own, mask=there, other=default).to(tl.float32)[None, :]


@triton.jit
def publish(vector, own, there, value):
    """Store what is known of whole channels; nothing where nobody wants it."""
    if vector is not None:
        tl.store(vector + own, value, mask=there)


@triton.jit
def merged(count, mean, m2):
    """mean and m2 of each column of parts: `batchnorm.moments.merge`, in the order that a sum of a column has.

    Of moments about an origin near the mean: then one sum gives the mean all its digits.
    """
    total = tl.maximum(tl.sum(count, 0), 1.0)
    centre = tl.sum(count * mean, 0) / total
    off = mean - centre[None, :]
    return centre, tl.sum(m2 + count * off * off, 0)


@triton.jit
def tell(partials, which, part, parts, own, there, channels, value):
    """Store one sum of one part: partials are (sums, parts, C)."""
    tl.store(partials + (which * parts + part) * channels + own, value, mask=there)


@triton.jit
def told(partials, which, rows, parts, own, there, channels):
    """One sum of some parts, one row a part; zeros where there is none. Past the L1: others' stores do not reach it."""
    at = (which * parts + rows)[:, None] * channels + own[None, :]
    return tl.load(partials + at, mask=(rows < parts)[:, None] & there[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def total(partials, which, parts, own, there, channels, ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """One sum over all parts, in their order, ROWS of them at a time."""
    whole = tl.zeros([TILE_CHANNELS], tl.float32)
    for first in range(0, parts, ROWS):
        whole += tl.sum(told(partials, which, first + tl.arange(0, ROWS), parts, own, there, channels), 0)
    return whole


@triton.jit
def filled(first, stop, places, span, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr):
    """How many of the tiles from first to before stop have a value in each of their places, float32."""
    step = tl.arange(0, TILE_VALUES)
    beyond = tl.cdiv(places - step.to(tl.int64), TILE_VALUES)
    count = tl.maximum(tl.minimum(beyond, stop) - first, 0)
    if PITCH > 0:
        count = tl.where(step % PITCH < span, count, 0)
    return count.to(tl.float32)


@triton.jit
def wait_for_all(counter, programs):
    """Go on when so many programs have come here; what each stored before is then seen by all. counter begins at 0."""
    tl.debug_barrier()  # the whole program has stored
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < programs:
        pass
    tl.debug_barrier()
