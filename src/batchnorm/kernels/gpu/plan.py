"""Which tensors the GPU kernels are for, and how a tensor is cut into tiles. Knows no Triton.

Every layout is one of N·C slices of S neighbours: value s of slice n of channel c lies at n·C·S + c·S + s. Contiguous
(N, C, *) is so by itself; channels_last and (N, C) are with S = 1 and N·S slices. A tile is `tile_values` places ×
`tile_channels`. The places of a channel are numbered so that where they lie costs no division for each of them:

    pitch = 0    S is at least a tile: places are the m values, and a tile meets two slices at most
    pitch > 0    S is less: each slice has `pitch` places, the least power of two that is no less than S

One program takes `part_places` places of `tile_channels` channels, tile by tile; `parts` programs share a channel, and
their sums are merged in the order of the parts.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from batchnorm.kernels.layout import CHANNELS_LAST

TILE = 2048
"""Places of a tile: 16 a thread, so that some loads of 16 bytes are under way at once."""

WARPS = 4
STAGES = 1
"""Tiles of a pass over memory that are under way at once, by way of shared memory; with 1, none is."""

OPTIONS = {"enable_fp_fusion": True}
"""Of every launch. Forward and backward contract z's product and sum alike, so that they see the same z."""

RUN_BYTES = 64
"""Neighbouring channels of one value that a tile takes, where channels lie side by side: two sectors of memory."""

PROGRAMS_EACH = 6
"""Programs for each multiprocessor: enough to hide the memory's latency, few enough that all run at once."""

MOST_PARTS = 1024

MERGED_INSIDE = 1024
"""Parts × channels that every program of the second pass merges by itself; more are merged once, by a launch."""

MERGED_AT_ONCE = 1024
"""Parts × channels that are merged at a time: 8 a thread."""

MERGED_CHANNELS = 4
"""Channels that a program of that launch merges."""

LOAD_BYTES = 16

CACHED = 4
"""The part of the L2, its reciprocal, that is counted on: what is written goes through it as well."""

PROGRAMS_TOGETHER = 3
"""Programs for each multiprocessor, where groups of them take the channels in turn; all of them run at once."""

LANES, HELD = 32, 32
"""Threads of a warp, and the values, of all tensors together, that a thread holds."""

MOST_WARPS = 16
"""Of one multiprocessor, where the whole tensor is held: 128 registers a thread."""

REGISTERS, MOST_REGISTERS = 1 << 16, 255
"""Of a multiprocessor, and the most of a thread."""


