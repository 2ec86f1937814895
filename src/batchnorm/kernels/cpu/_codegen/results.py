"""The second pass over a tile: y from x in forward, dx and dresidual from x and grad_y in backward.

Results go straight from registers to memory, in whole cache lines past the caches where the job says so (`stream`).
Then the part of a slice before the first whole line, and the rest after the last, are stored the usual way.
"""

from __future__ import annotations

from collections.abc import Callable

from batchnorm.kernels.cpu._codegen.activations import Activation
from batchnorm.kernels.cpu._codegen.builder import Array, Code
from batchnorm.kernels.cpu._codegen.reductions import (
    DX_SHIFT,
    DX_SLOPE,
    MEAN,
    SCALE,
    SHIFT,
    GradientOf,
    Place,
    Tensors,
    column_blocks,
)
from batchnorm.kernels.cpu._codegen.values import Value

Compute = Callable[[Place, list[Value]], list[Value]]
"""(place, constants) → the results at this place, one for each target."""


def y_of(t: Tensors, activation: Activation, z_of: Callable[..., Value]) -> tuple[tuple[int, ...], Compute]:
    """The constants and the computation of y."""

    def compute(place: Place, constants: list[Value]) -> list[Value]:
        mean, scale, shift = constants
        z = z_of(t.x.load(place.offset, t.lanes, place.mask) - mean, place, scale, shift)
        if t.signs is not None:
            t.signs.store_mask(place.offset, (z <= 0.0).negated())
        return [activation(z, t.slope)]

    return (MEAN, SCALE, SHIFT), compute


def dx_of(t: Tensors, gradient_of: GradientOf) -> tuple[tuple[int, ...], Compute]:
    """The constants and the computation of dx and, if it has a target, of dresidual."""

    def compute(place: Place, constants: list[Value]) -> list[Value]:
        mean, scale, shift, dx_slope, dx_shift = constants
        g, xmu = gradient_of(place, mean, scale, shift)
        dx = scale.fma(g, dx_slope.fma(xmu, dx_shift))
        return [dx] if t.dresidual is None else [dx, g]

    return (MEAN, SCALE, SHIFT, DX_SLOPE, DX_SHIFT), compute


def _store_all(targets: list[Array], place: Place, values: list[Value], *, past_caches: bool) -> None:
    for target, value in zip(targets, values, strict=True):
        target.store(place.offset, value, place.mask, past_caches=past_caches and place.mask is None)


def store_slices(
    code: Code, t: Tensors, first_row: Value, end_row: Value, first_channel: Value, end_channel: Value,
    targets: list[Array], numbers: tuple[int, ...], compute: Compute, ahead: Value, *, backwards: Value,
) -> None:  # fmt: skip
    """Store the results of some channels' slices in the order of memory.

    `backwards`: the last row first, which the caches still have. Meanwhile inputs are loaded that are `ahead` elements
    ahead: those of the next tile, or just the next ones.
    """
    stream = code.field("stream").differs(0)
    with code.loop(first_row, end_row) as nth, code.loop(first_channel, end_channel) as channel:
        row = backwards.select(first_row + end_row - 1 - nth, nth)
        constants = [t.constants.load(t.cells * k + channel).splat(t.lanes) for k in numbers]
        first = row * t.columns + channel * t.span
        end = first + t.span

        def store(past_caches: bool) -> Callable[[Value, int, Value | None], None]:
            def vector(offset: Value, _: int, mask: Value | None) -> None:
                place = Place(offset, row, mask)
                t.prefetch(offset + ahead, 0)
                _store_all(targets, place, compute(place, constants), past_caches=past_caches)

            return vector

        with code.when_else(stream) as (then, otherwise):
            with then:
                vector = targets[0].size * t.lanes
                unaligned = ((0 - targets[0].address(first)) & (vector - 1)) // targets[0].size
                start = (first + unaligned).min(end)
                with code.when(first < start):
                    store(False)(first, 0, code.first_lanes(start - first, t.lanes))
                whole = start + (end - start) // t.lanes * t.lanes
                code.vectors(start, whole, t.lanes, store(True), 2)
                _rest(code, t, first, whole, end, store(False))
            with otherwise:
                whole = first + t.span // t.lanes * t.lanes
                code.vectors(first, whole, t.lanes, store(False), 2)
                _rest(code, t, first, whole, end, store(False))


def _rest(
    code: Code, t: Tensors, first: Value, rest: Value, end: Value, store: Callable[[Value, int, Value | None], None]
) -> None:
    """Store the last values of a slice that begins at `first`, from `rest` on: as one vector that ends with the slice.

    It stores some values again, which is faster than a mask; shorter slices need one.
    """
    with code.when(rest < end), code.when_else(end - first < t.lanes) as (short, long):
        with short:
            store(rest, 0, code.first_lanes(end - rest, t.lanes))
        with long:
            store(end - t.lanes, 0, None)


def store_columns(
    code: Code, t: Tensors, first_row: Value, end_row: Value, first: Value, end: Value, width: int,
    targets: list[Array], numbers: tuple[int, ...], compute: Compute, *, backwards: Value,
) -> None:  # fmt: skip
    """Store the results of some columns, group of rows by group of rows; rows of whole cache lines past the caches."""
    block_rows, ahead = code.field("block_rows"), code.field("ahead")
    groups = (end_row - first_row + block_rows - 1) // block_rows

    def all_blocks(row: Value, last: Value, past_caches: bool) -> None:
        def block(column: Value, masks: list[Value | None]) -> None:
            places = [(column + nth * t.lanes, mask) for nth, mask in enumerate(masks)]
            constants = [
                [t.constants.load(t.cells * k + place, t.lanes, mask) for k in numbers] for place, mask in places
            ]
            with code.loop(row, last) as at:
                for (place, mask), known in zip(places, constants, strict=True):
                    here = Place(at * t.columns + place, at, mask)
                    t.prefetch_all(here.offset + ahead)
                    _store_all(targets, here, compute(here, known), past_caches=past_caches)

        column_blocks(code, first, end, t.lanes, width, block)

    with code.loop(0, groups) as nth:
        group = backwards.select(groups - 1 - nth, nth)
        row = first_row + group * block_rows
        last = (row + block_rows).min(end_row)
        with code.when_else(code.field("stream").differs(0)) as (then, otherwise):
            with then:
                all_blocks(row, last, True)
            with otherwise:
                all_blocks(row, last, False)
