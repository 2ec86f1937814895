"""The compiled work of a job, tile by tile: its phases, in this order.

    forward     REDUCE (moments) | MERGE (mean, m2, rstd) | PREPARE (constants) | APPLY (y)
    backward    PREPARE (constants) | REDUCE (Σg, Σg·d, Σg²) | MERGE (dbeta, dgamma) | SLOPES (constants) | APPLY (dx)

Whoever draws a tile's number does it, and nothing depends on who did: any number of threads gives the same bits. With
all phases at once a tile holds all rows of its channels, and is read from main memory once; else REDUCE and APPLY are
calls of their own over tiles of rows, and what lies between is done for all channels before the next begins.

What is written goes piece by piece into a buffer in the type that is computed with, and from there, rounded, by whole
cache lines into memory: past the caches where the job says so (`stream`).
"""

from __future__ import annotations

from typing import Any

from numba import types

from batchnorm.kernels.cpu._codegen.activations import GRADIENTS, GRADIENTS_BY_Y, VALUES
from batchnorm.kernels.cpu._codegen.loops import (
    COLUMNS,
    SLICES,
    Z,
    gather_moments,
    gather_sums,
    merge_moments,
    merge_sums,
    prepare,
    slopes,
)
from batchnorm.kernels.cpu._codegen.memory import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    address,
    array,
    behind,
    draw,
    inlined,
    integer,
    like,
    line_length,
    load,
    number,
    scratch,
    store,
    store_line,
)
from batchnorm.kernels.cpu.plan import APPLY, FIELDS, MERGE, PREPARE, REDUCE, SLOPES

_wide = types.float64
# What is computed with, and what partial sums are: float32 has many digits more than bfloat16.
_COMPUTED = {FLOAT32: FLOAT32, BFLOAT16: FLOAT32, FLOAT64: FLOAT64}
_SUMMED = {FLOAT32: FLOAT64, BFLOAT16: FLOAT32, FLOAT64: FLOAT64}
_ROOM = 1024
_NEAR = 16

_TICKET, _TILES, _REVERSE = (FIELDS[name] for name in ("ticket", "tiles", "reverse"))
_PHASES, _STREAM, _PARTIALS, _CONSTANTS = (FIELDS[name] for name in ("phases", "stream", "partials", "constants"))
_ROWS, _CHANNELS, _SPAN, _FOLD = (FIELDS[name] for name in ("rows", "channels", "span", "fold"))
_CELL_SPAN, _WEIGHT, _PART_ROWS = (FIELDS[name] for name in ("cell_span", "weight", "part_rows"))
_TILE_ROWS, _TILE_CHANNELS = FIELDS["tile_rows"], FIELDS["tile_channels"]
_X, _Y, _OTHER, _GAMMA, _BETA = (FIELDS[name] for name in ("x", "y", "other", "gamma", "beta"))
_RUNNING_MEAN, _RUNNING_VAR = FIELDS["running_mean"], FIELDS["running_var"]
_GRAD_Y, _DX, _DRESIDUAL, _SLOPE = (FIELDS[name] for name in ("grad_y", "dx", "dresidual", "slope"))


@inlined
def _flush(job, target, start, stop, line):
    """target[start … stop - 1] = line[0 …]: by whole cache lines, past the caches without reading them if so asked."""
    width, stream = line_length(target), integer(job, _STREAM)
    at = start
    while at < stop and address(target, at) & 63:
        store(target, at, load(line, at - start))
        at += 1
    while at + width <= stop:
        if stream:
            store_line(target, at, line, at - start, True)
        else:
            store_line(target, at, line, at - start, False)
        at += width
    while at < stop:
        store(target, at, load(line, at - start))
        at += 1


@inlined
def _next_tile(job):
    """first and last row, first and last channel of the next tile; no rows when there is none left."""
    nth, tiles = draw(job, _TICKET), integer(job, _TILES)
    if nth >= tiles:
        return 0, 0, 0, 0
    if integer(job, _REVERSE) != 0:
        nth = tiles - 1 - nth
    rows, channels = integer(job, _ROWS), integer(job, _CHANNELS)
    tile_rows, tile_channels = integer(job, _TILE_ROWS), integer(job, _TILE_CHANNELS)
    across = (channels + tile_channels - 1) // tile_channels
    first, start = nth // across * tile_rows, nth % across * tile_channels
    return first, min(first + tile_rows, rows), start, min(start + tile_channels, channels)


@inlined
def _begin_moments(x, at, span, partials, cells, start, stop):
    """Choose what d is measured from: the mean of the cell's first values, so that no single one can be far off."""
    near = min(span, _NEAR)
    for cell in range(start, stop):
        total = 0.0
        for i in range(near):
            total += _wide(load(x, at + cell * span + i))
        store(partials, 2 * cells + cell, _wide(like(load(x, at), total / near)))


@inlined
def _finish_moments(partials, cells, start, stop, n):
    """From Σd and Σd² of n values to their mean and Σ(x - mean)²."""
    for cell in range(start, stop):
        total, squares = _wide(load(partials, cell)), _wide(load(partials, cells + cell))
        off = total / n
        squares -= total * off
        store(partials, cell, _wide(load(partials, 2 * cells + cell)) + off)
        store(partials, cells + cell, 0.0 if squares < 0.0 else squares)