@dataclass(frozen=True)
class Cut:
    """How channels are cut into parts, the programs of one pass over the tensor; `wide`: positions need 64 bits.

    `unit` divides the length of what lies side by side, up to what one load takes. Programs stand in `groups`, each of
    which takes some blocks of channels, one after the other; 0 where each takes one. `crowd` is how many warps share a
    multiprocessor where all programs run at once, 0 where they need not.
    """

    values: int
    places: int
    channels: int
    span: int
    pitch: int
    unit: int
    tile_values: int
    tile_channels: int
    part_places: int
    wide: bool
    warps: int = WARPS
    groups: int = 0
    crowd: int = 0

    @cached_property
    def parts(self) -> int:
        return ceil(self.places, self.part_places)

    @cached_property
    def blocks(self) -> int:
        """The groups of channels that programs take."""
        return ceil(self.channels, self.tile_channels)

    @cached_property
    def programs(self) -> int:
        """Parts side by side, then the next channels."""
        return self.parts * (self.groups or self.blocks)

    @cached_property
    def merged_inside(self) -> bool:
        """Whether the programs of the second pass merge the parts."""
        return self.parts * self.tile_channels <= MERGED_INSIDE

    @cached_property
    def merging(self) -> Cut:
        """The same parts, in the hands of programs that merge them."""
        return replace(self, tile_channels=MERGED_CHANNELS)

    @cached_property
    def registers(self) -> int:
        """What a thread may have of them where a crowd shares them, in steps of 8."""
        return min(MOST_REGISTERS, REGISTERS // (LANES * self.crowd) // 8 * 8)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """What every launch is told, in the kernels' order."""
        return self.values, self.places, self.channels, self.span, self.parts, self.part_places

    @cached_property
    def constants(self) -> dict[str, int | bool]:
        """What every kernel is compiled for; ROWS is how many parts it merges at a time."""
        return {
            "PITCH": self.pitch,
            "UNIT": self.unit,
            "ROWS": min(power_of_two(self.parts), max(1, MERGED_AT_ONCE // self.tile_channels)),
            "TILE_VALUES": self.tile_values,
            "TILE_CHANNELS": self.tile_channels,
            "WIDE": self.wide,
        }


@lru_cache(maxsize=4096)
def plan(slices: int, channels: int, span: int, size: int, processors: int) -> Cut:
    """The cut of slices × channels × span values of `size` bytes, for so many multiprocessors."""
    tile_channels = _side_by_side(channels, span, size)
    tile_values = min(TILE // tile_channels, power_of_two(slices * power_of_two(span)))
    wanted = max(1, min(MOST_PARTS, PROGRAMS_EACH * processors // ceil(channels, tile_channels)))
    tiles = ceil(_places(slices, span, tile_values), tile_values)
    return _cut(slices, channels, span, size, tile_values, tile_channels, ceil(tiles, wanted), WARPS)


@lru_cache(maxsize=4096)
def resident(
    slices: int, channels: int, span: int, size: int, processors: int, tensors: int, together: bool
) -> Cut | None:
    """A tile for each part, such that registers hold the whole tensor at once; None where they do not.

    A channel of several parts needs programs that run `together`; those of whole channels run in any order. `tensors`
    is a power of two: how many of x's size are held, or the next one.
    """
    tile_channels = _side_by_side(channels, span, size)
    most = power_of_two(slices * power_of_two(span))
    for warps in (4, 8, 16):
        tile_values = min(most, LANES * warps * HELD // (tensors * tile_channels))
        if tile_values == 0:
            continue
        cut = _cut(slices, channels, span, size, tile_values, tile_channels, 1, warps, crowd=MOST_WARPS)
        busy, at_once = 2 * cut.programs >= processors, cut.programs <= processors * (MOST_WARPS // warps)
        if busy and not cut.wide and (cut.parts == 1 or (together and at_once and cut.parts <= MOST_PARTS)):
            return cut
    return None


@lru_cache(maxsize=4096)
def rounds(
    slices: int, channels: int, span: int, size: int, processors: int, cache_bytes: int, tensors: int
) -> Cut | None:
    """The cut into groups of programs, such that the L2 holds the blocks that they are at, `tensors` of x's size each.

    None where it does not hold two of several: while one group waits, another is to work.
    """
    tile_channels = _side_by_side(channels, span, size)
    tile_values = min(TILE // tile_channels, power_of_two(slices * power_of_two(span)))
    blocks, programs = ceil(channels, tile_channels), PROGRAMS_TOGETHER * processors
    held = cache_bytes // CACHED // (slices * span * tile_channels * size * tensors)
    if held < min(blocks, 2):
        return None
    turns = ceil(blocks, min(blocks, held, programs))
    groups = ceil(blocks, turns)
    tiles = ceil(_places(slices, span, tile_values), tile_values)
    each, crowd = ceil(tiles, programs // groups), WARPS * PROGRAMS_TOGETHER
    cut = _cut(slices, channels, span, size, tile_values, tile_channels, each, WARPS, groups, crowd)
    return cut if cut.parts <= MOST_PARTS else None


def _cut(
    slices: int,
    channels: int,
    span: int,
    size: int,
    tile_values: int,
    tile_channels: int,
    tiles: int,
    warps: int,
    groups: int = 0,
    crowd: int = 0,
) -> Cut:
    places, values = _places(slices, span, tile_values), slices * span
    return Cut(
        values=values,
        places=places,
        channels=channels,
        span=span,
        pitch=_pitch(span, tile_values),
        unit=math.gcd(channels if span == 1 else span, LOAD_BYTES // size),
        tile_values=tile_values,
        tile_channels=tile_channels,
        part_places=tiles * tile_values,
        wide=(max(values, places) + tile_values) * power_of_two(channels) >= 2**31,
        warps=warps,
        groups=groups,
        crowd=crowd,
    )


def _pitch(span: int, tile_values: int) -> int:
    return 0 if span > 1 and tile_values <= span else power_of_two(span)


def _places(slices: int, span: int, tile_values: int) -> int:
    return slices * (_pitch(span, tile_values) or span)


def _side_by_side(channels: int, span: int, size: int) -> int:
    return 1 if span > 1 else min(power_of_two(channels), max(1, RUN_BYTES // size))


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


def ceil(number: int, divisor: int) -> int:
    """number/divisor, rounded up."""
    return -(-number // divisor)


TYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

# A launch from Python takes a while, which only large tensors hide. From which size on is for a GPU to tell: until then
# the kernels keep to what they are made for.
_SMALL = 8 << 20  # bytes


ASKED_FOR = os.environ.get("BATCHNORM_GPU_KERNELS") == "1"
"""Whether they are to be used. No GPU has run them yet: until one has, nobody gets them unasked."""

_TRITON_IS_THERE = find_spec("triton") is not None


def uncovered(x: Tensor, training: bool, fused: bool, tapped: bool = False) -> str | None:
    """Why the GPU kernels are not for this CUDA tensor, or None where they are."""
    if not ASKED_FOR:
        return "the GPU kernels have not run on a GPU yet: set BATCHNORM_GPU_KERNELS=1 before the start to try them"
    if not _TRITON_IS_THERE:
        return "Triton, which the GPU kernels are written in, is not installed: pip install triton"
    if not (training or fused or tapped):
        return "inference without an activation or a residual is one pass over memory by either"
    if not tapped and x.numel() * x.element_size() < _SMALL:
        return f"less than {_SMALL >> 20} MiB, where launches may cost more than the work"
    if x.dtype not in TYPES:
        return f"the GPU kernels are for float32, bfloat16 and float16, not {x.dtype}"
    if x.layout != torch.strided or x.dim() < 2:
        return "the GPU kernels are for dense tensors (N, C, *)"
    last = CHANNELS_LAST.get(x.dim())
    if not x.is_contiguous() and (last is None or not x.is_contiguous(memory_format=last)):
        return "the tensor is neither contiguous nor channels_last, and a copy would cost what the kernels save"
    return None
