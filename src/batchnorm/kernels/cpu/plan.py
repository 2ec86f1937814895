"""Which tensors the CPU loops run, how a tensor is cut into tiles, and the job struct. Does not import Numba.

Every layout is a matrix, row by row in memory: channels_last and (N, C) are R = N·S rows of C columns, span 1;
contiguous (N, C, *) is R = N rows of C·S columns, span S. A channel is `span` neighbouring columns, `fold` times in a
row: where channels are few, several rows are joined into one, so that loops over columns are long enough.
"""

from __future__ import annotations

import ctypes
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from batchnorm.kernels.cpu import threads
from batchnorm.kernels.cpu.system import caches
from batchnorm.kernels.layout import why_not_dense

REDUCE, MERGE, PREPARE, SLOPES, APPLY = 1, 2, 4, 8, 16
"""The phases of a job, which `_codegen.tiles` describes."""

_SIZES = ("ticket", "tiles", "reverse", "phases", "stream", "rows", "channels", "span", "fold", "cell_span", "weight")
_TILES = ("tile_rows", "tile_channels", "parts", "part_rows")
_TENSORS = ("x", "y", "other", "grad_y", "dx", "dresidual")
_STATISTICS = ("mean", "m2", "rstd", "running_mean", "running_var")
_VECTORS = ("gamma", "beta", *_STATISTICS, "sums", "partials", "constants")
_INTEGERS = (*_SIZES, *_TILES, *_TENSORS, *_VECTORS)
_NUMBERS = ("eps", "slope", "count", "momentum")
_NAMES = (*_INTEGERS, *_NUMBERS)
FIELD = namedtuple("FIELD", _NAMES)(*range(len(_NAMES)))
"""The place of each field in a `Job`, in units of eight bytes: FIELD.rows."""

# Measured on a processor with 32 KiB, 1 MiB and 32 MiB of cache; all of them are rough.
_SHORT_SLICE = 32  # values: shorter slices are processed by columns
_LONG_ROW = 128  # values: narrower rows are folded to this width
_LONG_RUN = 32 << 10  # bytes: a tile's part of a row, long enough for the prefetchers and the page tables
_SHORT_RUN = 2 << 10  # bytes: below it tiles of channels lose more than the cache gains
_TILE_BYTES = 256 << 10
_TILES_EACH = 16
_SMALL = 256 << 10  # bytes


class Job(ctypes.Structure):
    """The argument of the loops: sizes, addresses (0 for None) and numbers, eight bytes each."""

    _fields_ = [(name, ctypes.c_int64) for name in _INTEGERS] + [(name, ctypes.c_double) for name in _NUMBERS]


@dataclass(frozen=True, slots=True)
class Matrix:
    """rows × (fold·channels·span) columns of `size` bytes each."""

    rows: int
    channels: int
    span: int
    fold: int
    size: int

    @property
    def by_columns(self) -> bool:
        """Whether the loops run along whole rows, because slices are too short for one loop each."""
        return self.span < _SHORT_SLICE

    @property
    def cells(self) -> int:
        """The number of sums and constants: one per column, or one per channel."""
        return self.channels * self.span * self.fold if self.by_columns else self.channels

    @property
    def row_bytes(self) -> int:
        return self.channels * self.span * self.fold * self.size


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of tile_rows × tile_channels; `parts` of them share a channel."""

    tile_rows: int
    tile_channels: int
    parts: int
    tiles: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A matrix, and its tilings.

    `streamed` for a pass over memory in its order; `channels` for work per channel; `resident[n]` for one pass over n
    tensors that stays in the cache, None where it would not.
    """

    matrix: Matrix
    streamed: Tiling
    channels: Tiling
    resident: tuple[Tiling | None, ...]


