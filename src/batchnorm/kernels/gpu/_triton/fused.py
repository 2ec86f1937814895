"""Forward and backward in Triton, one launch each, so that each value is read from memory once.

    resident   registers hold the whole tensor, each program one tile of it
    rounds     programs form groups. A group reduces a block of channels, and applies the result while x is still in the
               L2; then it takes its next block

Programs that share a channel wait for each other in between. Then all programs must run at the same time (a cooperative
launch).
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton import passes, reductions, tiles


@triton.jit(do_not_specialize=[*tiles.SIZES, "eps", "momentum", "slope"])
def resident_forward(
    partials_ptr, counters_ptr, x_ptr, y_ptr, residual_ptr, gamma_ptr, beta_ptr, mean_ptr, m2_ptr, rstd_ptr,
    running_mean_ptr, running_var_ptr, eps, momentum, slope, values, positions, channels, span, parts, part_positions,
    ACT: tl.constexpr, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr, TILE_PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Store y, mean, m2 and rstd, and update the running statistics. m2 of a part is summed about the part's mean."""
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    block_id, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    block = tiles.block_at(block_id, channels, TILE_CHANNELS)
    offsets, mask = tiles.tile_at(part, block, positions, channels, span, PITCH, TILE_VALUES)
    origin = reductions.load_origin(x_ptr, block, span)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.maximum(tiles.count_values(part, positions, span, part_positions, PITCH), 1.0)
    mean = origin + tl.sum(tl.where(mask, x - origin[None, :], 0.0), 0) / count
    xmu = tl.where(mask, x - mean[None, :], 0.0)
    # The mean of the deviations is the rounding error of the mean: correct the squares for it.
    residue = tl.sum(xmu, 0) / count
    m2 = tl.sum(tl.where(mask, (xmu - residue[None, :]) * (xmu - residue[None, :]), 0.0), 0)
    if partials_ptr is not None:
        sizes = positions, channels, span, parts, part_positions
        tiles.store_partial(partials_ptr, 0, part, parts, channels, block, (mean - origin) + residue)
        tiles.store_partial(partials_ptr, 1, part, parts, channels, block, m2)
        tiles.wait_for_all(counters_ptr + block_id, parts)
        mean, m2 = reductions.merge_partial_moments(
            partials_ptr, origin, block, sizes, PITCH, TILE_PARTS, TILE_CHANNELS
        )
    rstd = reductions.rstd_of(m2, values, eps)
    if part == 0:
        tiles.store_vectors(mean_ptr, m2_ptr, rstd_ptr, block, mean, m2, rstd)
        if running_mean_ptr is not None:
            passes.update_running(running_mean_ptr, running_var_ptr, momentum, mean, m2, block, values)
    scale, shift = rstd[None, :] * tiles.load_vector(gamma_ptr, block, 1.0), tiles.load_vector(beta_ptr, block, 0.0)
    passes.store_y(y_ptr, residual_ptr, x, mean[None, :], scale, shift, slope, offsets, mask, ACT, "")


