"""The cut of a tensor for the GPU: every value once, sizes as Triton wants them, no more programs than run at once."""

from __future__ import annotations

from itertools import product

import pytest

from batchnorm.kernels import gpu_plan
from batchnorm.kernels.gpu_plan import plan, resident

SHAPES = [
    *((values, channels, 1) for values, channels in product((1, 2, 13, 100, 65536, 802_816), (1, 3, 64, 1000))),
    *((n * s, c, s) for n, c, s in ((64, 64, 12544), (64, 512, 49), (3, 5, 72), (1, 1, 7), (2, 70_000, 4))),
]


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("values", "channels", "span"), SHAPES)
def test_parts_hold_every_value_once_and_none_is_empty(values: int, channels: int, span: int, size: int) -> None:
    cut = plan(values, channels, span, size, 132)
    assert (cut.parts - 1) * cut.part_values < values <= cut.parts * cut.part_values
    assert (cut.blocks - 1) * cut.tile_channels < channels <= cut.blocks * cut.tile_channels
    assert cut.part_values % cut.tile_values == 0
    assert cut.programs == cut.parts * cut.blocks


@pytest.mark.parametrize(("values", "channels", "span"), SHAPES)
def test_tiles_are_powers_of_two_and_fit(values: int, channels: int, span: int) -> None:
    cut = plan(values, channels, span, 4, 132)
    assert all(map(is_power_of_two, (cut.tile_values, cut.tile_channels, cut.padded_parts)))
    assert cut.tile_values * cut.tile_channels <= gpu_plan.TILE
    assert cut.padded_parts >= cut.parts
    assert cut.tile_channels == 1 or span == 1


@pytest.mark.parametrize(("values", "channels", "span"), SHAPES)
def test_parts_are_shared_out_only_to_fill_the_device(values: int, channels: int, span: int) -> None:
    cut = plan(values, channels, span, 4, 132)
    assert cut.parts <= gpu_plan.MOST_PARTS
    assert cut.parts == 1 or cut.programs <= gpu_plan.PROGRAMS_EACH * 132


@pytest.mark.parametrize("tensors", [1, 2, 4])
@pytest.mark.parametrize(("values", "channels", "span"), SHAPES)
def test_registers_hold_whole_channels_or_none(values: int, channels: int, span: int, tensors: int) -> None:
    held = resident(values, channels, span, 4, 132, tensors)
    if held is None:
        return
    assert held.tile_values >= values
    assert held.tile_values * held.tile_channels * tensors <= 32 * held.warps * gpu_plan.HELD
    assert held.blocks * held.tile_channels >= channels
    assert is_power_of_two(held.warps)
    assert held.warps <= gpu_plan.MOST_WARPS


def test_registers_hold_what_they_can_and_keep_all_processors_busy() -> None:
    assert resident(256 * 49, 512, 49, 2, 132, 1) is not None
    assert resident(256 * 49, 512, 49, 2, 132, 2) is None
    assert resident(64 * 49, 512, 49, 2, 132, 4) is not None
    assert resident(256 * 3136, 512, 3136, 2, 132, 1) is None  # too many values
    assert resident(256 * 49, 32, 49, 2, 132, 1) is None  # too few channels


def test_positions_have_64_bits_only_where_32_do_not_reach() -> None:
    assert not plan(2**19, 1024, 1, 2, 132).wide
    assert plan(2**21, 1024, 1, 2, 132).wide
    assert plan(2**31 - 1, 1, 1, 2, 132).wide
