"""The innermost compiled loops, over a run: a range of columns of one row of the matrix (`cpu.plan`).

Two forms of each, chosen by `span`, the length of a channel's slice in a row:

    slices     along one channel's slice, its constants and sums in registers
    columns    along the row, constants and sums in arrays, one of each for every column

Sums are accumulated in float64 (of bfloat16, in float32), moments about the first values of each cell in the tile, so
that no digit is lost however many deviations the mean is from zero. z is the same arithmetic forward and backward, so
that what is passed is not blocked.

Below them, the work done a channel at a time, between reducing x and applying the result to it. A channel has one cell
or several, one a column or one a channel: each with partial sums and constants.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

from numba import types

from batchnorm.kernels.cpu._codegen.memory import (
    FLOAT64,
    accumulate,
    accumulate_product,
    array,
    behind,
    fused,
    inlined,
    integer,
    like,
    load,
    number,
    store,
)
from batchnorm.kernels.cpu.plan import FIELDS

HIGH, SCALE, SHIFT, ALONG, LEVEL = range(5)
"""The constants of a cell: z = (x - HIGH)·SCALE + SHIFT, dx = SCALE·g + (x - HIGH)·ALONG + LEVEL."""

_BLOCK = 1024


# --- what an activation or its derivative is computed from: z, with the residual in `other` or without, or y in it ----


@inlined
def _z_of_x(d, other, i, scale, shift):
    return fused(d, scale, shift)


@inlined
def _z_with_residual(d, other, i, scale, shift):
    return fused(d, scale, shift) + load(other, i)


@inlined
def _y(d, other, i, scale, shift):
    return load(other, i)


Z = {"x": _z_of_x, "residual": _z_with_residual, "y": _y}


# --- slices -----------------------------------------------------------------------------------------------------------


@inlined
def _slices_moments(x, sums, row, left, right, columns, span):
    channels = columns // span
    for cell in range(left // span, (right - 1) // span + 1):
        start, stop = row * columns + max(left, cell * span), row * columns + min(right, cell * span + span)
        origin = load(sums, 2 * channels + cell)
        for block in range(start, stop, _BLOCK):
            total, squares = like(origin, 0.0), like(origin, 0.0)
            for i in range(block, min(stop, block + _BLOCK)):
                d = like(origin, load(x, i)) - origin
                total = accumulate(total, d)
                squares = accumulate_product(squares, d, d)
            store(sums, cell, load(sums, cell) + total)
            store(sums, channels + cell, load(sums, channels + cell) + squares)


@inlined
def _slices_y(x, residual, line, row, left, right, columns, span, constants, slope, z_of, value):
    channels = columns // span
    for cell in range(left // span, (right - 1) // span + 1):
        start, stop = row * columns + max(left, cell * span), row * columns + min(right, cell * span + span)
        high, scale = load(constants, HIGH * channels + cell), load(constants, SCALE * channels + cell)
        shift = load(constants, SHIFT * channels + cell)
        for i in range(start, stop):
            store(line, i - row * columns - left, value(z_of(load(x, i) - high, residual, i, scale, shift), slope))


@inlined
def _slices_sums(x, grad_y, other, sums, row, left, right, columns, span, constants, slope, z_of, gradient, energy):
    channels = columns // span
    for cell in range(left // span, (right - 1) // span + 1):
        start, stop = row * columns + max(left, cell * span), row * columns + min(right, cell * span + span)
        high, scale = load(constants, HIGH * channels + cell), load(constants, SCALE * channels + cell)
        shift, nothing = load(constants, SHIFT * channels + cell), like(load(sums, cell), 0.0)
        for block in range(start, stop, _BLOCK):
            total, along, squares = nothing, nothing, nothing
            for i in range(block, min(stop, block + _BLOCK)):
                d = load(x, i) - high
                g = like(total, gradient(load(grad_y, i), z_of(d, other, i, scale, shift), slope))
                total = accumulate(total, g)
                along = accumulate_product(along, g, like(total, d))
                if energy:
                    squares = accumulate_product(squares, g, g)
            store(sums, cell, load(sums, cell) + total)
            store(sums, channels + cell, load(sums, channels + cell) + along)
            store(sums, 2 * channels + cell, load(sums, 2 * channels + cell) + squares)


@inlined
def _slices_dx(
    x, grad_y, other, line, more, row, left, right, columns, span, constants, slope, z_of, gradient, with_dresidual
):
    channels = columns // span
    for cell in range(left // span, (right - 1) // span + 1):
        start, stop = row * columns + max(left, cell * span), row * columns + min(right, cell * span + span)
        high, scale = load(constants, HIGH * channels + cell), load(constants, SCALE * channels + cell)
        shift = load(constants, SHIFT * channels + cell)
        along, level = load(constants, ALONG * channels + cell), load(constants, LEVEL * channels + cell)
        for i in range(start, stop):
            d = load(x, i) - high
            g = gradient(load(grad_y, i), z_of(d, other, i, scale, shift), slope)
            store(line, i - row * columns - left, fused(scale, g, fused(along, d, level)))
            if with_dresidual:
                store(more, i - row * columns - left, g)


# --- columns ----------------------------------------------------------------------------------------------------------


@inlined
def _columns_moments(x, sums, row, left, right, columns, span):
    at = row * columns
    for j in range(left, right):
        origin = load(sums, 2 * columns + j)
        d = like(origin, load(x, at + j)) - origin
        store(sums, j, load(sums, j) + d)
        store(sums, columns + j, accumulate_product(load(sums, columns + j), d, d))


@inlined
def _columns_y(x, residual, line, row, left, right, columns, span, constants, slope, z_of, value):
    at = row * columns
    for j in range(left, right):
        high, scale = load(constants, HIGH * columns + j), load(constants, SCALE * columns + j)
        shift = load(constants, SHIFT * columns + j)
        z = z_of(load(x, at + j) - high, residual, at + j, scale, shift)
        store(line, j - left, value(z, slope))


@inlined
def _columns_sums(x, grad_y, other, sums, row, left, right, columns, span, constants, slope, z_of, gradient, energy):
    at = row * columns
    for j in range(left, right):
        high, scale = load(constants, HIGH * columns + j), load(constants, SCALE * columns + j)
        shift = load(constants, SHIFT * columns + j)
        total, along = load(sums, j), load(sums, columns + j)
        d = load(x, at + j) - high
        g = like(total, gradient(load(grad_y, at + j), z_of(d, other, at + j, scale, shift), slope))
        store(sums, j, total + g)
        store(sums, columns + j, accumulate_product(along, g, like(total, d)))
        if energy:
            store(sums, 2 * columns + j, accumulate_product(load(sums, 2 * columns + j), g, g))


@inlined
def _columns_dx(
    x, grad_y, other, line, more, row, left, right, columns, span, constants, slope, z_of, gradient, with_dresidual
):
    at = row * columns
    for j in range(left, right):
        high, scale = load(constants, HIGH * columns + j), load(constants, SCALE * columns + j)
        shift = load(constants, SHIFT * columns + j)
        along, level = load(constants, ALONG * columns + j), load(constants, LEVEL * columns + j)
        d = load(x, at + j) - high
        g = gradient(load(grad_y, at + j), z_of(d, other, at + j, scale, shift), slope)
        store(line, j - left, fused(scale, g, fused(along, d, level)))
        if with_dresidual:
            store(more, j - left, g)


SLICES = SimpleNamespace(moments=_slices_moments, y=_slices_y, sums=_slices_sums, dx=_slices_dx)
COLUMNS = SimpleNamespace(moments=_columns_moments, y=_columns_y, sums=_columns_sums, dx=_columns_dx)


_wide = types.float64

_ROWS, _CHANNELS, _FOLD = FIELDS["rows"], FIELDS["channels"], FIELDS["fold"]
_CELL_SPAN, _WEIGHT, _PARTS, _PART_ROWS = (FIELDS[name] for name in ("cell_span", "weight", "parts", "part_rows"))
_GAMMA, _BETA, _MEAN, _M2, _RSTD = (FIELDS[name] for name in ("gamma", "beta", "mean", "m2", "rstd"))
_RUNNING, _MOMENTUM = FIELDS["running_mean"], FIELDS["momentum"]
_SUMS, _EPS, _COUNT = FIELDS["sums"], FIELDS["eps"], FIELDS["count"]


@inlined
def _cell(channel, nth, channels, span):
    """A channel's nth cell."""
    return (nth // span * channels + channel) * span + nth % span


@inlined
def _sum(partials, at):
    return _wide(load(partials, at))


@inlined
def gather_moments(job, partials, start, stop):
    """Merge the moments of all tiles of these channels into those of the first, cell by cell (Chan et al. 1983)."""
    span, channels, part_rows = integer(job, _CELL_SPAN), integer(job, _CHANNELS), integer(job, _PART_ROWS)
    cells = channels * span * integer(job, _FOLD)
    for part in range(1, integer(job, _PARTS)):
        before, here = part * part_rows, min(part_rows, integer(job, _ROWS) - part * part_rows)
        share = here / _wide(before + here)
        spread = _wide(before) * share * integer(job, _WEIGHT)
        other = behind(partials, 3 * part * cells)
        for nth in range(integer(job, _FOLD)):
            for cell in range((nth * channels + start) * span, (nth * channels + stop) * span):
                mean, squares = _sum(partials, cell), _sum(partials, cells + cell)
                off = _sum(other, cell) - mean
                store(partials, cell, mean + off * share)
                store(partials, cells + cell, squares + (_sum(other, cells + cell) + off * off * spread))


@inlined
def _move(averages, channel, batch, momentum):
    """average ← (1 - momentum)·average + momentum·batch, exact for 0 and for 1, as torch.lerp is."""
    old = _wide(load(averages, channel))
    off = batch - old
    store(averages, channel, old + momentum * off if momentum < 0.5 else batch - off * (1.0 - momentum))


@inlined
def merge_moments(job, partials, channel, running_mean, running_var):
    """mean, m2 and rstd of a channel from the moments of its cells; the running statistics, where given, move by it."""
    span, channels, rows = (
        integer(job, _CELL_SPAN),
        integer(job, _CHANNELS),
        integer(job, _ROWS) * integer(job, _WEIGHT),
    )
    each = span * integer(job, _FOLD)
    origin = _sum(partials, channel * span)
    total, squares = 0.0, 0.0
    for nth in range(each):
        total += _sum(partials, _cell(channel, nth, channels, span)) - origin
    mean = origin + total / each
    for nth in range(each):
        cell = _cell(channel, nth, channels, span)
        off = _sum(partials, cell) - mean
        squares += _sum(partials, each * channels + cell) + rows * off * off
    m = _wide(rows * each)
    store(array(job, _MEAN, FLOAT64), channel, mean)
    store(array(job, _M2, FLOAT64), channel, squares)
    store(array(job, _RSTD, FLOAT64), channel, 1.0 / math.sqrt(squares / m + number(job, _EPS)))
    if integer(job, _RUNNING) != 0:
        _move(running_mean, channel, mean, number(job, _MOMENTUM))
        _move(running_var, channel, squares / (m - 1.0), number(job, _MOMENTUM))


@inlined
def gather_sums(job, partials, start, stop):
    """Add the sums of all tiles of these channels to those of the first, cell by cell."""
    span, channels, fold = integer(job, _CELL_SPAN), integer(job, _CHANNELS), integer(job, _FOLD)
    for part in range(1, integer(job, _PARTS)):
        other = behind(partials, 3 * part * channels * span * fold)
        for nth in range(3 * fold):
            for cell in range((nth * channels + start) * span, (nth * channels + stop) * span):
                store(partials, cell, _sum(partials, cell) + _sum(other, cell))


@inlined
def merge_sums(job, partials, channel, constants):
    """dbeta = Σg, dgamma = Σg·xhat and Σg² of a channel from Σg, Σg·(x - HIGH) and Σg² of its cells."""
    span, channels, sums = integer(job, _CELL_SPAN), integer(job, _CHANNELS), array(job, _SUMS, FLOAT64)
    each = span * integer(job, _FOLD)
    cells = each * channels
    dbeta, along, energy = 0.0, 0.0, 0.0
    for nth in range(each):
        cell = _cell(channel, nth, channels, span)
        dbeta += _sum(partials, cell)
        along += _sum(partials, cells + cell)
        energy += _sum(partials, 2 * cells + cell)
    mean, rstd = load(array(job, _MEAN, FLOAT64), channel), load(array(job, _RSTD, FLOAT64), channel)
    store(sums, channel, dbeta)
    store(sums, channels + channel, (along - (mean - _wide(like(load(constants, 0), mean))) * dbeta) * rstd)
    store(sums, 2 * channels + channel, energy)


@inlined
def prepare(job, channel, gamma, beta, constants):
    """z = (x - HIGH)·SCALE + SHIFT is gamma·(x - mean)·rstd + beta: HIGH the rounded mean, the rest of it in SHIFT."""
    mean, scale = load(array(job, _MEAN, FLOAT64), channel), load(array(job, _RSTD, FLOAT64), channel)
    shift = 0.0
    if integer(job, _GAMMA) != 0:
        scale *= load(gamma, channel)
    if integer(job, _BETA) != 0:
        shift = _wide(load(beta, channel))
    high = _wide(like(load(constants, 0), mean))
    span, channels = integer(job, _CELL_SPAN), integer(job, _CHANNELS)
    cells = channels * span * integer(job, _FOLD)
    for nth in range(span * integer(job, _FOLD)):
        cell = _cell(channel, nth, channels, span)
        store(constants, HIGH * cells + cell, high)
        store(constants, SCALE * cells + cell, scale)
        store(constants, SHIFT * cells + cell, shift - (mean - high) * scale)


@inlined
def slopes(job, channel, gamma, constants):
    """dx = SCALE·g + (x - HIGH)·ALONG + LEVEL is gamma·rstd·(g - dbeta/m - xhat·dgamma/m)."""
    mean, rstd = load(array(job, _MEAN, FLOAT64), channel), load(array(job, _RSTD, FLOAT64), channel)
    sums = array(job, _SUMS, FLOAT64)
    scale = rstd / number(job, _COUNT)
    if integer(job, _GAMMA) != 0:
        scale *= load(gamma, channel)
    along = -scale * rstd * load(sums, integer(job, _CHANNELS) + channel)
    level = -scale * load(sums, channel) - along * (mean - _wide(like(load(constants, 0), mean)))
    span, channels = integer(job, _CELL_SPAN), integer(job, _CHANNELS)
    cells = channels * span * integer(job, _FOLD)
    for nth in range(span * integer(job, _FOLD)):
        cell = _cell(channel, nth, channels, span)
        store(constants, ALONG * cells + cell, along)
        store(constants, LEVEL * cells + cell, level)
