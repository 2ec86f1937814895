"""How a tensor is cut into tiles for the CPU loops, and the job struct. Does not import llvmlite.

Every layout is a matrix, row by row in memory: channels_last and (N, C) are R = N·S rows of C columns, span 1;
contiguous (N, C, *) is R = N rows of C·S columns, span S. A channel is `span` neighbouring columns, `fold` times in a
row: where channels are few, several rows are joined into one, so that loops over columns are long enough.
"""

from __future__ import annotations

import ctypes
from collections import namedtuple
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

REDUCE, MERGE, PREPARE, SLOPES, APPLY = 1, 2, 4, 8, 16
"""The phases of a step, which `_codegen.tiles` describes."""

FLOAT32, BFLOAT16, FLOAT64, FLOAT16 = range(4)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float64: FLOAT64, torch.float16: FLOAT16}
COMPUTED = {kind: torch.float64 if kind == FLOAT64 else torch.float32 for kind in KINDS.values()}
"""The type that is computed in, which is the type of gamma, beta and the running statistics in the loops."""

KEPT = frozenset({"elu", "gelu", "silu", "sigmoid", "tanh"})
"""The activations with an exponential: backward stores g of a tile between its two passes."""
GROUP = 4
"""Vectors whose sum is taken in the computed type, before it is added to one in float64."""
MAX_STEPS = 4
"""The most steps of a job."""


def _per_step(*names: str) -> list[str]:
    """The fields of a job that have a value for each step: the first of them has the plain name."""
    return [name if step == 0 else f"{name}_{step}" for name in names for step in range(MAX_STEPS)]


_STEPS = _per_step("done", "phases", "tile_rows", "tile_channels", "reverse")
_SIZES = (
    "workers",
    "steps",
    "group_channels",
    "ahead",
    "yield_thread",
    "thread_number",
    "tickets",
    "stream",
    "prefetch",
    "kept",
    "rows",
    "channels",
    "span",
    "fold",
    "cell_span",
    "weight",
)
_TILES = ("parts", "part_rows", "block_rows", "scratch_size")
_TENSORS = ("x", "y", "other", "grad_y", "dx", "dresidual", "signs")
_STATISTICS = ("mean", "m2", "rstd", "running_mean", "running_var")
_VECTORS = ("gamma", "beta", "grad_gamma", "grad_beta", *_STATISTICS, "sums", "partials", "constants", "scratch")
_INTEGERS = (*_STEPS, *_SIZES, *_TILES, *_TENSORS, *_VECTORS)
_NUMBERS = ("eps", "slope", "count", "momentum")
_NAMES = (*_INTEGERS, *_NUMBERS)
FIELD = namedtuple("FIELD", _NAMES)(*range(len(_NAMES)))
"""The place of each field in a `Job`, in units of eight bytes: FIELD.rows."""


class Job(ctypes.Structure):
    """The argument of the loops: sizes, addresses (0 for None) and numbers, eight bytes each."""

    _fields_ = [(name, ctypes.c_int64) for name in _INTEGERS] + [(name, ctypes.c_double) for name in _NUMBERS]


class Variant(NamedTuple):
    """The constants of one compiled function; see `_codegen.tiles`.

    `source`: what act' or the sum is computed from besides x; "signs" in forward is a residual, with signs stored.
    """

    backward: bool
    kind: int
    act: str | None
    source: str
    by_columns: bool
    energy: bool = False


# Rough, from measurements on two processors. Only speed depends on them: the order of sums does not.
_LONG_ROW = 64  # values: narrower rows are folded to this width, and to whole cache lines
_GROUP_BYTES = 64 << 10  # of rows that are neighbors in memory
_LINE = 64  # bytes
_PIECE_LINES = 2  # the least of a row that a group of channels reads, which DRAM delivers together
_WORK_BYTES = 512 << 10  # of a group at least: its steps end with a barrier each
_SMALL = 128 << 10  # bytes
_CHANNELS_EACH = 16
_SHORT_STREAM = 2 << 10  # bytes: shorter runs bypass the caches only if they are whole cache lines