@lru_cache(maxsize=4096)
def plan(rows: int, channels: int, span: int, size: int, threads: int) -> Plan:
    """Cut a tensor of `rows` rows of `channels` slices of `span` values of `size` bytes into tiles."""
    fold = 1
    if span == 1:
        max_fold = -(-_LONG_ROW // channels)
        fold = next(f for f in range(min(max_fold, rows), 0, -1) if rows % f == 0)
    shape = Matrix(rows // fold, channels, span, fold, size)
    resident = tuple(resident_tiling(shape, tensors, threads) if tensors else None for tensors in range(4))
    channel_tiles = _tiling(shape, shape.rows, max(1, min(64, -(-channels // threads))))
    return Plan(shape, _streamed(shape, threads), channel_tiles, resident)


def exceeds_caches(shape: Matrix, tensors: int) -> bool:
    """Whether tensors of this shape exceed the last-level cache: results are then written past the caches."""
    return tensors * shape.rows * shape.row_bytes > last_level_bytes()


def _tiling(shape: Matrix, tile_rows: int, tile_channels: int) -> Tiling:
    parts = -(-shape.rows // tile_rows)
    return Tiling(tile_rows, tile_channels, parts, parts * -(-shape.channels // tile_channels))


def resident_tiling(shape: Matrix, tensors: int, threads: int) -> Tiling | None:
    """Tiles of all rows of some channels: wide enough for long runs of memory, narrow enough for the cache.

    A small tensor is one tile: waking other threads would take as long as the work.
    """
    if tensors * shape.rows * shape.row_bytes <= _SMALL:
        return _tiling(shape, shape.rows, shape.channels)
    if shape.fold > 1:
        return None
    per_channel = shape.span * shape.size
    cache_bytes = max(
        3 * last_level_bytes() // (4 * threads), 1 << 19
    )  # a thread's share, with some room for other data
    max_channels = min(cache_bytes // (tensors * shape.rows * per_channel), -(-shape.channels // threads))
    if max_channels == 0 or (max_channels * per_channel < _SHORT_RUN and max_channels < shape.channels):
        return None
    return _tiling(shape, shape.rows, max(1, min(max_channels, -(-_LONG_RUN // per_channel))))


def _streamed(shape: Matrix, threads: int) -> Tiling:
    """Tiles of whole rows in the order of memory, several per thread; of channels too where rows are few.

    Where every column has its own sums and a channel has many columns, tiles of channels keep the sums few.
    """
    if shape.by_columns and shape.span > 1:
        run_channels = -(-_LONG_RUN // (shape.span * shape.size))
        return _tiling(shape, shape.rows, max(1, min(run_channels, -(-shape.channels // (2 * threads)))))
    tile_rows = max(_TILE_BYTES // shape.row_bytes, -(-shape.rows // (_TILES_EACH * threads)), 1)
    tile_rows = min(tile_rows, max(1, shape.rows // threads))
    across = 1
    if shape.fold == 1 and tile_rows == 1:
        across = max(1, min(shape.channels, shape.row_bytes // _TILE_BYTES))
    return _tiling(shape, tile_rows, -(-shape.channels // across))


def last_level(sizes: Mapping[str, int]) -> int:
    """Bytes of the last-level cache; 8 MiB where it is unknown."""
    return max(sizes.values(), default=0) or 8 << 20


@cache
def last_level_bytes() -> int:
    """Bytes of the last-level cache of this machine."""
    return last_level(caches())


NOT_SHARED = "PyTorch's OpenMP runtime has no GOMP_parallel here"
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

# Below these sizes the call from Python costs more than the loops save; larger where PyTorch's operators are fast.
FEW_VALUES = 500_000
FEW_VALUES_IN_INFERENCE = 6_000_000
FEW_VALUES_IN_SHORT_SLICES = 1_500_000
FEW_VALUES_IN_ROWS = 6_000_000
FEW_VALUES_IN_LONG_ROWS = 12_000_000
_SLOW_SLICE = 64  # values
_WIDE_ROW = 256  # channels
FEW_CHANNELS = 4


def why_unsupported(x: Tensor, training: bool, fused: bool, tapped: bool = False) -> str | None:
    """Why the loops do not run this tensor; None if they do. `tapped`: by-products are recorded, too."""
    if tapped:  # small ones as well: PyTorch's operators would need a dozen calls
        return _why_not_possible(x)
    values = x.numel()
    if values < FEW_VALUES:
        return _too_few(FEW_VALUES, "the call itself would cost more than the work")
    if not (training or fused):
        return "inference without an activation or a residual is one pass over memory either way"
    if not training and values < FEW_VALUES_IN_INFERENCE:
        return _too_few(FEW_VALUES_IN_INFERENCE, "in inference PyTorch's operators are quick")
    return _why_not_possible(x) or _why_slower(x)


def is_shared() -> bool:
    """Whether the loops run on as many threads as PyTorch's operators."""
    return threads.can_share() or torch.get_num_threads() == 1


def _why_not_possible(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"no faster kernel for device {x.device.type!r} is built in"
    return why_not_dense(x, KINDS, "float32, bfloat16 and float64", "the compiled loops")


def _why_slower(x: Tensor) -> str | None:
    """Why PyTorch's operators are faster."""
    values, channels = x.numel(), x.shape[1]
    if x.dim() == 2 or not x.is_contiguous():
        few = FEW_VALUES_IN_LONG_ROWS if channels > _WIDE_ROW else FEW_VALUES_IN_ROWS
        if values < few:
            return _too_few(few, f"in rows of {channels} channels PyTorch's operators are quick")
    elif values < FEW_VALUES_IN_SHORT_SLICES and values < x.shape[0] * channels * _SLOW_SLICE:
        return _too_few(FEW_VALUES_IN_SHORT_SLICES, f"slices shorter than {_SLOW_SLICE} are slow")
    if not is_shared():
        return f"{NOT_SHARED}, so the compiled loops would run on one thread"
    if channels < FEW_CHANNELS:
        return f"fewer than {FEW_CHANNELS} channels, too few to share between threads"
    return None


@cache
def _too_few(few: int, why: str) -> str:
    return f"fewer than {few:,} values, {why}"
