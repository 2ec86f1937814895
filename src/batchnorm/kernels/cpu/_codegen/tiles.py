"""The compiled work of a job, tile by tile, in phases:

    forward     REDUCE (moments) | MERGE (mean, m2, rstd) | PREPARE (constants) | APPLY (y)
    backward    PREPARE (constants) | REDUCE (Σg, Σg·xmu, Σg²) | MERGE (dbeta, dgamma) | SLOPES (constants) | APPLY (dx)

A thread draws the number of a tile and does its work; no result depends on the thread, so any number of threads returns
the same bits. With all phases in one call, a tile holds all rows of its channels, and is read from main memory once.
Otherwise REDUCE and APPLY are separate calls over tiles of rows, and the phases between them run for all channels.

Results go run by run into a buffer in the type that is computed in. From there they are rounded and written to memory
in whole cache lines, past the caches where the job says so (`stream`).
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
    advance,
    array,
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
from batchnorm.kernels.cpu.plan import APPLY, FIELD, MERGE, PREPARE, REDUCE, SLOPES

_wide = types.float64
# The types of computed values and of partial sums: float32 has many more digits than bfloat16.
_COMPUTED = {FLOAT32: FLOAT32, BFLOAT16: FLOAT32, FLOAT64: FLOAT64}
_SUMMED = {FLOAT32: FLOAT64, BFLOAT16: FLOAT32, FLOAT64: FLOAT64}
_LINE = 1024
_ORIGIN_VALUES = 16


@inlined
def _flush(job, target, first, end, line):
    """target[first … end - 1] = line[0 …], in whole cache lines, which bypass the caches if the job says so."""
    width, stream = line_length(target), integer(job, FIELD.stream)
    offset = first
    while offset < end and address(target, offset) & 63:
        store(target, offset, load(line, offset - first))
        offset += 1
    while offset + width <= end:
        if stream:
            store_line(target, offset, line, offset - first, True)
        else:
            store_line(target, offset, line, offset - first, False)
        offset += width
    while offset < end:
        store(target, offset, load(line, offset - first))
        offset += 1


@inlined
def _next_tile(job):
    """First and end row, first and end channel of the next tile; all 0 after the last."""
    tile, tiles = draw(job, FIELD.ticket), integer(job, FIELD.tiles)
    if tile >= tiles:
        return 0, 0, 0, 0
    if integer(job, FIELD.reverse) != 0:
        tile = tiles - 1 - tile
    rows, channels = integer(job, FIELD.rows), integer(job, FIELD.channels)
    tile_rows, tile_channels = integer(job, FIELD.tile_rows), integer(job, FIELD.tile_channels)
    across = (channels + tile_channels - 1) // tile_channels
    first_row, first_channel = tile // across * tile_rows, tile % across * tile_channels
    return first_row, min(first_row + tile_rows, rows), first_channel, min(first_channel + tile_channels, channels)


@inlined
def _begin_moments(x, offset, span, partials, cells, first_cell, end_cell):
    """Store the origin of each cell's moments: the mean of its first values, so that one outlier does no harm."""
    count = min(span, _ORIGIN_VALUES)
    for cell in range(first_cell, end_cell):
        total = 0.0
        for i in range(count):
            total += _wide(load(x, offset + cell * span + i))
        store(partials, 2 * cells + cell, _wide(like(load(x, offset), total / count)))


@inlined
def _finish_moments(partials, cells, first_cell, end_cell, count):
    """Turn sums of (x - origin) and of its squares, over `count` values, into mean and m2."""
    for cell in range(first_cell, end_cell):
        total, m2 = _wide(load(partials, cell)), _wide(load(partials, cells + cell))
        delta = total / count
        m2 -= total * delta
        store(partials, cell, _wide(load(partials, 2 * cells + cell)) + delta)
        store(partials, cells + cell, 0.0 if m2 < 0.0 else m2)


