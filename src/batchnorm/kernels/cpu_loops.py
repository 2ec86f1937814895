"""The innermost compiled loops, over a run: a range of columns of one row of the matrix (`cpu_plan`).

Two forms of each, chosen by `span`, the length of a channel's slice in a row:

    slices     along one channel's slice, its constants and sums in registers
    columns    along the row, constants and sums in arrays, one of each for every column

Sums are accumulated in float64, moments about the first row of the tile, so that no digit is lost however many
deviations the mean is from zero. z is the same arithmetic forward and backward, so that what is passed is not blocked.
"""

from __future__ import annotations

from types import SimpleNamespace

from numba import njit, types

from batchnorm.kernels.cpu_memory import accumulate, accumulate_product, load, store

HIGH, SCALE, SHIFT, ALONG, LEVEL = range(5)
"""The constants of a cell: z = (x - HIGH)·SCALE + SHIFT, dx = SCALE·g + (x - HIGH)·ALONG + LEVEL."""

_inlined = njit(forceinline=True, error_model="numpy")
_wide = types.float64


# --- z and the gradient at z, where `other` is nothing, the residual, or y on its side of the kink --------------------


@_inlined
def _z_of_x(d, other, i, scale, shift):
    return d * scale + shift


@_inlined
def _z_with_residual(d, other, i, scale, shift):
    return d * scale + shift + load(other, i)


@_inlined
def _side_of_y(d, other, i, scale, shift):
    return load(other, i)


Z = {"x": _z_of_x, "residual": _z_with_residual, "y": _side_of_y}


# --- slices -----------------------------------------------------------------------------------------------------------


@_inlined
def _slices_moments(x, sums, row, first, left, right, columns, span):
    channels = columns // span
    for cell in range(left // span, (right - 1) // span + 1):
        start, stop = row * columns + max(left, cell * span), row * columns + min(right, cell * span + span)
        origin = _wide(load(x, first * columns + cell * span))
        total, squares = load(sums, cell), load(sums, channels + cell)
        for i in range(start, stop):
            d = _wide(load(x, i)) - origin
            total = accumulate(total, d)
            squares = accumulate_product(squares, d, d)
        store(sums, cell, total)
        store(sums, channels + cell, squares)


@_inlined
def _slices_y(x, residual, y, behind, row, left, right, columns, span, constants, slope, z_of, value):
    channels = columns // span
    for cell in range(left // span, (right - 1) // span + 1):
        start, stop = row * columns + max(left, cell * span), row * columns + min(right, cell * span + span)
        high, scale = load(constants, HIGH * channels + cell), load(constants, SCALE * channels + cell)
        shift = load(constants, SHIFT * channels + cell)
        for i in range(start, stop):
            store(y, i - behind, value(z_of(load(x, i) - high, residual, i, scale, shift), slope))


@_inlined
def _slices_sums(x, grad_y, other, sums, row, left, right, columns, span, constants, slope, z_of, gradient, energy):
    channels = columns // span
    for cell in range(left // span, (right - 1) // span + 1):
        start, stop = row * columns + max(left, cell * span), row * columns + min(right, cell * span + span)
        high, scale = load(constants, HIGH * channels + cell), load(constants, SCALE * channels + cell)
        shift = load(constants, SHIFT * channels + cell)
        total, along = load(sums, cell), load(sums, channels + cell)
        squares = load(sums, 2 * channels + cell)
        for i in range(start, stop):
            d = load(x, i) - high
            g = _wide(gradient(load(grad_y, i), z_of(d, other, i, scale, shift), slope))
            total = accumulate(total, g)
            along = accumulate_product(along, g, _wide(d))
            if energy:
                squares = accumulate_product(squares, g, g)
        store(sums, cell, total)
        store(sums, channels + cell, along)
        store(sums, 2 * channels + cell, squares)


@_inlined
def _slices_dx(
    x, grad_y, other, dx, dresidual, behind, row, left, right, columns, span, constants, slope, z_of, gradient, handed
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
            store(dx, i - behind, scale * g + (along * d + level))
            if handed:
                store(dresidual, i - behind, g)


# --- columns ----------------------------------------------------------------------------------------------------------


@_inlined
def _columns_moments(x, sums, row, first, left, right, columns, span):
    at, origins = row * columns, first * columns
    for j in range(left, right):
        d = _wide(load(x, at + j)) - _wide(load(x, origins + j))
        store(sums, j, load(sums, j) + d)
        store(sums, columns + j, accumulate_product(load(sums, columns + j), d, d))


@_inlined
def _columns_y(x, residual, y, behind, row, left, right, columns, span, constants, slope, z_of, value):
    at = row * columns
    for j in range(left, right):
        high, scale = load(constants, HIGH * columns + j), load(constants, SCALE * columns + j)
        shift = load(constants, SHIFT * columns + j)
        z = z_of(load(x, at + j) - high, residual, at + j, scale, shift)
        store(y, at + j - behind, value(z, slope))


@_inlined
def _columns_sums(x, grad_y, other, sums, row, left, right, columns, span, constants, slope, z_of, gradient, energy):
    at = row * columns
    for j in range(left, right):
        high, scale = load(constants, HIGH * columns + j), load(constants, SCALE * columns + j)
        shift = load(constants, SHIFT * columns + j)
        d = load(x, at + j) - high
        g = _wide(gradient(load(grad_y, at + j), z_of(d, other, at + j, scale, shift), slope))
        store(sums, j, load(sums, j) + g)
        store(sums, columns + j, accumulate_product(load(sums, columns + j), g, _wide(d)))
        if energy:
            store(sums, 2 * columns + j, accumulate_product(load(sums, 2 * columns + j), g, g))


@_inlined
def _columns_dx(
    x, grad_y, other, dx, dresidual, behind, row, left, right, columns, span, constants, slope, z_of, gradient, handed
):
    at = row * columns
    for j in range(left, right):
        high, scale = load(constants, HIGH * columns + j), load(constants, SCALE * columns + j)
        shift = load(constants, SHIFT * columns + j)
        along, level = load(constants, ALONG * columns + j), load(constants, LEVEL * columns + j)
        d = load(x, at + j) - high
        g = gradient(load(grad_y, at + j), z_of(d, other, at + j, scale, shift), slope)
        store(dx, at + j - behind, scale * g + (along * d + level))
        if handed:
            store(dresidual, at + j - behind, g)


SLICES = SimpleNamespace(moments=_slices_moments, y=_slices_y, sums=_slices_sums, dx=_slices_dx)
COLUMNS = SimpleNamespace(moments=_columns_moments, y=_columns_y, sums=_columns_sums, dx=_columns_dx)