@triton.jit(do_not_specialize=[*tiles.SIZES, "inverse_count", "slope"])
def resident_backward(
    partials_ptr, counters_ptr, grad_y_ptr, x_ptr, y_ptr, dx_ptr, dresidual_ptr, gamma_ptr, beta_ptr, mean_ptr,
    rstd_ptr, dbeta_ptr, dgamma_ptr, grad_energy_ptr, inverse_count, slope,
    values, positions, channels, span, parts, part_positions,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr,
    TILE_PARTS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Store dx, dresidual, dbeta, dgamma and grad_energy. SOURCE is as in `reductions`, inverse_count is 1/m."""
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    block_id, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    block = tiles.block_at(block_id, channels, TILE_CHANNELS)
    offsets, mask = tiles.tile_at(part, block, positions, channels, span, PITCH, TILE_VALUES)
    mean, rstd, scale, shift = tiles.load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, block)
    xmu, g = reductions.load_xmu_and_g(
        grad_y_ptr, x_ptr, y_ptr, offsets, mask, mean, scale, shift, slope, ACT, SOURCE, ""
    )
    dbeta, sum_g_xmu = tl.sum(g, 0), tl.sum(g * xmu, 0)
    dgamma = sum_g_xmu * tl.reshape(rstd, [TILE_CHANNELS])
    grad_energy = tl.sum(g * g, 0)
    if partials_ptr is not None:
        reductions.store_partial_sums(partials_ptr, part, parts, channels, block, dbeta, sum_g_xmu, grad_energy, ENERGY)
        tiles.wait_for_all(counters_ptr + block_id, parts)
        dbeta, dgamma, grad_energy = reductions.merge_partial_sums(
            partials_ptr, rstd_ptr, parts, channels, block, ENERGY, TILE_PARTS, TILE_CHANNELS
        )
    if part == 0:
        tiles.store_vectors(dbeta_ptr, dgamma_ptr, grad_energy_ptr, block, dbeta, dgamma, grad_energy)
    mean_dbeta, rstd_mean_dgamma = dbeta[None, :] * inverse_count, dgamma[None, :] * inverse_count * rstd
    passes.store_dx(dx_ptr, dresidual_ptr, xmu, g, mean_dbeta, rstd_mean_dgamma, scale, offsets, mask, "")


@triton.jit(do_not_specialize=[*tiles.SIZES, "groups", "eps", "momentum", "slope"])
def rounds_forward(
    partials_ptr, counters_ptr, groups, x_ptr, y_ptr, residual_ptr, gamma_ptr, beta_ptr, mean_ptr, m2_ptr, rstd_ptr,
    running_mean_ptr, running_var_ptr, eps, momentum, slope, values, positions, channels, span, parts, part_positions,
    ACT: tl.constexpr, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr, TILE_PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store y, mean, m2 and rstd, and update the running statistics."""
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    part = tl.program_id(0) % parts
    first_tile, end_tile = tiles.tile_range(part, positions, part_positions, TILE_VALUES, INT64)
    sizes = positions, channels, span, parts, part_positions
    for block_id in range(tl.program_id(0) // parts, tl.cdiv(channels, TILE_CHANNELS), groups):
        block = tiles.block_at(block_id, channels, TILE_CHANNELS)
        strip = first_tile, end_tile, block, positions, channels, span
        origin = reductions.load_origin(x_ptr, block, span)
        mean, m2 = reductions.moments_of_strip(
            x_ptr, origin, strip, PITCH, TILE_VALUES, TILE_CHANNELS, STAGES, "evict_last"
        )
        if partials_ptr is not None:
            tiles.store_partial(partials_ptr, 0, part, parts, channels, block, mean)
            tiles.store_partial(partials_ptr, 1, part, parts, channels, block, m2)
            tiles.wait_for_all(counters_ptr + block_id, parts)
            mean, m2 = reductions.merge_partial_moments(
                partials_ptr, origin, block, sizes, PITCH, TILE_PARTS, TILE_CHANNELS
            )
        else:
            mean += origin
        rstd = reductions.rstd_of(m2, values, eps)
        if part == 0:
            tiles.store_vectors(mean_ptr, m2_ptr, rstd_ptr, block, mean, m2, rstd)
            if running_mean_ptr is not None:
                passes.update_running(running_mean_ptr, running_var_ptr, momentum, mean, m2, block, values)
        scale, shift = rstd[None, :] * tiles.load_vector(gamma_ptr, block, 1.0), tiles.load_vector(beta_ptr, block, 0.0)
        passes.normalize_strip(
            x_ptr, y_ptr, residual_ptr, mean[None, :], scale, shift, slope, strip,
            ACT, PITCH, TILE_VALUES, STAGES, "evict_first",
        )  # fmt: skip


@triton.jit(do_not_specialize=[*tiles.SIZES, "groups", "inverse_count", "slope"])
def rounds_backward(
    partials_ptr, counters_ptr, groups, grad_y_ptr, x_ptr, y_ptr, dx_ptr, dresidual_ptr, gamma_ptr, beta_ptr, mean_ptr,
    rstd_ptr, dbeta_ptr, dgamma_ptr, grad_energy_ptr, inverse_count, slope,
    values, positions, channels, span, parts, part_positions,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr,
    TILE_PARTS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Store dx, dresidual, dbeta, dgamma and grad_energy. SOURCE is as in `reductions`, inverse_count is 1/m."""
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    part = tl.program_id(0) % parts
    first_tile, end_tile = tiles.tile_range(part, positions, part_positions, TILE_VALUES, INT64)
    for block_id in range(tl.program_id(0) // parts, tl.cdiv(channels, TILE_CHANNELS), groups):
        block = tiles.block_at(block_id, channels, TILE_CHANNELS)
        strip = first_tile, end_tile, block, positions, channels, span
        mean, rstd, scale, shift = tiles.load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, block)
        dbeta, sum_g_xmu, grad_energy = reductions.sums_of_strip(
            grad_y_ptr, x_ptr, y_ptr, mean, scale, shift, slope, strip,
            ACT, SOURCE, ENERGY, PITCH, TILE_VALUES, TILE_CHANNELS, STAGES, "evict_last",
        )  # fmt: skip
        if partials_ptr is not None:
            reductions.store_partial_sums(
                partials_ptr, part, parts, channels, block, dbeta, sum_g_xmu, grad_energy, ENERGY
            )
            tiles.wait_for_all(counters_ptr + block_id, parts)
            dbeta, dgamma, grad_energy = reductions.merge_partial_sums(
                partials_ptr, rstd_ptr, parts, channels, block, ENERGY, TILE_PARTS, TILE_CHANNELS
            )
        else:
            dgamma = sum_g_xmu * tl.reshape(rstd, [TILE_CHANNELS])
        if part == 0:
            tiles.store_vectors(dbeta_ptr, dgamma_ptr, grad_energy_ptr, block, dbeta, dgamma, grad_energy)
        mean_dbeta, rstd_mean_dgamma = dbeta[None, :] * inverse_count, dgamma[None, :] * inverse_count * rstd
        passes.input_grad_of_strip(
            grad_y_ptr, x_ptr, y_ptr, dx_ptr, dresidual_ptr, mean, scale, shift, mean_dbeta, rstd_mean_dgamma, slope,
            strip, ACT, SOURCE, PITCH, TILE_VALUES, STAGES, "evict_first",
        )  # fmt: skip
