"""The second pass, in Triton.

    apply            y = act(gamma·(x - mean)·rstd + beta [+ residual]); also updates the running statistics
    apply_gradient   dx = gamma·rstd·(g - dbeta/m - xhat·dgamma/m), and dresidual = g

Where the parts of the first pass (`reductions`) are few, each merges them itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.gpu._triton import activations, reductions, tiles


@triton.jit
def update_running(running_mean_ptr, running_var_ptr, momentum, mean, m2, block, values):
    """Update the running statistics. Runs last: a launch that fails has changed nothing."""
    _update(running_mean_ptr, mean, momentum, block)
    _update(running_var_ptr, m2 / (values - 1), momentum, block)


@triton.jit
def _update(running_ptr, batch, momentum, block):
    """running ← (1 - momentum)·running + momentum·batch, exact for 0 and for 1, as torch.lerp is."""
    channel_ids, channel_mask = block
    old = tl.load(running_ptr + channel_ids, mask=channel_mask, other=0.0).to(tl.float32)
    delta = batch - old
    new = tl.where(momentum < 0.5, old + momentum * delta, batch - delta * (1.0 - momentum))
    tl.store(running_ptr + channel_ids, new.to(running_ptr.dtype.element_ty), mask=channel_mask)


@triton.jit
def store_y(
    y_ptr, residual_ptr, x, mean, scale, shift, slope, offsets, mask, ACT: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """Normalize a tile of x, add the residual, activate, and store y."""
    z = (x - mean) * scale + shift
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    y = activations.value(z, slope, ACT).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=mask, eviction_policy=EVICTION)


@triton.jit
def store_dx(
    dx_ptr, dresidual_ptr, xmu, g, mean_dbeta, rstd_mean_dgamma, scale, offsets, mask, EVICTION: tl.constexpr
):  # fmt: skip
    """Store dx = scale·(g - dbeta/m - xmu·rstd·dgamma/m) of a tile, and dresidual where it differs from grad_y."""
    dx = (g - mean_dbeta - xmu * rstd_mean_dgamma) * scale
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask, eviction_policy=EVICTION)
    if dresidual_ptr is not None:
        dresidual = g.to(dresidual_ptr.dtype.element_ty)
        tl.store(dresidual_ptr + offsets, dresidual, mask=mask, eviction_policy=EVICTION)


@triton.jit
def normalize_strip(
    x_ptr, y_ptr, residual_ptr, mean, scale, shift, slope, strip,
    ACT: tl.constexpr, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr, STAGES: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """y of a strip, last tile first: what the first pass read last is still in the L2."""
    first_tile, end_tile, block, positions, channels, span = strip
    for step in tl.range(0, end_tile - first_tile, num_stages=STAGES):
        offsets, mask = tiles.tile_at(end_tile - 1 - step, block, positions, channels, span, PITCH, TILE_VALUES)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        store_y(y_ptr, residual_ptr, x, mean, scale, shift, slope, offsets, mask, ACT, EVICTION)


@triton.jit(do_not_specialize=[*tiles.SIZES, "eps", "momentum", "slope"])
def apply(
    x_ptr, y_ptr, residual_ptr, gamma_ptr, beta_ptr, mean_ptr, m2_ptr, rstd_ptr, partials_ptr, running_mean_ptr,
    running_var_ptr, eps, momentum, slope, values, positions, channels, span, parts, part_positions,
    ACT: tl.constexpr, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr, TILE_PARTS: tl.constexpr,
    TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of one part.

    Normalizes by mean and rstd. With partials it merges these first, and stores mean, m2 and rstd. Running statistics,
    where there are any, are updated by mean and m2.
    """
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    part = tl.program_id(0) % parts
    block = tiles.block_at(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    channel_ids, channel_mask = block
    first_tile, end_tile = tiles.tile_range(part, positions, part_positions, TILE_VALUES, INT64)
    if partials_ptr is None:
        mean_row, rstd_row = tiles.load_vector(mean_ptr, block, 0.0), tiles.load_vector(rstd_ptr, block, 0.0)
        if running_mean_ptr is not None:
            mean = tl.load(mean_ptr + channel_ids, mask=channel_mask, other=0.0)
            m2 = tl.load(m2_ptr + channel_ids, mask=channel_mask, other=0.0)
    else:
        origin = reductions.load_origin(x_ptr, block, span)
        sizes = positions, channels, span, parts, part_positions
        mean, m2 = reductions.merge_partial_moments(
            partials_ptr, origin, block, sizes, PITCH, TILE_PARTS, TILE_CHANNELS
        )
        rstd = reductions.rstd_of(m2, values, eps)
        if part == 0:
            tiles.store_vectors(mean_ptr, m2_ptr, rstd_ptr, block, mean, m2, rstd)
        mean_row, rstd_row = mean[None, :], rstd[None, :]
    if running_mean_ptr is not None and part == 0:
        update_running(running_mean_ptr, running_var_ptr, momentum, mean, m2, block, values)
    scale, shift = rstd_row * tiles.load_vector(gamma_ptr, block, 1.0), tiles.load_vector(beta_ptr, block, 0.0)
    strip = first_tile, end_tile, block, positions, channels, span
    normalize_strip(
        x_ptr, y_ptr, residual_ptr, mean_row, scale, shift, slope, strip, ACT, PITCH, TILE_VALUES, STAGES, ""
    )


@triton.jit
def input_grad_of_strip(
    grad_y_ptr, x_ptr, y_ptr, dx_ptr, dresidual_ptr, mean, scale, shift, mean_dbeta, rstd_mean_dgamma, slope, strip,
    ACT: tl.constexpr, SOURCE: tl.constexpr, PITCH: tl.constexpr, TILE_VALUES: tl.constexpr, STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
):  # fmt: skip
    """dx of a strip, and dresidual where it differs from grad_y; last tile first."""
    first_tile, end_tile, block, positions, channels, span = strip
    for step in tl.range(0, end_tile - first_tile, num_stages=STAGES):
        offsets, mask = tiles.tile_at(end_tile - 1 - step, block, positions, channels, span, PITCH, TILE_VALUES)
        xmu, g = reductions.load_xmu_and_g(
            grad_y_ptr, x_ptr, y_ptr, offsets, mask, mean, scale, shift, slope, ACT, SOURCE, EVICTION
        )
        store_dx(dx_ptr, dresidual_ptr, xmu, g, mean_dbeta, rstd_mean_dgamma, scale, offsets, mask, EVICTION)


@triton.jit(do_not_specialize=[*tiles.SIZES, "inverse_count", "slope"])
def apply_gradient(
    grad_y_ptr, x_ptr, y_ptr, dx_ptr, dresidual_ptr, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, partials_ptr, dbeta_ptr,
    dgamma_ptr, grad_energy_ptr, inverse_count, slope, values, positions, channels, span, parts, part_positions,
    ACT: tl.constexpr, SOURCE: tl.constexpr, ENERGY: tl.constexpr, PITCH: tl.constexpr, ALIGNMENT: tl.constexpr,
    TILE_PARTS: tl.constexpr, TILE_VALUES: tl.constexpr, TILE_CHANNELS: tl.constexpr, INT64: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of one part, and dresidual where g differs from grad_y.

    Reads dbeta and dgamma, None for 0. With partials it merges these first, and stores dbeta, dgamma and grad_energy.
    inverse_count is 1/m.
    """
    positions, channels, span = tiles.align_sizes(positions, channels, span, PITCH, ALIGNMENT)
    part = tl.program_id(0) % parts
    block = tiles.block_at(tl.program_id(0) // parts, channels, TILE_CHANNELS)
    first_tile, end_tile = tiles.tile_range(part, positions, part_positions, TILE_VALUES, INT64)
    mean, rstd, scale, shift = tiles.load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, block)
    if partials_ptr is None:
        dbeta_row, dgamma_row = tiles.load_vector(dbeta_ptr, block, 0.0), tiles.load_vector(dgamma_ptr, block, 0.0)
    else:
        dbeta, dgamma, grad_energy = reductions.merge_partial_sums(
            partials_ptr, rstd_ptr, parts, channels, block, ENERGY, TILE_PARTS, TILE_CHANNELS
        )
        if part == 0:
            tiles.store_vectors(dbeta_ptr, dgamma_ptr, grad_energy_ptr, block, dbeta, dgamma, grad_energy)
        dbeta_row, dgamma_row = dbeta[None, :], dgamma[None, :]
    strip = first_tile, end_tile, block, positions, channels, span
    input_grad_of_strip(
        grad_y_ptr, x_ptr, y_ptr, dx_ptr, dresidual_ptr, mean, scale, shift, dbeta_row * inverse_count,
        dgamma_row * inverse_count * rstd, slope, strip, ACT, SOURCE, PITCH, TILE_VALUES, STAGES, "",
    )  # fmt: skip
