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

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""Of every launch. Forward and backward contract z's product and sum alike, so that they see the same z."""

RUN_BYTES = 64
"""Neighbouring channels of one value that a tile takes, where channels lie side by side: two sectors of memory."""

PROGRAMS_EACH = 4
"""Programs for each multiprocessor: enough to hide the memory's latency, few enough that all run at once."""

MOST_PARTS = 128
"""Every program of the second pass merges all parts of its channels."""


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
    tile_channels = 1 if span > 1 else min(power_of_two(channels), max(1, RUN_BYTES // size))
    tile_values = min(TILE // tile_channels, power_of_two(values))
    blocks = _ceil(channels, tile_channels)
    wanted = max(1, min(MOST_PARTS, PROGRAMS_EACH * processors // blocks))
    part_values = _ceil(_ceil(values, wanted), tile_values) * tile_values
    wide = values * channels + TILE * tile_channels >= 2**31
    return Plan(values, channels, span, tile_values, tile_channels, part_values, _ceil(values, part_values), wide)


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