def forward(kind: int, act: str | None, source: str, by_columns: bool) -> Any:
    """The forward to compile, for elements of `kind` and one form of loops; z is of "x" or with the "residual"."""
    computed, summed = _COMPUTED[kind], _SUMMED[kind]
    loops = COLUMNS if by_columns else SLICES
    moments_of, y_of, z_of, value = loops.moments, loops.y, Z[source], VALUES[act]

    def work(job):
        phases, line = integer(job, _PHASES), scratch(computed, _ROOM)
        x, residual, y = array(job, _X, kind), array(job, _OTHER, kind), array(job, _Y, kind)
        gamma, beta, constants = (
            array(job, _GAMMA, computed),
            array(job, _BETA, computed),
            array(job, _CONSTANTS, computed),
        )
        running_mean, running_var = array(job, _RUNNING_MEAN, computed), array(job, _RUNNING_VAR, computed)
        span, fold, slope = integer(job, _SPAN), integer(job, _FOLD), like(load(constants, 0), number(job, _SLOPE))
        columns, cell_span, weight = (
            integer(job, _CHANNELS) * span * fold,
            integer(job, _CELL_SPAN),
            integer(job, _WEIGHT),
        )
        cells = integer(job, _CHANNELS) * cell_span * fold
        while True:
            first, last, start, stop = _next_tile(job)
            if last == 0:
                break
            left, right, cell, end = start * span, stop * span * fold, start * cell_span, stop * cell_span * fold
            partials = behind(array(job, _PARTIALS, summed), first // integer(job, _PART_ROWS) * 3 * cells)
            if phases & REDUCE:
                _begin_moments(x, first * columns, weight, partials, cells, cell, end)
                for row in range(first, last):
                    moments_of(x, partials, row, left, right, columns, span)
                _finish_moments(partials, cells, cell, end, _wide((last - first) * weight))
            if phases & MERGE:
                gather_moments(job, partials, start, stop)
            for channel in range(start, stop):
                if phases & MERGE:
                    merge_moments(job, partials, channel, running_mean, running_var)
                if phases & PREPARE:
                    prepare(job, channel, gamma, beta, constants)
            if phases & APPLY:
                for nth in range(first, last):
                    row = first + last - 1 - nth if phases & REDUCE else nth  # what was read last is still in the cache
                    for at in range(left, right, _ROOM):
                        upto, here = min(right, at + _ROOM), row * columns + at
                        y_of(x, residual, line, row, at, upto, columns, span, constants, slope, z_of, value)
                        _flush(job, y, here, here + upto - at, line)

    return work


def backward(kind: int, act: str | None, source: str, by_columns: bool, energy: bool) -> Any:
    """The backward to compile: act' by z of "x", or by "y", and then the residual gets a gradient, too.

    `energy`: Σg² is wanted.
    """
    with_dresidual = source == "y"
    computed, summed = _COMPUTED[kind], _SUMMED[kind]
    loops = COLUMNS if by_columns else SLICES
    sums_of, dx_of, z_of = loops.sums, loops.dx, Z[source]
    gradient = GRADIENTS_BY_Y[act] if source == "y" else GRADIENTS[act]

    def work(job):
        phases, line, more = integer(job, _PHASES), scratch(computed, _ROOM), scratch(computed, _ROOM)
        x, grad_y, other = array(job, _X, kind), array(job, _GRAD_Y, kind), array(job, _OTHER, kind)
        dx, dresidual = array(job, _DX, kind), array(job, _DRESIDUAL, kind)
        gamma, beta, constants = (
            array(job, _GAMMA, computed),
            array(job, _BETA, computed),
            array(job, _CONSTANTS, computed),
        )
        span, fold, slope = integer(job, _SPAN), integer(job, _FOLD), like(load(constants, 0), number(job, _SLOPE))
        columns = integer(job, _CHANNELS) * span * fold
        cells = integer(job, _CHANNELS) * integer(job, _CELL_SPAN) * fold
        while True:
            first, last, start, stop = _next_tile(job)
            if last == 0:
                break
            left, right = start * span, stop * span * fold
            partials = behind(array(job, _PARTIALS, summed), first // integer(job, _PART_ROWS) * 3 * cells)
            if phases & PREPARE:
                for channel in range(start, stop):
                    prepare(job, channel, gamma, beta, constants)
            if phases & REDUCE:
                for row in range(first, last):
                    sums_of(
                        x, grad_y, other, partials, row, left, right, columns, span, constants, slope, z_of, gradient,
                        energy,
                    )  # fmt: skip
            if phases & MERGE:
                gather_sums(job, partials, start, stop)
            for channel in range(start, stop):
                if phases & MERGE:
                    merge_sums(job, partials, channel, constants)
                if phases & SLOPES:
                    slopes(job, channel, gamma, constants)
            if phases & APPLY:
                for nth in range(first, last):
                    row = first + last - 1 - nth if phases & REDUCE else nth
                    for at in range(left, right, _ROOM):
                        upto, here = min(right, at + _ROOM), row * columns + at
                        dx_of(
                            x, grad_y, other, line, more, row, at, upto, columns, span, constants, slope, z_of,
                            gradient, with_dresidual,
                        )  # fmt: skip
                        _flush(job, dx, here, here + upto - at, line)
                        if with_dresidual:
                            _flush(job, dresidual, here, here + upto - at, more)

    return work