# These decide the order of sums, so they depend on nothing that is measured.
SHORT_SLICE = 16  # values: shorter slices are processed by columns
_SHORT_SLICE_OF_MANY, _MANY_ROWS = 64, 192  # these, too, where many rows share the work per column
_LONG_RUN = 4 << 10  # bytes: a tile's part of a row, long enough for the prefetchers
_LARGE_SLAB = 512 << 10  # bytes: slices of a channel that exceed most L2 caches
_TILE_BYTES = 256 << 10
_PART_ROWS = 64
_PARTS_EACH = 4
_MAX_FOLDED = 4096  # values


class Step(NamedTuple):
    """One step of a job: its phases, and tiles of tile_rows × tile_channels, the last first if `reverse`."""

    phases: int
    tile_rows: int
    tile_channels: int
    reverse: bool = False


class Steps(NamedTuple):
    """All steps run for one group of channels, then for the next; `tiles` is the most that a step has in a group."""

    steps: tuple[Step, ...]
    group_channels: int
    groups: int
    tiles: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """rows × (fold·channels·span) columns of `size` bytes each."""

    rows: int
    channels: int
    span: int
    fold: int
    size: int
    by_columns: bool
    """Whether the loops run along whole rows, because slices are too short for one loop each."""

    @property
    def columns(self) -> int:
        return self.channels * self.span * self.fold

    @property
    def cells(self) -> int:
        """The number of sums and constants: one per column, or one per channel."""
        return self.columns if self.by_columns else self.channels

    @property
    def row_bytes(self) -> int:
        return self.columns * self.size

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A matrix, and the rows of each part that has partial sums of its columns."""

    matrix: Matrix
    threads: int
    part_rows: int

    @property
    def parts(self) -> int:
        return -(-self.matrix.rows // self.part_rows)

    def block_rows(self, group_channels: int) -> int:
        """The rows over which the loops keep a column's sums or constants in registers: whole groups of a sum."""
        m = self.matrix
        return max(16, _GROUP_BYTES // max(group_channels * m.span * m.fold * m.size, 1) // GROUP * GROUP)

    def group_channels(self, inputs: int, cached: int) -> int:
        """The channels that are reduced and then applied before the next ones begin: few enough for the caches.

        Loops along rows then read a piece of every row, of at least two cache lines. Only speed depends on it: no sum
        has terms of two channels.
        """
        m = self.matrix
        lines = m.row_bytes // _LINE
        if not m.by_columns or m.fold > 1 or m.row_bytes % _LINE or lines < 2 * _PIECE_LINES:
            return m.channels
        slab = inputs * m.rows * _LINE
        # Rows whose length has a large power of two as a divisor map to few sets of a cache.
        sets = (lines & -lines) // 2
        each = max(_PIECE_LINES, sets, min(cached // (2 * slab), -(-_WORK_BYTES // slab)))
        groups = max(1, lines // each)
        return -(-(-(-lines // groups) * _LINE) // (m.span * m.size))

    def one_pass_channels(self, inputs: int, l2_bytes: int) -> int | None:
        """The channels of a tile for one pass over `inputs` tensors; None where two passes are better.

        Runs along rows read pieces of many rows for a few columns, which is slower than a second pass.
        """
        m = self.matrix
        if inputs * m.bytes <= _SMALL:
            return m.channels
        if m.by_columns or self.parts > 1:
            return None
        run = -(-_LONG_RUN // (m.span * m.size))
        cached = l2_bytes // (2 * inputs * m.rows * m.span * m.size)
        return max(1, min(run, cached, -(-m.channels // (_PARTS_EACH * self.threads))))

    def steps(self, phases: int, inputs: int, backward: bool, l2_bytes: int) -> Steps:
        """The steps of a job of these phases that reads `inputs` tensors."""
        m = self.matrix
        channels = self.one_pass_channels(inputs, l2_bytes)
        in_order = not phases & REDUCE and inputs * m.bytes > _SMALL  # what is read once is read in the order of memory
        if channels is not None and not in_order:
            return self._in_groups((Step(phases, m.rows, channels),), m.channels)
        reads_twice = bool(phases & REDUCE and phases & APPLY)
        group = self.group_channels(inputs, self.threads * l2_bytes) if reads_twice else m.channels
        across = group if m.by_columns else min(group, max(1, _TILE_BYTES // (m.span * m.size)))
        tile_rows = self.part_rows
        if in_order:
            tile_rows = max(1, min(_TILE_BYTES // (across * m.span * m.fold * m.size), -(-m.rows // self.threads)))
        each = -(-group // self.threads)
        per_channel = max(1, min(each, max(_CHANNELS_EACH, each // 4)))
        # Backward reduces by the constants that it prepares; forward prepares them from what it reduces.
        before = phases & (PREPARE if phases & MERGE else PREPARE | SLOPES) if backward or not phases & MERGE else 0
        after = phases & (MERGE | PREPARE | SLOPES) & ~before
        # The operator before wrote x or grad_y from the front, so their ends are still in the cache: REDUCE begins
        # there, and APPLY where REDUCE ended.
        planned = (
            Step(before, m.rows, per_channel),
            Step(phases & REDUCE, self.part_rows, across, reverse=reads_twice),
            Step(after, m.rows, per_channel),
            Step(phases & APPLY, tile_rows, across),
        )
        return self._in_groups(tuple(step for step in planned if step.phases), group)

    def _in_groups(self, steps: tuple[Step, ...], group: int) -> Steps:
        rows, channels = self.matrix.rows, self.matrix.channels
        tiles = max(-(-rows // step.tile_rows) * -(-group // step.tile_channels) for step in steps)
        return Steps(steps, group, -(-channels // group), tiles)

    def streams(self, most_cached: int) -> bool:
        """Whether results are stored past the caches: the tensor is larger than this, and runs are long enough."""
        m = self.matrix
        run = m.row_bytes if m.by_columns else m.span * m.size
        is_long = run % _LINE == 0 or (run >= _SHORT_STREAM and not m.by_columns)
        return is_long and m.bytes > most_cached


def job_of(planned: Plan, steps: Steps, **fields: int) -> Job:
    """A job without its tensors: the sizes and steps of a plan, and these fields."""
    m = planned.matrix
    job = Job(
        steps=len(steps.steps),
        group_channels=steps.group_channels,
        rows=m.rows,
        channels=m.channels,
        span=m.span,
        fold=m.fold,
        cell_span=m.span if m.by_columns else 1,
        weight=1 if m.by_columns else m.span,
        parts=planned.parts,
        part_rows=planned.part_rows,
        block_rows=planned.block_rows(steps.group_channels),
        **fields,
    )
    for place, step in enumerate(steps.steps):
        for name, value in step._asdict().items():
            setattr(job, name if place == 0 else f"{name}_{place}", value)
    return job


@lru_cache(maxsize=4096)
def plan(rows: int, channels: int, span: int, size: int, threads: int) -> Plan:
    """Cut a tensor of `rows` rows of `channels` slices of `span` values of `size` bytes into parts."""
    by_columns = span < SHORT_SLICE or (span < _SHORT_SLICE_OF_MANY and rows >= _MANY_ROWS)
    fold = _fold(rows, channels * span) if by_columns else 1
    m = Matrix(rows // fold, channels, span, fold, size, by_columns)
    tiles = _PARTS_EACH * threads
    if m.by_columns:
        part_rows = max(_PART_ROWS, -(-m.rows // tiles))
    elif span * size < _LONG_RUN and m.rows * span * size > _LARGE_SLAB:
        part_rows = min(
            _TILE_BYTES // m.row_bytes, -(-m.rows // tiles)
        )  # few pieces of many rows: read twice, in order
    elif channels >= tiles or threads == 1:
        part_rows = m.rows
    else:
        part_rows = -(-m.rows // -(-tiles // channels))
    return Plan(m, threads, max(1, part_rows))


def _fold(rows: int, width: int) -> int:
    """How many rows to join: to whole cache lines if possible, and to `_LONG_ROW` values."""
    wanted = [
        f for f in range(1, min(rows, max(_LONG_ROW // width, 16)) + 1) if rows % f == 0 and f * width <= _MAX_FOLDED
    ]
    aligned = [f for f in wanted if f * width % 16 == 0]
    for choice in (aligned, wanted):
        long = [f for f in choice if f * width >= _LONG_ROW]
        if long:
            return long[0]
    return (aligned or wanted or [1])[-1]