def forward(kind: int, act: str | None, source: str, by_columns: bool) -> Any:
    """The forward to compile, for elements of `kind` and one form of loops; z is of "x" or with the "residual"."""
    computed, summed = _COMPUTED[kind], _SUMMED[kind]
    loops = COLUMNS if by_columns else SLICES
    moments_of, y_of, z_of, value = loops.moments, loops.y, Z[source], VALUES[act]

    def work(job):
        phases, line = integer(job, FIELD.phases), scratch(computed, _LINE)
        x, residual, y = array(job, FIELD.x, kind), array(job, FIELD.other, kind), array(job, FIELD.y, kind)
        gamma, beta = array(job, FIELD.gamma, computed), array(job, FIELD.beta, computed)
        constants, running_mean = array(job, FIELD.constants, computed), array(job, FIELD.running_mean, computed)
        running_var = array(job, FIELD.running_var, computed)
        span, fold = integer(job, FIELD.span), integer(job, FIELD.fold)
        slope, columns = like(load(constants, 0), number(job, FIELD.slope)), integer(job, FIELD.channels) * span * fold
        cell_span, weight = integer(job, FIELD.cell_span), integer(job, FIELD.weight)
        cells = integer(job, FIELD.channels) * cell_span * fold
        while True:
            first_row, end_row, first_channel, end_channel = _next_tile(job)
            if end_row == 0:
                break
            first_column, end_column = first_channel * span, end_channel * span * fold
            first_cell, end_cell = first_channel * cell_span, end_channel * cell_span * fold
            part = first_row // integer(job, FIELD.part_rows)
            partials = advance(array(job, FIELD.partials, summed), part * 3 * cells)
            if phases & REDUCE:
                _begin_moments(x, first_row * columns, weight, partials, cells, first_cell, end_cell)
                for row in range(first_row, end_row):
                    moments_of(x, partials, row, first_column, end_column, columns, span)
                _finish_moments(partials, cells, first_cell, end_cell, _wide((end_row - first_row) * weight))
            if phases & MERGE:
                gather_moments(job, partials, first_channel, end_channel)
            for channel in range(first_channel, end_channel):
                if phases & MERGE:
                    merge_moments(job, partials, channel, running_mean, running_var)
                if phases & PREPARE:
                    prepare(job, channel, gamma, beta, constants)
            if phases & APPLY:
                for nth in range(first_row, end_row):
                    row = first_row + end_row - 1 - nth if phases & REDUCE else nth  # cached rows, read last, first
                    for column in range(first_column, end_column, _LINE):
                        end, offset = min(end_column, column + _LINE), row * columns + column
                        y_of(x, residual, line, row, column, end, columns, span, constants, slope, z_of, value)
                        _flush(job, y, offset, offset + end - column, line)

    return work


def backward(kind: int, act: str | None, source: str, by_columns: bool, energy: bool) -> Any:
    """The backward to compile: act' from z of "x", or from "y", and then there is a dresidual, too.

    `energy`: Σg² is wanted.
    """
    with_dresidual = source == "y"
    computed, summed = _COMPUTED[kind], _SUMMED[kind]
    loops = COLUMNS if by_columns else SLICES
    sums_of, dx_of, z_of = loops.sums, loops.dx, Z[source]
    gradient = GRADIENTS_BY_Y[act] if source == "y" else GRADIENTS[act]

    def work(job):
        phases, line = integer(job, FIELD.phases), scratch(computed, _LINE)
        line_dresidual = scratch(computed, _LINE)
        x, grad_y, other = array(job, FIELD.x, kind), array(job, FIELD.grad_y, kind), array(job, FIELD.other, kind)
        dx, dresidual = array(job, FIELD.dx, kind), array(job, FIELD.dresidual, kind)
        gamma, beta = array(job, FIELD.gamma, computed), array(job, FIELD.beta, computed)
        constants, span = array(job, FIELD.constants, computed), integer(job, FIELD.span)
        fold, slope = integer(job, FIELD.fold), like(load(constants, 0), number(job, FIELD.slope))
        columns = integer(job, FIELD.channels) * span * fold
        cells = integer(job, FIELD.channels) * integer(job, FIELD.cell_span) * fold
        while True:
            first_row, end_row, first_channel, end_channel = _next_tile(job)
            if end_row == 0:
                break
            first_column, end_column = first_channel * span, end_channel * span * fold
            part = first_row // integer(job, FIELD.part_rows)
            partials = advance(array(job, FIELD.partials, summed), part * 3 * cells)
            if phases & PREPARE:
                for channel in range(first_channel, end_channel):
                    prepare(job, channel, gamma, beta, constants)
            if phases & REDUCE:
                for row in range(first_row, end_row):
                    sums_of(
                        x, grad_y, other, partials, row, first_column, end_column, columns, span, constants, slope,
                        z_of, gradient, energy,
                    )  # fmt: skip
            if phases & MERGE:
                gather_sums(job, partials, first_channel, end_channel)
            for channel in range(first_channel, end_channel):
                if phases & MERGE:
                    merge_sums(job, partials, channel, constants)
                if phases & SLOPES:
                    slopes(job, channel, gamma, constants)
            if phases & APPLY:
                for nth in range(first_row, end_row):
                    row = first_row + end_row - 1 - nth if phases & REDUCE else nth
                    for column in range(first_column, end_column, _LINE):
                        end, offset = min(end_column, column + _LINE), row * columns + column
                        dx_of(
                            x, grad_y, other, line, line_dresidual, row, column, end, columns, span, constants, slope,
                            z_of, gradient, with_dresidual,
                        )  # fmt: skip
                        _flush(job, dx, offset, offset + end - column, line)
                        if with_dresidual:
                            _flush(job, dresidual, offset, offset + end - column, line_dresidual)

    return work
