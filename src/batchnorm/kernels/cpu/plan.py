"""Which tensors the CPU loops are for, how a tensor is cut into tiles, and the job struct. Knows no Numba.

Every layout is a matrix, row by row in memory: channels_last and (N, C) are R = N·S rows of C columns, span 1;
contiguous (N, C, *) is R = N rows of C·S columns, span S. A channel is `span` neighbouring columns, `fold` times in a
row: where channels are few, several rows are taken for one, so that loops over columns have some length.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from batchnorm.kernels.cpu import threads
from batchnorm.kernels.layout import CHANNELS_LAST

REDUCE, MERGE, PREPARE, SLOPES, APPLY = 1, 2, 4, 8, 16
"""The phases of a job, which `_codegen.tiles` describes."""

_SIZES = ("ticket", "tiles", "reverse", "phases", "stream", "rows", "channels", "span", "fold", "cell_span", "weight")
_TILES = ("tile_rows", "tile_channels", "parts", "part_rows")
_TENSORS = ("x", "y", "other", "grad_y", "dx", "dresidual")
_STATISTICS = ("mean", "m2", "rstd", "running_mean", "running_var")
_VECTORS = ("gamma", "beta", *_STATISTICS, "sums", "partials", "constants")
_INTEGERS = (*_SIZES, *_TILES, *_TENSORS, *_VECTORS)
_NUMBERS = ("eps", "slope", "count", "momentum")
FIELDS = {name: index for index, name in enumerate((*_INTEGERS, *_NUMBERS))}
"""The position of each field of a `Job`, in units of eight bytes."""

# Measured on a processor with 32 KiB, 1 MiB and 32 MiB of cache; far from sharp, any of them.
_SHORT_SLICE = 32  # values: slices up to here are taken by columns
_LONG_ROW = 128  # values: narrower rows are folded to this width
_LONG_RUN = 32 << 10  # bytes: a tile's part of a row, long enough for the prefetchers and the page tables
_SHORT_RUN = 2 << 10  # bytes: below it tiles of channels lose more than the cache gains
_TILE_BYTES = 256 << 10
_TILES_EACH = 16
_SMALL = 256 << 10  # bytes

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Job(ctypes.Structure):
    """What the loops are told: sizes, addresses (0: there is none) and numbers, eight bytes each."""

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
        """Whether the loops run along whole rows: slices too short to be run along by themselves."""
        return self.span < _SHORT_SLICE

    @property
    def cells(self) -> int:
        """How many sums and constants there are: one a column, or one a channel."""
        return self.channels * self.span * self.fold if self.by_columns else self.channels

    @property
    def row_bytes(self) -> int:
        return self.channels * self.span * self.fold * self.size


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of tile_rows × tile_channels; `parts` of them lie below each other."""

    tile_rows: int
    tile_channels: int
    parts: int
    tiles: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A matrix, and its tilings.

    `streamed` for a pass over memory in its order; `channels` for what is done a channel at a time; `resident[n]` for
    one pass over n tensors that stays in cache, None where it would not.
    """

    matrix: Matrix
    streamed: Tiling
    channels: Tiling
    resident: tuple[Tiling | None, ...]


@lru_cache(maxsize=4096)
def plan(rows: int, channels: int, span: int, size: int, threads: int) -> Plan:
    """How to cut a tensor with `rows` rows of `channels` slices of `span` values of `size` bytes."""
    fold = 1
    if span == 1:
        wanted = -(-_LONG_ROW // channels)
        fold = next(f for f in range(min(wanted, rows), 0, -1) if rows % f == 0)
    shape = Matrix(rows // fold, channels, span, fold, size)
    resident = tuple(_resident(shape, tensors, threads) if tensors else None for tensors in range(4))
    few = _tiling(shape, shape.rows, max(1, min(64, -(-channels // threads))))
    return Plan(shape, _streamed(shape, threads), few, resident)


def past_caches(shape: Matrix, tensors: int) -> bool:
    """Whether what is written is better written past the caches: it and what is read would not stay there anyway."""
    return tensors * shape.rows * shape.row_bytes > _last_level()


def _tiling(shape: Matrix, tile_rows: int, tile_channels: int) -> Tiling:
    parts = -(-shape.rows // tile_rows)
    return Tiling(tile_rows, tile_channels, parts, parts * -(-shape.channels // tile_channels))


def _resident(shape: Matrix, tensors: int, threads: int) -> Tiling | None:
    """Tiles of all rows of some channels: wide enough for long runs of memory, narrow enough for the cache.

    What is small is one tile: to wake other threads would take as long as the work.
    """
    if tensors * shape.rows * shape.row_bytes <= _SMALL:
        return _tiling(shape, shape.rows, shape.channels)
    if shape.fold > 1:
        return None
    per_channel = shape.span * shape.size
    cache_bytes = max(3 * _last_level() // (4 * threads), 1 << 19)  # a thread's share, with room for what else is in it
    most = min(cache_bytes // (tensors * shape.rows * per_channel), -(-shape.channels // threads))
    if most == 0 or (most * per_channel < _SHORT_RUN and most < shape.channels):
        return None
    return _tiling(shape, shape.rows, max(1, min(most, -(-_LONG_RUN // per_channel))))


def _streamed(shape: Matrix, threads: int) -> Tiling:
    """Tiles of whole rows in the order of memory, some for each thread; of channels too where rows are few.

    Where every column has sums of its own and a channel many columns, tiles of channels keep the sums few.
    """
    if shape.by_columns and shape.span > 1:
        wanted = -(-_LONG_RUN // (shape.span * shape.size))
        return _tiling(shape, shape.rows, max(1, min(wanted, -(-shape.channels // (2 * threads)))))
    tile_rows = max(_TILE_BYTES // shape.row_bytes, -(-shape.rows // (_TILES_EACH * threads)), 1)
    tile_rows = min(tile_rows, max(1, shape.rows // threads))
    across = 1
    if shape.fold == 1 and tile_rows == 1:
        across = max(1, min(shape.channels, shape.row_bytes // _TILE_BYTES))
    return _tiling(shape, tile_rows, -(-shape.channels // across))


@cache
def _last_level() -> int:
    """The size of the last-level cache in bytes, as Linux tells it; 8 MiB where the machine does not say."""
    sizes = [_bytes(path) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=0) or 8 << 20


def _bytes(path: Path) -> int:
    """A size as Linux writes it, "1024K"; 0 where it cannot be read."""
    try:
        size = path.read_text().strip()
        return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 0


NOT_SHARED = "PyTorch's OpenMP runtime has no GOMP_parallel here"
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

# Where the call itself, which is Python, costs no more than the loops save: more where PyTorch's operators are quick.
_FEW_VALUES = 500_000
_FEW_VALUES_IN_INFERENCE = 6_000_000
_FEW_VALUES_IN_SHORT_SLICES = 1_500_000
_FEW_VALUES_IN_ROWS = 6_000_000
_FEW_VALUES_IN_LONG_ROWS = 12_000_000
_SLOW_SLICE = 64  # values
_WIDE_ROW = 256  # channels
_FEW_CHANNELS = 4


def uncovered(x: Tensor, training: bool, fused: bool, tapped: bool = False) -> str | None:
    """Why the loops are not for this tensor, or None where they are; `tapped`: its by-products are wanted, too."""
    if tapped:  # small ones as well: PyTorch's operators would need a dozen calls
        return _foreign(x)
    values = x.numel()
    if values < _FEW_VALUES:
        return _too_few(_FEW_VALUES, "the call itself would cost more than the work")
    if not (training or fused):
        return "inference without an activation or a residual is one pass over memory by either"
    if not training and values < _FEW_VALUES_IN_INFERENCE:
        return _too_few(_FEW_VALUES_IN_INFERENCE, "in inference PyTorch's operators are quick")
    return _foreign(x) or _slow(x)


def shared() -> bool:
    """Whether the loops run on as many threads as PyTorch's operators."""
    return threads.shared() or torch.get_num_threads() == 1


