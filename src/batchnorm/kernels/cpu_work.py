"""The compiled work of a job, tile by tile: its phases, in this order.

    forward     REDUCE (moments) | MERGE (mean, var, rstd) | PREPARE (constants) | APPLY (y)
    backward    PREPARE (constants) | REDUCE (Σg, Σg·d, Σg²) | MERGE (dbeta, dgamma) | SLOPES (constants) | APPLY (dx)

Whoever draws a tile's number does it, and nothing depends on who did: any number of threads gives the same bits. With
all phases at once a tile holds all rows of its channels, and is read from main memory once; else REDUCE and APPLY are
calls of their own over tiles of rows, and what lies between is done for all channels before the next begins.

What is written is written past the caches where the job says so (`stream`): piece by piece into a line buffer, and from
there by whole cache lines.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types

from batchnorm.kernels import cpu_channels as channels_of
from batchnorm.kernels.cpu_activations import GRADIENTS, VALUES
from batchnorm.kernels.cpu_loops import COLUMNS, SLICES, Z
from batchnorm.kernels.cpu_memory import (
    FLOAT32,
    FLOAT64,
    address,
    array,
    behind,
    draw,
    integer,
    like,
    line_length,
    load,
    number,
    scratch,
    store,
    stream_line,
)
from batchnorm.kernels.cpu_plan import APPLY, FIELDS, MERGE, PREPARE, REDUCE, SLOPES

_inlined = njit(forceinline=True, error_model="numpy")
_wide = types.float64
_ROOM = 1024

_TICKET, _TILES, _REVERSE = (FIELDS[name] for name in ("ticket", "tiles", "reverse"))
_PHASES, _STREAM, _PARTIALS, _CONSTANTS = (FIELDS[name] for name in ("phases", "stream", "partials", "constants"))
_ROWS, _CHANNELS, _SPAN, _FOLD = (FIELDS[name] for name in ("rows", "channels", "span", "fold"))
_CELL_SPAN, _WEIGHT, _PART_ROWS = (FIELDS[name] for name in ("cell_span", "weight", "part_rows"))
_TILE_ROWS, _TILE_CHANNELS = FIELDS["tile_rows"], FIELDS["tile_channels"]
_X, _Y, _OTHER, _GAMMA, _BETA = (FIELDS[name] for name in ("x", "y", "other", "gamma", "beta"))
_GRAD_Y, _DX, _DRESIDUAL, _SLOPE = (FIELDS[name] for name in ("grad_y", "dx", "dresidual", "slope"))


@_inlined
def _flush(target, start, stop, source):
    """target[start … stop - 1] = source[0 …]: whole cache lines past the caches, without reading them first."""
    width = line_length(target)
    at = start
    while at < stop and address(target, at) & 63:
        store(target, at, load(source, at - start))
        at += 1
    while at + width <= stop:
        stream_line(target, at, source, at - start)
        at += width
    while at < stop:
        store(target, at, load(source, at - start))
        at += 1


@_inlined
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


@_inlined
def _clear(partials, cells, sums, start, stop):
    for nth in range(sums):
        for cell in range(nth * cells + start, nth * cells + stop):
            store(partials, cell, 0.0)


@_inlined
def _finish_moments(x, at, span, partials, cells, start, stop, n):
    """From Σd and Σd² of n values about the cell's first to its mean and Σ(x - mean)²."""
    for cell in range(start, stop):
        total, squares = load(partials, cell), load(partials, cells + cell)
        off = total / n
        squares -= total * off
        store(partials, cell, _wide(load(x, at + cell * span)) + off)
        store(partials, cells + cell, 0.0 if squares < 0.0 else squares)


