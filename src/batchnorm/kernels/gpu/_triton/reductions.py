"""The first pass, in Triton: the batch's moments and the sums of backward, reduced part by part.

    reduce_moments   x → mean and m2 of each part
    merge_moments    merges the parts → mean, m2 and rstd
    reduce_sums      grad_y, x and, after a residual, y → Σg, Σg·(x - mean) and, if wanted, Σg² of each part
    merge_sums       adds the parts → dbeta, dgamma and grad_energy = Σg²

Moments are those of x - origin, origin the channel's first value: it lies within sqrt(m) deviations of the mean, so
that a large mean costs no digits. g = grad_y·act'(z). SOURCE says what act' is computed from: z of "x", or "y" where a
residual was added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton import activations, tiles


@triton.jit
def load_origin(x_ptr, block, span):
    """The first value of each channel, float32."""
    channel_ids, channel_mask = block
    return tl.load(x_ptr + channel_ids.to(tl.int64) * span, mask=channel_mask, other=0.0).to(tl.float32)


@triton.jit
def merge_partial_moments(
    partials_ptr, origin, block, sizes, PITCH: tl.constexpr, TILE_PARTS: tl.constexpr, TILE_CHANNELS: tl.constexpr
):  # fmt: skip
    """mean and m2 of whole channels from the partial moments about origin, TILE_PARTS parts at a time."""
    positions, channels, span, parts, part_positions = sizes
    mean = tl.zeros([TILE_CHANNELS], tl.float32)
    m2 = tl.zeros([TILE_CHANNELS], tl.float32)
    count = 0.0
    for first in range(0, parts, TILE_PARTS):
        part_ids = first + tl.arange(0, TILE_PARTS)
        part_counts = tiles.count_values(part_ids, positions, span, part_positions, PITCH)
        part_means = tiles.load_partials(partials_ptr, 0, part_ids, parts, channels, block)
        part_m2s = tiles.load_partials(partials_ptr, 1, part_ids, parts, channels, block)
        tile_mean, tile_m2 = tiles.merge_moments_of_rows(part_counts[:, None], part_means, part_m2s)
        tile_count = tl.sum(part_counts, 0)
        weight = tile_count / (count + tile_count)
        delta = tile_mean - mean
        mean += delta * weight
        m2 += tile_m2 + delta * delta * (count * weight)
        count += tile_count
    return origin + mean, m2


@triton.jit
def rstd_of(m2, values, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(m2 / values + eps))


@triton.jit
def moments_of_strip(
    x_ptr, origin, strip,
    PITCH: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
):  # fmt: skip
    """mean and m2 of a strip, relative to origin. Each position of the tile runs Welford's recurrence by itself.

    EVICTION is the L2's policy for x: "evict_last" where it is read again.
    """
    first_tile, end_tile, block, positions, channels, span = strip
    mean = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    m2 = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    count = 0.0
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        offsets, mask = tiles.tile_at(tile, block, positions, channels, span, PITCH, TILE_VALUES)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32) - origin[None, :]
        count += 1.0
        weight = 1.0 / count
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * weight
        m2 += delta * delta * (1.0 - weight)
    counts = tiles.count_tile_values(first_tile, end_tile, positions, span, PITCH, TILE_VALUES)
    return tiles.merge_moments_of_rows(counts[:, None], mean, m2)


@triton.jit(do_not_specialize=tiles.SIZES)
def reduce_moments(
    x_ptr, partials_ptr, values, positions, channels, span, parts, part_positions,
    PITCH: tl.constexpr, ALIGNMENT: tl.constexpr, TILE_PARTS: tl.constexpr, TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """mean and m2 of one part, relative to origin."""
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    part = tl.program_id(0) % parts
    block = tiles.block_at(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    first_tile, end_tile = tiles.tile_range(part, positions, part_positions, TILE_VALUES, INT64)
    origin = load_origin(x_ptr, block, span)
    strip = first_tile, end_tile, block, positions, channels, span
    mean, m2 = moments_of_strip(x_ptr, origin, strip, PITCH, TILE_VALUES, TILE_CHANNELS, STAGES, "")
    tiles.store_partial(partials_ptr, 0, part, parts, channels, block, mean)
    tiles.store_partial(partials_ptr, 1, part, parts, channels, block, m2)


@triton.jit(do_not_specialize=[*tiles.SIZES, "eps"])
def merge_moments(
    x_ptr, partials_ptr, mean_ptr, m2_ptr, rstd_ptr, eps, values, positions, channels, span, parts, part_positions,
    PITCH: tl.constexpr, ALIGNMENT: tl.constexpr, TILE_PARTS: tl.constexpr, TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """mean, m2 and rstd of whole channels."""
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    block = tiles.block_at(tl.program_id(0), channels, TILE_CHANNELS)
    origin = load_origin(x_ptr, block, span)
    sizes = positions, channels, span, parts, part_positions
    mean, m2 = merge_partial_moments(partials_ptr, origin, block, sizes, PITCH, TILE_PARTS, TILE_CHANNELS)
    tiles.store_vectors(mean_ptr, m2_ptr, rstd_ptr, block, mean, m2, rstd_of(m2, values, eps))


@triton.jit
def load_xmu_and_g(
    grad_y_ptr, x_ptr, y_ptr, offsets, mask, mean, scale, shift, slope,
    ACT: tl.constexpr, SOURCE: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """x - mean and g of a tile, both 0 where masked, with z from the arithmetic of forward."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    xmu = tl.where(mask, x - mean, 0.0)  # what is computed from it must stay finite
    grad_y = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    if SOURCE == "y":
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        g = activations.gradient_by_y(grad_y, y, ACT)
    else:
        g = activations.gradient(grad_y, xmu * scale + shift, slope, ACT)
    return xmu, g


