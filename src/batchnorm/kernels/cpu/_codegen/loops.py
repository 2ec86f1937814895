"""The innermost compiled loops, over a run: a range of columns of one row of the matrix (`cpu.plan`).

Each loop has two forms, chosen by `span`, the length of a channel's slice in a row:

    slices     along one channel's slice, with its constants and sums in registers
    columns    along the row, with arrays of constants and sums, one of each per column

Sums are accumulated in float64 (for bfloat16, in float32). Moments are about the first values of each cell in the tile,
so that no digits are lost, however large the mean is. z is computed the same way in forward and backward, so that both
mask the same values.

Below the loops is the work per channel, between reducing x and applying the result. A channel has one cell or several,
one per column or one per channel; each cell has partial sums and constants.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

from numba import types

from batchnorm.kernels.cpu._codegen.memory import (
    FLOAT64,
    accumulate,
    accumulate_product,
    advance,
    array,
    fma,
    inlined,
    integer,
    like,
    load,
    number,
    store,
)
from batchnorm.kernels.cpu.plan import FIELD

MEAN, SCALE, SHIFT, DX_SLOPE, DX_SHIFT = range(5)
"""The constants of a cell: z = (x - MEAN)·SCALE + SHIFT, dx = SCALE·g + (x - MEAN)·DX_SLOPE + DX_SHIFT."""

_BLOCK = 1024

Z = {
    "x": inlined(lambda xmu, other, i, scale, shift: fma(xmu, scale, shift)),
    "residual": inlined(lambda xmu, other, i, scale, shift: fma(xmu, scale, shift) + load(other, i)),
    "y": inlined(lambda xmu, other, i, scale, shift: load(other, i)),
}
"""What an activation or its derivative is computed from: z, with a residual in `other` or without, or y in `other`."""


@inlined
def _load_z_constants(constants, cells, cell):
    return (
        load(constants, MEAN * cells + cell),
        load(constants, SCALE * cells + cell),
        load(constants, SHIFT * cells + cell),
    )


@inlined
def _load_dx_constants(constants, cells, cell):
    return load(constants, DX_SLOPE * cells + cell), load(constants, DX_SHIFT * cells + cell)


# --- slices -----------------------------------------------------------------------------------------------------------


@inlined
def _slice(cell, row, first_column, end_column, columns, span):
    """The offsets where the part of a cell's slice in a run begins and ends."""
    return row * columns + max(first_column, cell * span), row * columns + min(end_column, cell * span + span)


