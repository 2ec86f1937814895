"""What all GPU kernels share, in Triton: where a tile lies, per-channel vectors, and the merge of moments.

Sizes are as `gpu_plan` describes them. Statistics and sums are float32, whatever the tensors are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channels_of(block, channels, TILE_CHANNELS: tl.constexpr):
    """The channels of a block, and which of them there are."""
    own = block * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    return own, own < channels


@triton.jit
def first_of(part, part_values, WIDE: tl.constexpr):
    """The first value of a part, of the type that positions are computed in."""
    if WIDE:
        part = part.to(tl.int64)
    return part * part_values


@triton.jit
def positions(values, own, channels, span):
    """Where the values of these channels lie, one row a value."""
    start = (values // span) * channels * span + values % span
    return start[:, None] + (own.to(values.dtype) * span)[None, :]


@triton.jit
def vector(pointer, own, there, default: tl.constexpr):
    """A per-channel vector as a row, float32; `default` where there is none."""
    if pointer is None:
        return tl.full([1, own.shape[0]], default, tl.float32)
    return tl.load(pointer + own, mask=there, other=default).to(tl.float32)[None, :]


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
def partial(partials, which, parts, own, there, channels, PARTS: tl.constexpr):
    """One sum of all parts, one row a part; zeros where there is none."""
    rows = tl.arange(0, PARTS)
    at = (which * parts + rows)[:, None] * channels + own[None, :]
    return tl.load(partials + at, mask=(rows < parts)[:, None] & there[None, :], other=0.0)