def _foreign(x: Tensor) -> str | None:
    """Why the loops cannot run it."""
    if x.device.type != "cpu":
        return f"no faster kernel for device {x.device.type!r} is built in"
    if x.dtype not in KINDS:
        return f"the compiled loops are for float32, bfloat16 and float64, not {x.dtype}"
    if x.layout != torch.strided or x.dim() < 2:
        return "the compiled loops are for dense tensors (N, C, *)"
    last = CHANNELS_LAST.get(x.dim())
    if not x.is_contiguous() and (last is None or not x.is_contiguous(memory_format=last)):
        return "the tensor is neither contiguous nor channels_last, and a copy would cost what the loops save"
    return None


def _slow(x: Tensor) -> str | None:
    """Why PyTorch's operators are quicker."""
    values, channels = x.numel(), x.shape[1]
    if x.dim() == 2 or not x.is_contiguous():
        few = _FEW_VALUES_IN_LONG_ROWS if channels > _WIDE_ROW else _FEW_VALUES_IN_ROWS
        if values < few:
            return _too_few(few, f"in rows of {channels} channels PyTorch's operators are quick")
    elif values < _FEW_VALUES_IN_SHORT_SLICES and values < x.shape[0] * channels * _SLOW_SLICE:
        return _too_few(_FEW_VALUES_IN_SHORT_SLICES, f"slices shorter than {_SLOW_SLICE} are slow")
    if not shared():
        return f"{NOT_SHARED}, so the compiled loops would run on one thread"
    if channels < _FEW_CHANNELS:
        return f"fewer than {_FEW_CHANNELS} channels, too few to share between threads"
    return None


@cache
def _too_few(few: int, why: str) -> str:
    return f"fewer than {few:,} values, {why}"
