"""The compiled work of a job: one parallel region, in which all threads take tiles step by step.

    forward     REDUCE (moments) | MERGE (mean, m2, rstd) | PREPARE (constants) | APPLY (y)
    backward    PREPARE (constants) | REDUCE (Σg, Σg·xmu, Σg²) | MERGE (dbeta, dgamma) | SLOPES (constants) | APPLY (dx)

A step has some of these phases and a tiling. With all phases in one step, a tile holds all rows of its channels, and
is read from main memory once. Otherwise REDUCE and APPLY are steps over tiles of rows, with steps per channel between
them; a thread that finds no more tiles waits until all tiles of the step are done. A thread draws the number of its
next tile, and no result depends on the thread that computed it: any number of threads returns the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding

from batchnorm.kernels.cpu._codegen import reductions, results
from batchnorm.kernels.cpu._codegen.activations import GRADIENTS, GRADIENTS_BY_Y, VALUES
from batchnorm.kernels.cpu._codegen.builder import LINE, SIZES, Code, computed, lanes_of
from batchnorm.kernels.cpu._codegen.channels import Channels
from batchnorm.kernels.cpu._codegen.reductions import AHEAD_IN_SLICES, Place, Tensors
from batchnorm.kernels.cpu._codegen.values import Value
from batchnorm.kernels.cpu.plan import (
    APPLY,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    KEPT,
    MERGE,
    PREPARE,
    REDUCE,
    SLOPES,
    Variant,
)  # fmt: skip

_SPINS = 1 << 12
_TICKET_STEP = 8  # integers: a cache line for each counter


def vector_kind(kind: int) -> int:
    """The kind of gamma, beta, running statistics and constants: the type that is computed in."""
    return FLOAT32 if kind in (BFLOAT16, FLOAT16) else kind


def _width(backward: bool) -> int:
    """How many vectors of columns keep their sums and constants in registers, of which backward needs more."""
    if not binding.get_host_cpu_features().get("avx512f"):
        return 1
    return 2 if backward else 4


class _Job:
    """What the code of forward and of backward share: the tensors, and the loops over steps and tiles."""

    def __init__(self, variant: Variant) -> None:
        code = self.code = Code()
        self.variant, kind = variant, variant.kind
        self.by_columns, scalar = variant.by_columns, computed(kind)
        lanes, wide = lanes_of(scalar), vector_kind(kind)
        span, fold = code.field("span"), code.field("fold")
        columns = code.field("channels") * span * fold
        self.workers = code.field("workers")
        self.worker = code.call_number(code.field("thread_number")) % self.workers
        self.tickets = code.array("tickets", FLOAT64)
        scratch = code.array("scratch", wide).advance(self.worker * code.field("scratch_size"))
        used = {"x", "grad_y", "dx"} if variant.backward else {"x", "y"}
        after_addition = variant.source != "x"
        if after_addition and not (variant.backward and variant.source == "signs"):
            used.add("other")
        if after_addition and variant.backward:
            used.add("dresidual")
        if variant.source == "signs":
            used.add("signs")
        arrays = {name: code.array(name, kind) if name in used else None for name in Tensors._fields[:7]}
        cells = code.field("channels") * code.field("cell_span") * fold
        slope = code.real("slope").to(scalar).splat(lanes)
        self.t = Tensors(
            **arrays,
            partials=code.array("partials", FLOAT64),
            constants=code.array("constants", wide),
            scratch=scratch,
            columns=columns,
            span=span,
            cells=cells,
            slope=slope,
            scalar=scalar,
            lanes=lanes,
        )
        self.channels = Channels(code, self.t, wide)

    def emit(self, phases: dict[int, Callable[[tuple[Value, Value, Value, Value]], None]]) -> str:
        """The assembly: for each group of channels, step and tile the phases that the step has, in this order.

        A thread that is done with a group begins the next: groups share nothing.
        """
        code = self.code
        steps, each, channels = code.field("steps"), code.field("group_channels"), code.field("channels")
        with code.loop(0, (channels + each - 1) // each) as group:
            self.group_channel = group * each
            self.group_channels = each.min(channels - self.group_channel)
            with code.loop(0, steps) as step:
                wanted = code.field("phases", step)
                self.combined = (wanted & REDUCE).differs(0) & (wanted & APPLY).differs(0)
                # The next tile is drawn early: the results of one are stored while the next is being loaded.
                draw = self._tiles_of(group * steps + step, step)
                following = code.variable(draw())
                with code.forever() as leave:
                    drawn = following.get()
                    leave(drawn < 0)
                    following.set(draw())
                    bounds = self._bounds(step, drawn)
                    is_ahead = (following.get() < 0).negated() & self.combined & code.field("prefetch").differs(0)
                    next_channel = following.get() * code.field("tile_channels", step)
                    near = code.integer(AHEAD_IN_SLICES // SIZES[self.variant.kind])
                    self.ahead = is_ahead.select((next_channel - bounds[2]) * self.t.span, near)
                    for phase, run in phases.items():
                        with code.when((wanted & phase).differs(0)):
                            run(bounds)
                    # Another thread may now read what this one stored, past the caches too: a locked increment drains
                    # them.
                    code.count_up("done", step)
                with code.when(step + 1 < steps):
                    # Steps that are waited for are complete before a thread begins the next group, so counts add up.
                    self._wait(step, group * self._tiles(step, each) + self._tiles(step, self.group_channels))
        return code.finish()

    def _tiles(self, step: Value, channels: Value) -> Value:
        """The number of tiles of a step over this many channels."""
        code = self.code
        tile_rows, tile_channels = code.field("tile_rows", step), code.field("tile_channels", step)
        down = (code.field("rows") + tile_rows - 1) // tile_rows
        return down * ((channels + tile_channels - 1) // tile_channels)

    def _tiles_of(self, turn: Value, step: Value) -> Callable[[], Value]:
        """A function that draws this thread's next tile of a group's step; -1 after the last.

        Each thread begins with a range of tiles that are neighbors in memory, the same in every step, so that it finds
        them in its cache. Then it helps the others.
        """
        code, workers = self.code, self.workers
        tiles = self._tiles(step, self.group_channels)
        reverse = code.field("reverse", step).differs(0)
        whose, helped = code.variable(self.worker), code.variable(code.integer(0))

        def draw() -> Value:
            drawn = code.variable(code.integer(-1))
            with code.forever() as leave:
                leave((helped.get() < workers).negated())
                owner = whose.get()
                first, end = owner * tiles // workers, (owner + 1) * tiles // workers
                nth = self.tickets.count_up((turn * workers + owner) * _TICKET_STEP)
                is_left = nth < end - first
                drawn.set(is_left.select(reverse.select(end - 1 - nth, first + nth), -1))
                leave(is_left)
                whose.set((owner + 1).equals(workers).select(0, owner + 1))
                helped.set(helped.get() + 1)
            return drawn.get()

        return draw

    def _bounds(self, step: Value, tile: Value) -> tuple[Value, Value, Value, Value]:
        """First and end row, first and end channel of a tile."""
        code = self.code
        tile_rows, tile_channels = code.field("tile_rows", step), code.field("tile_channels", step)
        rows, start, channels = code.field("rows"), self.group_channel, self.group_channels
        across = (channels + tile_channels - 1) // tile_channels
        row, channel = tile // across * tile_rows, start + tile % across * tile_channels
        return row, (row + tile_rows).min(rows), channel, (channel + tile_channels).min(start + channels)

    def _wait(self, step: Value, tiles: Value) -> None:
        """Wait until this many tiles of the step are done; now and then give up the processor to other threads."""
        code = self.code
        spins = code.variable(code.integer(0))
        with code.forever() as leave:
            leave((code.counter("done", step) < tiles).negated())
            spins.set(spins.get() + 1)
            code.pause()
            with code.when((spins.get() % _SPINS).equals(0) & code.field("yield_thread").differs(0)):
                code.call(code.field("yield_thread"))

    def each_channel(self, bounds: tuple[Value, ...], body: Callable[[Value], None]) -> None:
        with self.code.loop(bounds[2], bounds[3]) as channel:
            body(channel)

    def fetch(self, bounds: tuple[Value, ...]) -> None:
        """Begin to load a tile in the order of memory, unless it is applied at once: loops run channel by channel."""
        code, t = self.code, self.t
        with code.when(self.combined.negated()), code.loop(bounds[0], bounds[1]) as row:
            first, end = (row * t.columns + channel * t.span for channel in bounds[2:])
            with code.loop(first, end, LINE // SIZES[self.variant.kind]) as offset:
                t.prefetch(offset, 0)

    def each_part(self, bounds: tuple[Value, ...], body: Callable[[Value, Value, Value], None]) -> None:
        """Call body(part, first row, end row) for the parts of a tile."""
        part_rows = self.code.field("part_rows")
        with self.code.loop(bounds[0], bounds[1], part_rows) as row:
            body(row // part_rows, row, (row + part_rows).min(bounds[1]))

    def column_range(self, bounds: tuple[Value, ...]) -> tuple[Value, Value]:
        """The columns of a tile; rows that are folded have tiles of all channels."""
        return bounds[2] * self.t.span, bounds[3] * self.t.span * self.code.field("fold")

    def apply(self, bounds: tuple[Value, ...], targets: list[Any], numbers: Any, compute: Any) -> None:
        code, t = self.code, self.t
        if self.by_columns:
            width = _width(self.variant.backward)
            results.store_columns(
                code, t, *bounds[:2], *self.column_range(bounds), width, targets, numbers, compute,
                backwards=self.combined,
            )  # fmt: skip
        else:
            results.store_slices(code, t, *bounds, targets, numbers, compute, self.ahead, backwards=self.combined)


def assembly(variant: Variant) -> str:
    """The LLVM assembly of a variant."""
    return _backward(variant) if variant.backward else _forward(variant)


def _forward(variant: Variant) -> str:
    """z is of "x", or with the "residual"; with "signs" it also stores where y is positive."""
    job = _Job(variant)
    code, t, channels = job.code, job.t, job.channels

    def z_of(xmu: Value, place: Place, scale: Value, shift: Value) -> Value:
        z = xmu.fma(scale, shift)
        return z if t.other is None else z + t.other.load(place.offset, t.lanes, place.mask)

    def reduce(bounds: tuple[Value, Value, Value, Value]) -> None:
        def part(index: Value, first_row: Value, end_row: Value) -> None:
            if job.by_columns:
                reductions.column_moments(
                    code, t, first_row, end_row, index, *job.column_range(bounds), _width(variant.backward)
                )
            else:
                job.each_channel(
                    bounds, lambda channel: reductions.slice_moments(code, t, first_row, end_row, index, channel)
                )

        if not job.by_columns:
            job.fetch(bounds)
        job.each_part(bounds, part)

    def merge(bounds: tuple[Value, Value, Value, Value]) -> None:
        channels.gather_moments(*bounds[2:])
        channels.each(*bounds[2:], channels.finish_moments)

    numbers, compute = results.y_of(t, VALUES[variant.act], z_of)
    return job.emit(
        {
            REDUCE: reduce,
            MERGE: merge,
            PREPARE: lambda bounds: channels.each(*bounds[2:], channels.prepare),
            APPLY: lambda bounds: job.apply(bounds, [t.y], numbers, compute),
        }
    )


def _backward(variant: Variant) -> str:
    """act' is computed from z of "x", or from "y" or its "signs", and then there is a dresidual, too."""
    job = _Job(variant)
    code, t, channels = job.code, job.t, job.channels
    count = 3 if variant.energy else 2
    gradient = (GRADIENTS_BY_Y if variant.source == "y" else GRADIENTS)[variant.act]

    def gradient_of(place: Place, mean: Value, scale: Value, shift: Value) -> tuple[Value, Value]:
        assert t.grad_y is not None
        offset, _, mask = place
        xmu, grad_y = t.x.load(offset, t.lanes, mask) - mean, t.grad_y.load(offset, t.lanes, mask)
        if t.signs is not None:
            return t.signs.load_mask(offset, t.lanes).select(grad_y, 0.0), xmu
        given = xmu.fma(scale, shift) if t.other is None else t.other.load(offset, t.lanes, mask)
        return gradient(grad_y, given, t.slope), xmu

    # Where the caches hold a tile until it is applied, g is kept, so that no exponential is computed twice: in dx, or
    # for slices in scratch memory, which is used again and again. In dx, narrow types would round it.
    is_kept = None
    if variant.act in KEPT and not (variant.by_columns and variant.kind in (BFLOAT16, FLOAT16)):
        is_kept = code.field("kept").differs(0)
    assert t.dx is not None
    kept = t.dx if job.by_columns else t.scratch

    def kept_at(place: Place, bounds: tuple[Value, ...]) -> Value:
        """Where g is kept: in dx, or the tile's slices, one behind the other, row by row."""
        if job.by_columns:
            return place.offset
        _, _, first_channel, end_channel = bounds
        return place.offset + place.row * ((end_channel - first_channel) * t.span - t.columns) - first_channel * t.span

    def either(body: Callable[[bool], None]) -> None:
        """Emit the code for jobs that keep g and for those that do not."""
        if is_kept is None:
            body(False)
            return
        with code.when_else(is_kept) as (then, otherwise):
            with then:
                body(True)
            with otherwise:
                body(False)

    def reduce(bounds: tuple[Value, Value, Value, Value]) -> None:
        def part(index: Value, first_row: Value, end_row: Value) -> None:
            def keep(place: Place, g: Value) -> None:
                kept.store(kept_at(place, bounds), g, place.mask)

            def sums(keeps: bool) -> None:
                how = gradient_of, variant.energy, keep if keeps else None
                if job.by_columns:
                    width = _width(variant.backward)
                    reductions.column_sums(
                        code, t, first_row, end_row, index, *job.column_range(bounds), width, *how
                    )  # fmt: skip
                else:
                    job.each_channel(
                        bounds,
                        lambda channel: reductions.slice_sums(code, t, first_row, end_row, index, channel, *how),
                    )

            either(sums)

        if not job.by_columns:
            job.fetch(bounds)
        job.each_part(bounds, part)

    def merge(bounds: tuple[Value, Value, Value, Value]) -> None:
        channels.gather_sums(*bounds[2:], count)
        channels.each(*bounds[2:], lambda group: channels.finish_sums(group, count))

    targets = [t.dx] if t.dresidual is None else [t.dx, t.dresidual]

    def apply(bounds: tuple[Value, Value, Value, Value]) -> None:
        def from_kept(place: Place, mean: Value, scale: Value, shift: Value) -> tuple[Value, Value]:
            xmu = t.x.load(place.offset, t.lanes, place.mask) - mean
            return kept.load(kept_at(place, bounds), t.lanes, place.mask), xmu

        either(lambda keeps: job.apply(bounds, targets, *results.dx_of(t, from_kept if keeps else gradient_of)))

    return job.emit(
        {
            PREPARE: lambda bounds: channels.each(*bounds[2:], channels.prepare),
            REDUCE: reduce,
            MERGE: merge,
            SLOPES: lambda bounds: channels.each(*bounds[2:], channels.slopes),
            APPLY: apply,
        }
    )
