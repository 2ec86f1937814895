"""The sums of a tile: moments of x in forward; Σg, Σg·xmu and, where asked for, Σg² in backward.

Moments are float64, about an origin, the mean of a cell's first values in the part, so that no digits are lost however
large the mean is. In backward GROUP vectors are added in the type that is computed in, and the result is added to sums
in float64. The order of all sums depends on shape, layout, type and threads only.

A part is a range of rows that has partial sums: array k of part p is at (3p + k)·cells. For each cell it has the mean
and the sum of squared deviations, or the three sums of backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from batchnorm.kernels.cpu._codegen.builder import Array, Code, Variable
from batchnorm.kernels.cpu._codegen.values import F64, Value
from batchnorm.kernels.cpu.plan import GROUP

_FIRST_ROWS = 4
AHEAD_IN_SLICES = 512
"""How many bytes ahead inputs are prefetched: the processor's own prefetchers begin anew in every slice and page."""

MEAN, SCALE, SHIFT, DX_SLOPE, DX_SHIFT = range(5)
"""The constants of a cell: z = (x - MEAN)·SCALE + SHIFT, dx = SCALE·g + (x - MEAN)·DX_SLOPE + DX_SHIFT."""


class Tensors(NamedTuple):
    """What the loops read, write and compute with; a tensor that a variant does not use is None."""

    x: Array
    y: Array | None
    other: Array | None
    grad_y: Array | None
    dx: Array | None
    dresidual: Array | None
    signs: Array | None
    partials: Array
    constants: Array
    scratch: Array
    columns: Value
    span: Value
    cells: Value
    slope: Value
    scalar: Any
    lanes: int

    def prefetch(self, offset: Value, ahead: int) -> None:
        """Begin to load x and grad_y, `ahead` bytes behind an offset."""
        for array in (self.x, self.grad_y):
            if array is not None:
                array.prefetch(offset + ahead // array.size)

    def prefetch_all(self, offset: Value) -> None:
        """Begin to load all inputs at an offset."""
        self.prefetch(offset, 0)
        if self.other is not None:
            self.other.prefetch(offset)

    def partial(self, part: Value, k: int) -> Array:
        """Array k of a part."""
        return self.partials.advance((part * 3 + k) * self.cells)


class Place(NamedTuple):
    """Where a vector is: its offset in the tensors, its row, and the mask of its lanes."""

    offset: Value
    row: Value
    mask: Value | None


GradientOf = Callable[[Place, Value, Value, Value], tuple[Value, Value]]
"""(place, mean, scale, shift) → (g, xmu)."""

Terms = Callable[[Place, Any], list[tuple[Value, Value | None]]]
"""(place, constants) → for each sum a vector to add, or two whose product is added."""


def _group_sums(terms: list[list[tuple[Value, Value | None]]]) -> list[Value]:
    """The sums over a group's vectors, in float64."""
    sums = []
    for column in zip(*terms, strict=True):
        factors = list(column)
        if factors[0][1] is None:
            values = [value for value, _ in factors]
            pairs = [one + other for one, other in zip(values[::2], values[1::2], strict=False)] or values
            total = pairs[0] if len(pairs) == 1 else pairs[0] + pairs[1]
        else:
            total = None
            for value, factor in factors:
                assert factor is not None
                total = value * factor if total is None else value.fma(factor, total)
        assert total is not None
        sums.append(total.to(F64))
    return sums


def _add(totals: list[Variable], sums: list[Value]) -> None:
    for total, one in zip(totals, sums, strict=True):
        total.set(total.get() + one)


# --- slices -----------------------------------------------------------------------------------------------------------


def _slice_sums(
    code: Code, t: Tensors, first_row: Value, end_row: Value, channel: Value, count: int, constants: Any, terms: Terms
) -> list[Value]:  # fmt: skip
    """`count` sums over one channel's slices in some rows."""
    totals = [code.variable(code.number(F64, 0.0, t.lanes)) for _ in range(count)]
    step = GROUP * t.lanes
    with code.loop(first_row, end_row) as row:
        first = row * t.columns + channel * t.span
        end = first + t.span
        whole = first + t.span // step * step
        with code.loop(first, whole, step) as offset:
            for nth in range(GROUP):
                t.prefetch(offset + nth * t.lanes, AHEAD_IN_SLICES)
            places = [Place(offset + nth * t.lanes, row, None) for nth in range(GROUP)]
            _add(totals, _group_sums([terms(place, constants) for place in places]))
        with code.when(whole < end):
            masks = [code.first_lanes(end - whole - nth * t.lanes, t.lanes) for nth in range(GROUP)]
            places = [Place(whole + nth * t.lanes, row, mask) for nth, mask in enumerate(masks)]
            _add(totals, _group_sums([terms(place, constants) for place in places]))
            t.prefetch(whole, AHEAD_IN_SLICES)
    return [total.get().total() for total in totals]


def _deviations(t: Tensors) -> Terms:
    """x - origin, and its square, in float64: exact for narrower x."""

    def terms(place: Place, origin: Value) -> list[tuple[Value, Value | None]]:
        delta = t.x.load(place.offset, t.lanes, place.mask).to(F64) - origin
        delta = delta if place.mask is None else place.mask.select(delta, 0.0)
        return [(delta, None), (delta, delta)]

    return terms


def _moments(origin: Value, total: Value, squares: Value, inverse_count: Value) -> tuple[Value, Value]:
    """Mean and m2 from the sums of x - origin and of its square."""
    shift = total * inverse_count
    return origin + shift, (squares - total * shift).at_least(0.0)


def slice_moments(code: Code, t: Tensors, first_row: Value, end_row: Value, part: Value, channel: Value) -> None:
    """Mean and m2 of one channel over the rows of a part."""
    few = t.span.min(t.lanes)
    head = t.x.load(first_row * t.columns + channel * t.span, t.lanes, code.first_lanes(few, t.lanes))
    origin = head.to(F64).total() / few.to(F64)
    sums = _slice_sums(code, t, first_row, end_row, channel, 2, origin.splat(t.lanes), _deviations(t))
    for k, one in enumerate(_moments(origin, *sums, 1.0 / ((end_row - first_row) * t.span).to(F64))):
        t.partial(part, k).store(channel, one)


def _gradient_terms(gradient_of: GradientOf, energy: bool, keep: Callable[[Place, Value], None] | None) -> Terms:
    """g, g·xmu and g·g. `keep` is called with each g."""

    def terms(place: Place, constants: Any) -> list[tuple[Value, Value | None]]:
        g, xmu = gradient_of(place, *constants)
        if keep is not None:
            keep(place, g)
        if place.mask is not None:
            g, xmu = place.mask.select(g, 0.0), place.mask.select(xmu, 0.0)
        return [(g, None), (g, xmu), (g, g)][: 3 if energy else 2]

    return terms


def slice_sums(
    code: Code, t: Tensors, first_row: Value, end_row: Value, part: Value, channel: Value, gradient_of: GradientOf,
    energy: bool, keep: Callable[[Place, Value], None] | None = None,
) -> None:  # fmt: skip
    """Σg, Σg·xmu and Σg² of one channel over the rows of a part. `keep` is called with each g."""
    constants = [t.constants.load(t.cells * k + channel).splat(t.lanes) for k in (MEAN, SCALE, SHIFT)]
    terms = _gradient_terms(gradient_of, energy, keep)
    sums = _slice_sums(code, t, first_row, end_row, channel, 3 if energy else 2, constants, terms)
    for k, one in enumerate(sums):
        t.partial(part, k).store(channel, one)


# --- columns ----------------------------------------------------------------------------------------------------------


def column_blocks(
    code: Code, first: Value, end: Value, lanes: int, width: int, body: Callable[[Value, list[Value | None]], None]
) -> None:
    """Call body(column, masks) for blocks of `width` vectors, of two, then for single ones, the last one masked."""
    whole = end - first
    for group in sorted({width, min(width, 2), 1}, reverse=True):
        stop = first + whole // (group * lanes) * (group * lanes)
        with code.loop(first, stop, group * lanes) as column:
            body(column, [None] * group)
        first, whole = stop, end - stop
    with code.when(first < end):
        body(first, [code.first_lanes(whole, lanes)])


def _column_sums(
    code: Code, t: Tensors, first_row: Value, end_row: Value, part: Value, first: Value, end: Value, width: int,
    count: int, constants: Callable[[Value, Value | None], Any], terms: Terms,
) -> None:  # fmt: skip
    """Add `count` sums of each column in the part's arrays, which are cleared first.

    Rows are read in groups that are neighbors in memory, columns in blocks whose sums stay in registers over a group.
    """
    block_rows, ahead = code.field("block_rows"), code.field("ahead")
    arrays = [t.partial(part, k) for k in range(count)]
    fetch = t.x.prefetch if t.grad_y is None else t.prefetch_all

    def clear(column: Value, _: int, mask: Value | None) -> None:
        for array in arrays:
            array.store(column, code.number(F64, 0.0, t.lanes), mask)

    code.vectors(first, end, t.lanes, clear)
    with code.loop(first_row, end_row, block_rows) as row:
        last = (row + block_rows).min(end_row)
        whole = row + (last - row) // GROUP * GROUP

        def block(column: Value, masks: list[Value | None]) -> None:
            places = [(column + nth * t.lanes, mask) for nth, mask in enumerate(masks)]
            totals = [[code.variable(array.load(place, t.lanes, mask)) for array in arrays] for place, mask in places]
            given = [constants(place, mask) for place, mask in places]

            def add(at: Value, rows: int) -> None:
                for (place, mask), mine, known in zip(places, totals, given, strict=True):
                    found = []
                    for nth in range(rows):
                        here = Place((at + nth) * t.columns + place, at + nth, mask)
                        fetch(here.offset + ahead)
                        found.append(terms(here, known))
                    _add(mine, _group_sums(found))

            with code.loop(row, whole, GROUP) as at:
                add(at, GROUP)
            with code.loop(whole, last) as at:
                add(at, 1)
            for (place, mask), mine in zip(places, totals, strict=True):
                for array, total in zip(arrays, mine, strict=True):
                    array.store(place, total.get(), mask)

        column_blocks(code, first, end, t.lanes, width, block)


def column_moments(
    code: Code, t: Tensors, first_row: Value, end_row: Value, part: Value, first: Value, end: Value, width: int
) -> None:
    """Mean and m2 of the columns over the rows of a part; its third array holds the origins."""
    means, m2s, origins = (t.partial(part, k) for k in range(3))
    few = (end_row - first_row).min(_FIRST_ROWS)

    def begin(column: Value, _: int, mask: Value | None) -> None:
        total = code.variable(code.number(F64, 0.0, t.lanes))
        with code.loop(first_row, first_row + few) as row:
            total.set(total.get() + t.x.load(row * t.columns + column, t.lanes, mask).to(F64))
        origins.store(column, total.get() * (1.0 / few.to(F64)).splat(t.lanes), mask)

    def origin_of(column: Value, mask: Value | None) -> Value:
        return origins.load(column, t.lanes, mask)

    code.vectors(first, end, t.lanes, begin)
    _column_sums(code, t, first_row, end_row, part, first, end, width, 2, origin_of, _deviations(t))

    def finish(column: Value, _: int, mask: Value | None) -> None:
        sums = (array.load(column, t.lanes, mask) for array in (means, m2s))
        inverse_count = (1.0 / (end_row - first_row).to(F64)).splat(t.lanes)
        for array, one in zip((means, m2s), _moments(origin_of(column, mask), *sums, inverse_count), strict=True):
            array.store(column, one, mask)

    code.vectors(first, end, t.lanes, finish)


def column_sums(
    code: Code, t: Tensors, first_row: Value, end_row: Value, part: Value, first: Value, end: Value, width: int,
    gradient_of: GradientOf, energy: bool, keep: Callable[[Place, Value], None] | None = None,
) -> None:  # fmt: skip
    """Σg, Σg·xmu and Σg² of the columns over the rows of a part. `keep` is called with each g."""

    def constants(column: Value, mask: Value | None) -> list[Value]:
        return [t.constants.load(t.cells * k + column, t.lanes, mask) for k in (MEAN, SCALE, SHIFT)]

    terms = _gradient_terms(gradient_of, energy, keep)
    _column_sums(code, t, first_row, end_row, part, first, end, width, 3 if energy else 2, constants, terms)
