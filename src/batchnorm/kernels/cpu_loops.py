"""The innermost compiled loops, over a run: a range of columns of one row of the matrix (`cpu_plan`).

Two forms of each, chosen by `span`, the length of a channel's slice in a row:

    slices     along one channel's slice, its constants and sums in registers
    columns    along the row, constants and sums in arrays, one of each for every column

Sums are accumulated in float64 (of bfloat16, in float32), moments about the first values of each cell in the tile, so
that no digit is lost however many deviations the mean is from zero. z is the same arithmetic forward and backward, so
that what is passed is not blocked.
"""

from __future__ import annotations

from types import SimpleNamespace

from batchnorm.kernels.cpu_memory import accumulate, accumulate_product, fused, inlined, like, load, store

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
