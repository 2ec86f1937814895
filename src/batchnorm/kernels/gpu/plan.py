"""Which tensors the GPU kernels run, and how a tensor is cut into tiles. Does not import Triton.

Every layout is N·C slices of S neighbouring values: value s of slice n of channel c is at n·C·S + c·S + s. Contiguous
(N, C, *) has this form; channels_last and (N, C) have it with S = 1 and N·S slices. A tile is `tile_values` positions ×
`tile_channels`. The positions of a channel are numbered so that computing an offset costs no division per value:

    pitch = 0    S is at least a tile: positions are the m values, and a tile meets at most two slices
    pitch > 0    S is smaller: each slice has `pitch` positions, S rounded up to a power of two

One program takes `part_positions` positions of `tile_channels` channels, tile by tile. `parts` programs share a
channel, and their sums are merged in the order of the parts.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from batchnorm.kernels.layout import why_not_dense

TILE_SIZE = 2048  # values: 16 per thread, so that several 16-byte loads are in flight
WARPS = 4
STAGES = 1  # tiles of a pass that are in flight through shared memory; 1: none
OPTIONS = {"enable_fp_fusion": True}  # for every launch: forward and backward fuse alike and compute the same z
RUN_BYTES = 64  # neighbouring channels of a tile where channels are contiguous: two memory sectors
PROGRAMS_PER_SM = 6  # enough to hide memory latency, few enough to run all at the same time
MAX_PARTS = 1024
MAX_INLINE_MERGE = 1024  # parts × channels that each program of the second pass merges itself; more take a launch
MERGE_TILE_SIZE = 1024  # parts × channels that are merged at a time: 8 per thread
MERGE_CHANNELS = 4  # channels per program of the merging launch
LOAD_BYTES = 16
L2_DIVISOR = 4  # tensors may fill 1/4 of the L2: writes go through it as well
COOPERATIVE_PROGRAMS_PER_SM = 3  # of groups of programs that all run at the same time
WARP_SIZE, VALUES_PER_THREAD = 32, 32  # values of all tensors together that a thread holds in registers
MAX_WARPS_PER_SM = 16  # where registers hold the whole tensor: 128 registers per thread
REGISTERS_PER_SM, MAX_REGISTERS = 1 << 16, 255


@dataclass(frozen=True)
class Tiling:
    """The tiles of a tensor of slices × channels × span values, `part_tiles` of them per program.

    Programs form `groups`, each of which takes blocks of channels in turn; 0: every program takes one block.
    `warps_per_sm` warps share a multiprocessor where all programs run at the same time; 0 where they need not.
    """

    slices: int
    channels: int
    span: int
    itemsize: int
    tile_values: int
    tile_channels: int
    part_tiles: int
    warps: int
    groups: int = 0
    warps_per_sm: int = 0

    @cached_property
    def values(self) -> int:
        """m, the values of a channel."""
        return self.slices * self.span

    @cached_property
    def pitch(self) -> int:
        return _pitch(self.span, self.tile_values)

    @cached_property
    def positions(self) -> int:
        return self.slices * (self.pitch or self.span)

    @cached_property
    def part_positions(self) -> int:
        return self.part_tiles * self.tile_values

    @cached_property
    def alignment(self) -> int:
        """Divides the length of contiguous runs; at most the values of one load."""
        return math.gcd(self.channels if self.span == 1 else self.span, LOAD_BYTES // self.itemsize)

    @cached_property
    def int64(self) -> bool:
        """Whether offsets need 64 bits."""
        return (max(self.values, self.positions) + self.tile_values) * power_of_two(self.channels) >= 2**31

    @cached_property
    def parts(self) -> int:
        return ceil(self.positions, self.part_positions)

    @cached_property
    def blocks(self) -> int:
        """How many blocks of `tile_channels` channels there are."""
        return ceil(self.channels, self.tile_channels)

    @cached_property
    def programs(self) -> int:
        """In the order of the parts, then of the blocks."""
        return self.parts * (self.groups or self.blocks)

    @cached_property
    def merges_inline(self) -> bool:
        """Whether the programs of the second pass merge the parts."""
        return self.parts * self.tile_channels <= MAX_INLINE_MERGE

    @cached_property
    def merging(self) -> Tiling:
        """The same parts, for the launch that merges them."""
        return replace(self, tile_channels=MERGE_CHANNELS)

    @cached_property
    def registers(self) -> int:
        """The registers that a thread may use where warps share a multiprocessor, in steps of 8."""
        return min(MAX_REGISTERS, REGISTERS_PER_SM // (WARP_SIZE * self.warps_per_sm) // 8 * 8)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The last arguments of every launch."""
        return self.values, self.positions, self.channels, self.span, self.parts, self.part_positions

    @cached_property
    def constants(self) -> dict[str, int | bool]:
        """The constants that every kernel is compiled for; TILE_PARTS is how many parts it merges at a time."""
        return {
            "PITCH": self.pitch,
            "ALIGNMENT": self.alignment,
            "TILE_PARTS": min(power_of_two(self.parts), max(1, MERGE_TILE_SIZE // self.tile_channels)),
            "TILE_VALUES": self.tile_values,
            "TILE_CHANNELS": self.tile_channels,
            "INT64": self.int64,
        }


@lru_cache(maxsize=4096)
def plan_passes(slices: int, channels: int, span: int, itemsize: int, processors: int) -> Tiling:
    """The tiling for passes over memory, on a device of `processors` multiprocessors."""
    tile_channels, tile_values, tiles = _pass_tile(slices, channels, span, itemsize)
    parts = max(1, min(MAX_PARTS, PROGRAMS_PER_SM * processors // ceil(channels, tile_channels)))
    return Tiling(slices, channels, span, itemsize, tile_values, tile_channels, ceil(tiles, parts), WARPS)


@lru_cache(maxsize=4096)
def plan_resident(
    slices: int, channels: int, span: int, itemsize: int, processors: int, tensors: int, cooperative: bool
) -> Tiling | None:
    """One tile per part, so that registers hold the whole tensor at once; None where they cannot.

    A channel of several parts needs a `cooperative` launch; programs that own whole channels run in any order.
    `tensors`, a power of two, is how many tensors of x's size registers hold, rounded up.
    """
    tile_channels = _contiguous_channels(channels, span, itemsize)
    max_values = power_of_two(slices * power_of_two(span))
    for warps in (4, 8, 16):
        tile_values = min(max_values, WARP_SIZE * warps * VALUES_PER_THREAD // (tensors * tile_channels))
        if tile_values == 0:
            continue
        tiling = Tiling(
            slices, channels, span, itemsize, tile_values, tile_channels, 1, warps, warps_per_sm=MAX_WARPS_PER_SM
        )
        is_busy = 2 * tiling.programs >= processors
        runs_at_once = tiling.programs <= processors * (MAX_WARPS_PER_SM // warps)
        can_share = cooperative and runs_at_once and tiling.parts <= MAX_PARTS
        if is_busy and not tiling.int64 and (tiling.parts == 1 or can_share):
            return tiling
    return None


@lru_cache(maxsize=4096)
def plan_rounds(
    slices: int, channels: int, span: int, itemsize: int, processors: int, l2_bytes: int, tensors: int
) -> Tiling | None:
    """Groups of programs, so that the L2 holds the blocks that all groups work on, `tensors` of x's size each.

    None where the L2 cannot hold two blocks of several: while one group waits, another should work.
    """
    tile_channels, tile_values, tiles = _pass_tile(slices, channels, span, itemsize)
    blocks, programs = ceil(channels, tile_channels), COOPERATIVE_PROGRAMS_PER_SM * processors
    cached_blocks = l2_bytes // L2_DIVISOR // (slices * span * tile_channels * itemsize * tensors)
    if cached_blocks < min(blocks, 2):
        return None
    rounds = ceil(blocks, min(blocks, cached_blocks, programs))
    groups = ceil(blocks, rounds)
    part_tiles, warps_per_sm = ceil(tiles, programs // groups), WARPS * COOPERATIVE_PROGRAMS_PER_SM
    tiling = Tiling(
        slices, channels, span, itemsize, tile_values, tile_channels, part_tiles, WARPS, groups, warps_per_sm
    )
    return tiling if tiling.parts <= MAX_PARTS else None


def _pass_tile(slices: int, channels: int, span: int, itemsize: int) -> tuple[int, int, int]:
    """Channels and values of a tile, and how many tiles a channel has."""
    tile_channels = _contiguous_channels(channels, span, itemsize)
    tile_values = min(TILE_SIZE // tile_channels, power_of_two(slices * power_of_two(span)))
    return tile_channels, tile_values, ceil(slices * (_pitch(span, tile_values) or span), tile_values)


def _pitch(span: int, tile_values: int) -> int:
    return 0 if span > 1 and tile_values <= span else power_of_two(span)


def _contiguous_channels(channels: int, span: int, itemsize: int) -> int:
    return 1 if span > 1 else min(power_of_two(channels), max(1, RUN_BYTES // itemsize))


def power_of_two(number: int) -> int:
    """The number rounded up to a power of two."""
    return 1 << max(0, number - 1).bit_length()


def ceil(number: int, divisor: int) -> int:
    """number/divisor, rounded up."""
    return -(-number // divisor)


TYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
# A launch from Python takes time that only large tensors hide. The threshold is not yet measured on a GPU.
_SMALL = 8 << 20  # bytes
ENABLED = os.environ.get("BATCHNORM_GPU_KERNELS") == "1"  # opt-in until the kernels have run on a GPU
_HAS_TRITON = find_spec("triton") is not None


def why_unsupported(x: Tensor, training: bool, fused: bool, tapped: bool = False) -> str | None:
    """Why the GPU kernels do not run this CUDA tensor; None if they do."""
    if not ENABLED:
        return "the GPU kernels have not run on a GPU yet: set BATCHNORM_GPU_KERNELS=1 before the start to try them"
    if not _HAS_TRITON:
        return "Triton, which the GPU kernels are written in, is not installed: pip install triton"
    if not (training or fused or tapped):
        return "inference without an activation or a residual is one pass over memory either way"
    if not tapped and x.numel() * x.element_size() < _SMALL:
        return f"less than {_SMALL >> 20} MiB, where launches may cost more than the work"
    return why_not_dense(x, TYPES, "float32, bfloat16 and float16", "the GPU kernels")
