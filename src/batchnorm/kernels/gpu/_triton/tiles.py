"""Shared by all GPU kernels, in Triton: offsets of tiles, per-channel vectors, partial sums, merged moments."""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["values", "positions", "channels", "span", "parts", "part_positions"]
"""Arguments that never trigger a new compilation: kernels get what they need to know of sizes as constants."""


@triton.jit
def align_sizes(positions, channels, span, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return the same sizes, so that the compiler sees that ALIGNMENT divides contiguous runs and widens loads."""
    if PITCH == 1:
        channels = channels // ALIGNMENT * ALIGNMENT
        span = 1
    else:
        positions = positions // ALIGNMENT * ALIGNMENT
        span = span // ALIGNMENT * ALIGNMENT
    return positions, channels, span


@triton.jit
def block_at(block_id, channels, TILE_CHANNELS: tl.constexpr):
    """The channels of a block, and their mask."""
    channel_ids = block_id * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    return channel_ids, channel_ids < channels


@triton.jit
def tile_at(tile, block, positions, channels, span, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr):
    """Offsets of a tile's values, one row per position, and their mask."""
    channel_ids, channel_mask = block
    first = tile * TILE_VALUES
    step = tl.arange(0, TILE_VALUES)
    row_mask = first + step < positions
    slice_stride = channels * span
    if PITCH == 0:
        slice_id = first // span
        column = first - slice_id * span + step
        is_next_slice = (column >= span).to(column.dtype)  # a product: the compiler knows less about tl.where
        row_offsets = slice_id * slice_stride + column + is_next_slice * (slice_stride - span)
    else:
        column = step % PITCH
        row_offsets = (first // PITCH + step // PITCH) * slice_stride + column
        row_mask = row_mask & (column < span)
    offsets = row_offsets[:, None] + (channel_ids.to(row_offsets.dtype) * span)[None, :]
    return offsets, row_mask[:, None] & channel_mask[None, :]


@triton.jit
def tile_range(part, positions, part_positions, TILE_VALUES: tl.constexpr, INT64: tl.constexpr):
    """The first tile of a part and the one after its last, in the type of the offsets."""
    if INT64:
        part = part.to(tl.int64)
    first = part * (part_positions // TILE_VALUES)
    return first, tl.minimum(first + part_positions // TILE_VALUES, tl.cdiv(positions, TILE_VALUES))


@triton.jit
def count_values(part, positions, span, part_positions, PITCH: tl.constexpr):
    """The number of values of a part, float32; 0 past the last part. A part has whole slices, or any values."""
    count = tl.maximum(tl.minimum(positions - part.to(tl.int64) * part_positions, part_positions), 0)
    if PITCH > 0:
        count = count // PITCH * span
    return count.to(tl.float32)


@triton.jit
def count_tile_values(first_tile, end_tile, positions, span, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr):
    """For each position of a tile, how many tiles of a range have a value there, float32."""
    step = tl.arange(0, TILE_VALUES)
    tiles = tl.cdiv(positions - step.to(tl.int64), TILE_VALUES)
    count = tl.maximum(tl.minimum(tiles, end_tile) - first_tile, 0)
    if PITCH > 0:
        count = tl.where(step % PITCH < span, count, 0)
    return count.to(tl.float32)


@triton.jit
def load_vector(vector_ptr, block, default: tl.constexpr):
    """A per-channel vector as a row, float32; `default` where the pointer is None or the channel does not exist."""
    channel_ids, channel_mask = block
    if vector_ptr is None:
        return tl.full([1, channel_ids.shape[0]], default, tl.float32)
    return tl.load(vector_ptr + channel_ids, mask=channel_mask, other=default).to(tl.float32)[None, :]


@triton.jit
def load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, block):
    """mean, rstd, scale = gamma·rstd and shift = beta, rows: z = (x - mean)·scale + shift."""
    mean, rstd = load_vector(mean_ptr, block, 0.0), load_vector(rstd_ptr, block, 0.0)
    return mean, rstd, rstd * load_vector(gamma_ptr, block, 1.0), load_vector(beta_ptr, block, 0.0)


@triton.jit
def store_vector(vector_ptr, block, vector):
    """Store one value per channel; nothing where the pointer is None."""
    channel_ids, channel_mask = block
    if vector_ptr is not None:
        tl.store(vector_ptr + channel_ids, vector, mask=channel_mask)


@triton.jit
def store_vectors(first_ptr, second_ptr, third_ptr, block, first, second, third):
    """`store_vector` of mean, m2 and rstd, or of dbeta, dgamma and grad_energy."""
    store_vector(first_ptr, block, first)
    store_vector(second_ptr, block, second)
    store_vector(third_ptr, block, third)


@triton.jit
def merge_moments_of_rows(count, mean, m2):
    """Merge the rows of each column: `batchnorm.moments.merge`, in the order in which Triton sums a column.

    mean is relative to an origin near the true mean, so that one sum gives it all its digits.
    """
    total = tl.maximum(tl.sum(count, 0), 1.0)
    merged_mean = tl.sum(count * mean, 0) / total
    delta = mean - merged_mean[None, :]
    return merged_mean, tl.sum(m2 + count * delta * delta, 0)


@triton.jit
def store_partial(partials_ptr, sum_id, part, parts, channels, block, partial):
    """Store one sum of one part."""
    channel_ids, channel_mask = block
    tl.store(partials_ptr + (sum_id * parts + part) * channels + channel_ids, partial, mask=channel_mask)


@triton.jit
def load_partials(partials_ptr, sum_id, part_ids, parts, channels, block):
    """One sum of several parts, one row per part; zeros past the last. Bypasses the L1, which may be stale."""
    channel_ids, channel_mask = block
    offsets = (sum_id * parts + part_ids)[:, None] * channels + channel_ids[None, :]
    mask = (part_ids < parts)[:, None] & channel_mask[None, :]
    return tl.load(partials_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def sum_partials(
    partials_ptr, sum_id, parts, channels, block, TILE_PARTS: tl.constexpr, TILE_CHANNELS: tl.constexpr
):  # fmt: skip
    """One sum over all parts, TILE_PARTS of them at a time."""
    total = tl.zeros([TILE_CHANNELS], tl.float32)
    for first in range(0, parts, TILE_PARTS):
        part_ids = first + tl.arange(0, TILE_PARTS)
        total += tl.sum(load_partials(partials_ptr, sum_id, part_ids, parts, channels, block), 0)
    return total


@triton.jit
def wait_for_all(counter_ptr, programs):
    """Wait until all `programs` programs are here; each then sees what the others stored. The counter starts at 0."""
    tl.debug_barrier()  # the whole program has stored
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < programs:
        pass
    tl.debug_barrier()