def forward(kind: int, act: str | None, source: str, by_columns: bool) -> Any:
    """The forward to compile, for elements of `kind` and one form of loops; z is of "x" or with the "residual"."""
    computed = FLOAT64 if kind == FLOAT64 else FLOAT32
    loops = COLUMNS if by_columns else SLICES
    moments_of, y_of, z_of, value = loops.moments, loops.y, Z[source], VALUES[act]
    gather, merge, prepare = channels_of.gather_moments, channels_of.merge_moments, channels_of.prepare

    def work(job):
        phases, stream, line = integer(job, _PHASES), integer(job, _STREAM), scratch(kind, _ROOM)
        x, residual, y = array(job, _X, kind), array(job, _OTHER, kind), array(job, _Y, kind)
        gamma, beta, constants = (
            array(job, _GAMMA, computed),
            array(job, _BETA, computed),
            array(job, _CONSTANTS, computed),
        )
        span, fold, slope = integer(job, _SPAN), integer(job, _FOLD), like(load(constants, 0), number(job, _SLOPE))
        columns, cell_span, weight = (
            integer(job, _CHANNELS) * span * fold,
            integer(job, _CELL_SPAN),
            integer(job, _WEIGHT),
        )
        cells = integer(job, _CHANNELS) * cell_span * fold
        target, room = (line, _ROOM) if stream else (y, columns)
        while True:
            first, last, start, stop = _next_tile(job)
            if last == 0:
                break
            left, right, cell, end = start * span, stop * span * fold, start * cell_span, stop * cell_span * fold
            partials = behind(array(job, _PARTIALS, FLOAT64), first // integer(job, _PART_ROWS) * 2 * cells)
            if phases & REDUCE:
                _clear(partials, cells, 2, cell, end)
                for row in range(first, last):
                    moments_of(x, partials, row, first, left, right, columns, span)
                _finish_moments(x, first * columns, weight, partials, cells, cell, end, _wide((last - first) * weight))
            if phases & MERGE:
                gather(job, partials, start, stop)
            for channel in range(start, stop):
                if phases & MERGE:
                    merge(job, partials, channel)
                if phases & PREPARE:
                    prepare(job, channel, gamma, beta, constants)
            if phases & APPLY:
                for nth in range(first, last):
                    row = first + last - 1 - nth if phases & REDUCE else nth  # what was read last is still in the cache
                    for at in range(left, right, room):
                        upto, here = min(right, at + room), row * columns + at
                        before = here if stream else 0
                        y_of(x, residual, target, before, row, at, upto, columns, span, constants, slope, z_of, value)
                        if stream:
                            _flush(y, here, here + upto - at, line)

    return work


def backward(kind: int, act: str | None, source: str, by_columns: bool, handed: bool, energy: bool) -> Any:
    """The backward to compile; `source` may also be "y".

    `handed`: the residual gets a gradient of its own. `energy`: Σg² is wanted.
    """
    computed = FLOAT64 if kind == FLOAT64 else FLOAT32
    loops = COLUMNS if by_columns else SLICES
    sums_of, dx_of, z_of, gradient = loops.sums, loops.dx, Z[source], GRADIENTS[act]
    gather, merge = channels_of.gather_sums, channels_of.merge_sums
    prepare, slopes = channels_of.prepare, channels_of.slopes

    def work(job):
        phases, stream, line, more = (
            integer(job, _PHASES),
            integer(job, _STREAM),
            scratch(kind, _ROOM),
            scratch(kind, _ROOM),
        )
        x, grad_y, other = array(job, _X, kind), array(job, _GRAD_Y, kind), array(job, _OTHER, kind)
        dx, dresidual = array(job, _DX, kind), array(job, _DRESIDUAL, kind)
        gamma, beta, constants = (
            array(job, _GAMMA, computed),
            array(job, _BETA, computed),
            array(job, _CONSTANTS, computed),
        )
        span, fold, slope = integer(job, _SPAN), integer(job, _FOLD), like(load(constants, 0), number(job, _SLOPE))
        columns, cell_span = integer(job, _CHANNELS) * span * fold, integer(job, _CELL_SPAN)
        cells = integer(job, _CHANNELS) * cell_span * fold
        to_dx, to_dresidual, room = (line, more, _ROOM) if stream else (dx, dresidual, columns)
        while True:
            first, last, start, stop = _next_tile(job)
            if last == 0:
                break
            left, right, cell, end = start * span, stop * span * fold, start * cell_span, stop * cell_span * fold
            partials = behind(array(job, _PARTIALS, FLOAT64), first // integer(job, _PART_ROWS) * 3 * cells)
            if phases & PREPARE:
                for channel in range(start, stop):
                    prepare(job, channel, gamma, beta, constants)
            if phases & REDUCE:
                _clear(partials, cells, 3, cell, end)
                for row in range(first, last):
                    sums_of(
                        x, grad_y, other, partials, row, left, right, columns, span, constants, slope, z_of, gradient,
                        energy,
                    )  # fmt: skip
            if phases & MERGE:
                gather(job, partials, start, stop)
            for channel in range(start, stop):
                if phases & MERGE:
                    merge(job, partials, channel, constants)
                if phases & SLOPES:
                    slopes(job, channel, gamma, constants)
            if phases & APPLY:
                for nth in range(first, last):
                    row = first + last - 1 - nth if phases & REDUCE else nth
                    for at in range(left, right, room):
                        upto, here = min(right, at + room), row * columns + at
                        before = here if stream else 0
                        dx_of(
                            x, grad_y, other, to_dx, to_dresidual, before, row, at, upto, columns, span, constants,
                            slope, z_of, gradient, handed,
                        )  # fmt: skip
                        if stream:
                            _flush(dx, here, here + upto - at, line)
                            if handed:
                                _flush(dresidual, here, here + upto - at, more)

    return work
