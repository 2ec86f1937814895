"""How a tensor is cut into tiles for the GPU kernels. Knows no Triton.

Every layout is one of m·C values: value i of channel c lies at (i // S)·C·S + c·S + i % S. Contiguous (N, C, *) has
m = N·S values a channel in slices of S neighbours; channels_last and (N, C) are the same with S = 1. A tile is
`tile_values` × `tile_channels` of them. One program takes `part_values` values of `tile_channels` channels, tile by
tile; `parts` programs share a channel, and their sums are merged in the order of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

TILE = 2048
"""Values of a tile: 16 a thread, so that some loads of 16 bytes are under way at once."""

WARPS = 4
OPTIONS = {"enable_fp_fusion": True}
"""Of every launch. Forward and backward contract z's product and sum alike, so that they see the same z."""

RUN_BYTES = 64
"""Neighbouring channels of one value that a tile takes, where channels lie side by side: two sectors of memory."""

PROGRAMS_EACH = 4
"""Programs for each multiprocessor: enough to hide the memory's latency, few enough that all run at once."""

MOST_PARTS = 128
"""Every program of the second pass merges all parts of its channels."""

HELD = 32
"""Values, of all tensors together, that a thread holds: each comes with its position, so that twice as many spill."""

MOST_WARPS = 16


@dataclass(frozen=True, slots=True)
class Resident:
    """Tiles that hold all values of their channels, and the warps that hold a tile."""

    tile_values: int
    tile_channels: int
    blocks: int
    warps: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The cut of one shape; `wide` where positions need 64 bits."""

    values: int
    channels: int
    span: int
    tile_values: int
    tile_channels: int
    part_values: int
    parts: int
    wide: bool

    @property
    def programs(self) -> int:
        """Programs of one pass over the tensor: parts side by side, then the next channels."""
        return self.parts * self.blocks

    @property
    def blocks(self) -> int:
        """Programs of a pass over the channels."""
        return _ceil(self.channels, self.tile_channels)

    @property
    def padded_parts(self) -> int:
        """A power of two that holds all parts, as Triton's tiles must be."""
        return power_of_two(self.parts)


@lru_cache(maxsize=4096)
def plan(values: int, channels: int, span: int, size: int, processors: int) -> Plan:
    """The cut of `channels` × `values` of `size` bytes, in slices of `span`, for so many multiprocessors."""
    tile_channels = _side_by_side(channels, span, size)
    tile_values = min(TILE // tile_channels, power_of_two(values))
    blocks = _ceil(channels, tile_channels)
    wanted = max(1, min(MOST_PARTS, PROGRAMS_EACH * processors // blocks))
    part_values = _ceil(_ceil(values, wanted), tile_values) * tile_values
    wide = _wide(values, channels)
    return Plan(values, channels, span, tile_values, tile_channels, part_values, _ceil(values, part_values), wide)


@lru_cache(maxsize=4096)
def resident(values: int, channels: int, span: int, size: int, processors: int, tensors: int) -> Resident | None:
    """Tiles of whole channels; None where registers do not hold them, or processors would be idle.

    `tensors` is a power of two: how many of x's size are read, or the next one.
    """
    tile_channels, tile_values = _side_by_side(channels, span, size), power_of_two(values)
    blocks, held = _ceil(channels, tile_channels), tile_values * tile_channels * tensors
    if held > 32 * MOST_WARPS * HELD or 2 * blocks < processors or _wide(values, channels):
        return None
    return Resident(tile_values, tile_channels, blocks, max(WARPS, held // (32 * HELD)))


def _side_by_side(channels: int, span: int, size: int) -> int:
    return 1 if span > 1 else min(power_of_two(channels), max(1, RUN_BYTES // size))


def _wide(values: int, channels: int) -> bool:
    return (values + TILE) * power_of_two(channels) >= 2**31


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