@triton.jit
def sums_of_strip(
    grad_y_ptr, x_ptr, y_ptr, mean, scale, shift, slope, strip,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, STAGES: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Σg, Σg·(x - mean) and Σg² of a strip; each position of the tile adds up its own values first."""
    first_tile, end_tile, block, positions, channels, span = strip
    dbeta = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    sum_g_xmu = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    grad_energy = tl.zeros([TILE_VALUES, TILE_CHANNELS], tl.float32)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        offsets, mask = tiles.tile_at(tile, block, positions, channels, span, PITCH, TILE_VALUES)
        xmu, g = load_xmu_and_g(
            grad_y_ptr, x_ptr, y_ptr, offsets, mask, mean, scale, shift, slope, ACT, SOURCE, EVICTION
        )
        dbeta += g
        sum_g_xmu += g * xmu
        if ENERGY:
            grad_energy += g * g
    return tl.sum(dbeta, 0), tl.sum(sum_g_xmu, 0), tl.sum(grad_energy, 0)


@triton.jit
def store_partial_sums(
    partials_ptr, part, parts, channels, block, dbeta, sum_g_xmu, grad_energy, ENERGY: tl.constexpr
):  # fmt: skip
    """Store this part's sums of the block's channels: dbeta, Σg·(x - mean) and, with ENERGY, Σg²."""
    tiles.store_partial(partials_ptr, 0, part, parts, channels, block, dbeta)
    tiles.store_partial(partials_ptr, 1, part, parts, channels, block, sum_g_xmu)
    if ENERGY:
        tiles.store_partial(partials_ptr, 2, part, parts, channels, block, grad_energy)


@triton.jit(do_not_specialize=[*tiles.SIZES, "slope"])
def reduce_sums(
    grad_y_ptr, x_ptr, y_ptr, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, partials_ptr, slope,
    values, positions, channels, span, parts, part_positions,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr,
    TILE_PARTS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The sums of one part."""
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    part = tl.program_id(0) % parts
    block = tiles.block_at(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    first_tile, end_tile = tiles.tile_range(part, positions, part_positions, TILE_VALUES, INT64)
    mean, _, scale, shift = tiles.load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, block)
    strip = first_tile, end_tile, block, positions, channels, span
    dbeta, sum_g_xmu, grad_energy = sums_of_strip(
        grad_y_ptr, x_ptr, y_ptr, mean, scale, shift, slope, strip,
        ACT, SOURCE, ENERGY, PITCH, TILE_VALUES, TILE_CHANNELS, STAGES, "",
    )  # fmt: skip
    store_partial_sums(partials_ptr, part, parts, channels, block, dbeta, sum_g_xmu, grad_energy, ENERGY)


@triton.jit
def merge_partial_sums(
    partials_ptr, rstd_ptr, parts, channels, block,
    ENERGY: tl.constexpr, TILE_PARTS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dbeta, dgamma and, where wanted, grad_energy of whole channels."""
    channel_ids, channel_mask = block
    dbeta = tiles.sum_partials(partials_ptr, 0, parts, channels, block, TILE_PARTS, TILE_CHANNELS)
    sum_g_xmu = tiles.sum_partials(partials_ptr, 1, parts, channels, block, TILE_PARTS, TILE_CHANNELS)
    if ENERGY:
        grad_energy = tiles.sum_partials(partials_ptr, 2, parts, channels, block, TILE_PARTS, TILE_CHANNELS)
    else:
        grad_energy = dbeta
    rstd = tl.load(rstd_ptr + channel_ids, mask=channel_mask, other=0.0).to(tl.float32)
    return dbeta, sum_g_xmu * rstd, grad_energy


@triton.jit(do_not_specialize=tiles.SIZES)
def merge_sums(
    partials_ptr, rstd_ptr, dbeta_ptr, dgamma_ptr, grad_energy_ptr,
    values, positions, channels, span, parts, part_positions,
    ENERGY: tl.constexpr, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr, TILE_PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """dbeta, dgamma and, where wanted, grad_energy of whole channels."""
    block = tiles.block_at(tl.program_id(0), channels, TILE_CHANNELS)
    dbeta, dgamma, grad_energy = merge_partial_sums(
        partials_ptr, rstd_ptr, parts, channels, block, ENERGY, TILE_PARTS, TILE_CHANNELS
    )
    tiles.store_vectors(dbeta_ptr, dgamma_ptr, grad_energy_ptr, block, dbeta, dgamma, grad_energy)