@inlined
def _slices_moments(x, sums, row, first_column, end_column, columns, span):
    channels = columns // span
    for cell in range(first_column // span, (end_column - 1) // span + 1):
        first, end = _slice(cell, row, first_column, end_column, columns, span)
        origin = load(sums, 2 * channels + cell)
        for block in range(first, end, _BLOCK):
            total, squares = like(origin, 0.0), like(origin, 0.0)
            for i in range(block, min(end, block + _BLOCK)):
                delta = like(origin, load(x, i)) - origin
                total = accumulate(total, delta)
                squares = accumulate_product(squares, delta, delta)
            store(sums, cell, load(sums, cell) + total)
            store(sums, channels + cell, load(sums, channels + cell) + squares)


@inlined
def _slices_y(x, residual, line, row, first_column, end_column, columns, span, constants, slope, z_of, value):
    channels, line_offset = columns // span, row * columns + first_column
    for cell in range(first_column // span, (end_column - 1) // span + 1):
        first, end = _slice(cell, row, first_column, end_column, columns, span)
        mean, scale, shift = _load_z_constants(constants, channels, cell)
        for i in range(first, end):
            store(line, i - line_offset, value(z_of(load(x, i) - mean, residual, i, scale, shift), slope))


@inlined
def _slices_sums(
    x, grad_y, other, sums, row, first_column, end_column, columns, span, constants, slope, z_of, gradient, energy
):
    channels = columns // span
    for cell in range(first_column // span, (end_column - 1) // span + 1):
        first, end = _slice(cell, row, first_column, end_column, columns, span)
        mean, scale, shift = _load_z_constants(constants, channels, cell)
        zero = like(load(sums, cell), 0.0)
        for block in range(first, end, _BLOCK):
            dbeta, sum_g_xmu, grad_energy = zero, zero, zero
            for i in range(block, min(end, block + _BLOCK)):
                xmu = load(x, i) - mean
                g = like(dbeta, gradient(load(grad_y, i), z_of(xmu, other, i, scale, shift), slope))
                dbeta = accumulate(dbeta, g)
                sum_g_xmu = accumulate_product(sum_g_xmu, g, like(dbeta, xmu))
                if energy:
                    grad_energy = accumulate_product(grad_energy, g, g)
            store(sums, cell, load(sums, cell) + dbeta)
            store(sums, channels + cell, load(sums, channels + cell) + sum_g_xmu)
            store(sums, 2 * channels + cell, load(sums, 2 * channels + cell) + grad_energy)


@inlined
def _slices_dx(
    x, grad_y, other, line, line_dresidual, row, first_column, end_column, columns, span, constants, slope, z_of,
    gradient, with_dresidual,
):  # fmt: skip
    channels, line_offset = columns // span, row * columns + first_column
    for cell in range(first_column // span, (end_column - 1) // span + 1):
        first, end = _slice(cell, row, first_column, end_column, columns, span)
        mean, scale, shift = _load_z_constants(constants, channels, cell)
        dx_slope, dx_shift = _load_dx_constants(constants, channels, cell)
        for i in range(first, end):
            xmu = load(x, i) - mean
            g = gradient(load(grad_y, i), z_of(xmu, other, i, scale, shift), slope)
            store(line, i - line_offset, fma(scale, g, fma(dx_slope, xmu, dx_shift)))
            if with_dresidual:
                store(line_dresidual, i - line_offset, g)


# --- columns ----------------------------------------------------------------------------------------------------------


@inlined
def _columns_moments(x, sums, row, first_column, end_column, columns, span):
    for column in range(first_column, end_column):
        origin = load(sums, 2 * columns + column)
        delta = like(origin, load(x, row * columns + column)) - origin
        store(sums, column, load(sums, column) + delta)
        store(sums, columns + column, accumulate_product(load(sums, columns + column), delta, delta))


@inlined
def _columns_y(x, residual, line, row, first_column, end_column, columns, span, constants, slope, z_of, value):
    for column in range(first_column, end_column):
        i = row * columns + column
        mean, scale, shift = _load_z_constants(constants, columns, column)
        store(line, column - first_column, value(z_of(load(x, i) - mean, residual, i, scale, shift), slope))


@inlined
def _columns_sums(
    x, grad_y, other, sums, row, first_column, end_column, columns, span, constants, slope, z_of, gradient, energy
):
    for column in range(first_column, end_column):
        i = row * columns + column
        mean, scale, shift = _load_z_constants(constants, columns, column)
        dbeta, sum_g_xmu = load(sums, column), load(sums, columns + column)
        xmu = load(x, i) - mean
        g = like(dbeta, gradient(load(grad_y, i), z_of(xmu, other, i, scale, shift), slope))
        store(sums, column, dbeta + g)
        store(sums, columns + column, accumulate_product(sum_g_xmu, g, like(dbeta, xmu)))
        if energy:
            store(sums, 2 * columns + column, accumulate_product(load(sums, 2 * columns + column), g, g))


@inlined
def _columns_dx(
    x, grad_y, other, line, line_dresidual, row, first_column, end_column, columns, span, constants, slope, z_of,
    gradient, with_dresidual,
):  # fmt: skip
    for column in range(first_column, end_column):
        i = row * columns + column
        mean, scale, shift = _load_z_constants(constants, columns, column)
        dx_slope, dx_shift = _load_dx_constants(constants, columns, column)
        xmu = load(x, i) - mean
        g = gradient(load(grad_y, i), z_of(xmu, other, i, scale, shift), slope)
        store(line, column - first_column, fma(scale, g, fma(dx_slope, xmu, dx_shift)))
        if with_dresidual:
            store(line_dresidual, column - first_column, g)


SLICES = SimpleNamespace(moments=_slices_moments, y=_slices_y, sums=_slices_sums, dx=_slices_dx)
COLUMNS = SimpleNamespace(moments=_columns_moments, y=_columns_y, sums=_columns_sums, dx=_columns_dx)


# --- per channel ------------------------------------------------------------------------------------------------------

_wide = types.float64


@inlined
def _cell(channel, nth, channels, span):
    """A channel's nth cell."""
    return (nth // span * channels + channel) * span + nth % span


@inlined
def _load_wide(partials, index):
    return _wide(load(partials, index))


@inlined
def _load_statistics(job, channel):
    return load(array(job, FIELD.mean, FLOAT64), channel), load(array(job, FIELD.rstd, FLOAT64), channel)


@inlined
def gather_moments(job, partials, first_channel, end_channel):
    """Merge the moments of all tiles of these channels into those of the first, per cell (Chan et al. 1983)."""
    span, channels, part_rows = (
        integer(job, FIELD.cell_span),
        integer(job, FIELD.channels),
        integer(job, FIELD.part_rows),
    )
    cells = channels * span * integer(job, FIELD.fold)
    for part in range(1, integer(job, FIELD.parts)):
        merged_rows = part * part_rows
        rows = min(part_rows, integer(job, FIELD.rows) - part * part_rows)
        fraction = rows / _wide(merged_rows + rows)
        delta_weight = _wide(merged_rows) * fraction * integer(job, FIELD.weight)
        other = advance(partials, 3 * part * cells)
        for nth in range(integer(job, FIELD.fold)):
            for cell in range((nth * channels + first_channel) * span, (nth * channels + end_channel) * span):
                mean, m2 = _load_wide(partials, cell), _load_wide(partials, cells + cell)
                delta = _load_wide(other, cell) - mean
                store(partials, cell, mean + delta * fraction)
                store(partials, cells + cell, m2 + (_load_wide(other, cells + cell) + delta * delta * delta_weight))


@inlined
def _update_running(running, channel, batch, momentum):
    """running ← (1 - momentum)·running + momentum·batch, exact for 0 and for 1, as torch.lerp is."""
    old = _wide(load(running, channel))
    delta = batch - old
    store(running, channel, old + momentum * delta if momentum < 0.5 else batch - delta * (1.0 - momentum))


@inlined
def merge_moments(job, partials, channel, running_mean, running_var):
    """mean, m2 and rstd of a channel from the moments of its cells; updates the running statistics, where given."""
    span, channels = integer(job, FIELD.cell_span), integer(job, FIELD.channels)
    cell_count = integer(job, FIELD.rows) * integer(job, FIELD.weight)
    channel_cells = span * integer(job, FIELD.fold)
    origin = _load_wide(partials, channel * span)
    total, m2 = 0.0, 0.0
    for nth in range(channel_cells):
        total += _load_wide(partials, _cell(channel, nth, channels, span)) - origin
    mean = origin + total / channel_cells
    for nth in range(channel_cells):
        cell = _cell(channel, nth, channels, span)
        delta = _load_wide(partials, cell) - mean
        m2 += _load_wide(partials, channel_cells * channels + cell) + cell_count * delta * delta
    count = _wide(cell_count * channel_cells)
    store(array(job, FIELD.mean, FLOAT64), channel, mean)
    store(array(job, FIELD.m2, FLOAT64), channel, m2)
    store(array(job, FIELD.rstd, FLOAT64), channel, 1.0 / math.sqrt(m2 / count + number(job, FIELD.eps)))
    if integer(job, FIELD.running_mean) != 0:
        _update_running(running_mean, channel, mean, number(job, FIELD.momentum))
        _update_running(running_var, channel, m2 / (count - 1.0), number(job, FIELD.momentum))


@inlined
def gather_sums(job, partials, first_channel, end_channel):
    """Add the sums of all tiles of these channels to those of the first, per cell."""
    span, channels, fold = integer(job, FIELD.cell_span), integer(job, FIELD.channels), integer(job, FIELD.fold)
    for part in range(1, integer(job, FIELD.parts)):
        other = advance(partials, 3 * part * channels * span * fold)
        for nth in range(3 * fold):
            for cell in range((nth * channels + first_channel) * span, (nth * channels + end_channel) * span):
                store(partials, cell, _load_wide(partials, cell) + _load_wide(other, cell))


@inlined
def merge_sums(job, partials, channel, constants):
    """dbeta = Σg, dgamma = Σg·xhat and grad_energy = Σg² of a channel from Σg, Σg·(x - MEAN) and Σg² of its cells."""
    span, channels, sums = integer(job, FIELD.cell_span), integer(job, FIELD.channels), array(job, FIELD.sums, FLOAT64)
    channel_cells = span * integer(job, FIELD.fold)
    cells = channel_cells * channels
    dbeta, sum_g_xmu, grad_energy = 0.0, 0.0, 0.0
    for nth in range(channel_cells):
        cell = _cell(channel, nth, channels, span)
        dbeta += _load_wide(partials, cell)
        sum_g_xmu += _load_wide(partials, cells + cell)
        grad_energy += _load_wide(partials, 2 * cells + cell)
    mean, rstd = _load_statistics(job, channel)
    store(sums, channel, dbeta)
    store(sums, channels + channel, (sum_g_xmu - (mean - _wide(like(load(constants, 0), mean))) * dbeta) * rstd)
    store(sums, 2 * channels + channel, grad_energy)


@inlined
def prepare(job, channel, gamma, beta, constants):
    """Store MEAN, SCALE and SHIFT, for z = gamma·(x - mean)·rstd + beta: SHIFT corrects for the rounding of MEAN."""
    mean, scale = _load_statistics(job, channel)
    shift = 0.0
    if integer(job, FIELD.gamma) != 0:
        scale *= load(gamma, channel)
    if integer(job, FIELD.beta) != 0:
        shift = _wide(load(beta, channel))
    rounded_mean = _wide(like(load(constants, 0), mean))
    span, channels = integer(job, FIELD.cell_span), integer(job, FIELD.channels)
    cells = channels * span * integer(job, FIELD.fold)
    for nth in range(span * integer(job, FIELD.fold)):
        cell = _cell(channel, nth, channels, span)
        store(constants, MEAN * cells + cell, rounded_mean)
        store(constants, SCALE * cells + cell, scale)
        store(constants, SHIFT * cells + cell, shift - (mean - rounded_mean) * scale)


@inlined
def slopes(job, channel, gamma, constants):
    """Store DX_SLOPE and DX_SHIFT, with which dx is gamma·rstd·(g - dbeta/m - xhat·dgamma/m)."""
    mean, rstd = _load_statistics(job, channel)
    sums = array(job, FIELD.sums, FLOAT64)
    scale = rstd / number(job, FIELD.count)
    if integer(job, FIELD.gamma) != 0:
        scale *= load(gamma, channel)
    dx_slope = -scale * rstd * load(sums, integer(job, FIELD.channels) + channel)
    dx_shift = -scale * load(sums, channel) - dx_slope * (mean - _wide(like(load(constants, 0), mean)))
    span, channels = integer(job, FIELD.cell_span), integer(job, FIELD.channels)
    cells = channels * span * integer(job, FIELD.fold)
    for nth in range(span * integer(job, FIELD.fold)):
        cell = _cell(channel, nth, channels, span)
        store(constants, DX_SLOPE * cells + cell, dx_slope)
        store(constants, DX_SHIFT * cells + cell, dx_shift)
