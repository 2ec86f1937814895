"""The cut of a tensor for the GPU: every value once, sizes as Triton wants them, no more programs than run at once."""

from __future__ import annotations

from itertools import product

import pytest

from batchnorm.kernels.gpu import plan as gpu_plan
from batchnorm.kernels.gpu.plan import plan, power_of_two, resident, rounds

SHAPES = [
    *((slices, channels, 1) for slices, channels in product((1, 2, 13, 100, 65536, 802_816), (1, 3, 64, 1000))),
    *(
        (64, 64, 12544),
        (64, 512, 49),
        (3, 5, 72),
        (1, 1, 7),
        (2, 70_000, 4),
        (256, 256, 196),
        (2, 3, 2048),
        (5, 7, 2049),
    ),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_parts_hold_every_place_once_and_none_is_empty(slices: int, channels: int, span: int, size: int) -> None:
    cut = plan(slices, channels, span, size, 132)
    assert (cut.parts - 1) * cut.part_places < cut.places <= cut.parts * cut.part_places
    assert (cut.blocks - 1) * cut.tile_channels < channels <= cut.blocks * cut.tile_channels
    assert cut.part_places % cut.tile_values == 0
    assert cut.programs == cut.parts * cut.blocks
    assert cut.values == slices * span


@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_slices_are_pitched_apart_or_longer_than_a_tile(slices: int, channels: int, span: int) -> None:
    cut = plan(slices, channels, span, 4, 132)
    if cut.pitch:
        assert cut.pitch == power_of_two(span)
        assert cut.tile_values % cut.pitch == 0
        assert cut.places == slices * cut.pitch
    else:
        assert span >= cut.tile_values
        assert cut.places == cut.values


@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_tiles_are_powers_of_two_and_fit(slices: int, channels: int, span: int) -> None:
    cut = plan(slices, channels, span, 4, 132)
    constants = cut.constants
    assert all(power_of_two(constants[name]) == constants[name] for name in ("TILE_VALUES", "TILE_CHANNELS", "ROWS"))
    assert cut.tile_values * cut.tile_channels <= gpu_plan.TILE
    assert constants["ROWS"] * cut.tile_channels <= gpu_plan.MERGED_AT_ONCE
    assert cut.tile_channels == 1 or span == 1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_a_load_takes_what_divides_all_that_lies_side_by_side(slices: int, channels: int, span: int, size: int) -> None:
    unit = plan(slices, channels, span, size, 132).unit
    run = channels if span == 1 else span
    assert run % unit == 0
    assert unit * size <= 16
    assert unit * size == 16 or run % (2 * unit)


@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_parts_are_shared_out_only_to_fill_the_device(slices: int, channels: int, span: int) -> None:
    cut = plan(slices, channels, span, 4, 132)
    assert cut.parts <= gpu_plan.MOST_PARTS
    assert cut.parts == 1 or cut.programs <= gpu_plan.PROGRAMS_EACH * 132


def test_few_parts_are_merged_by_the_second_pass_and_many_by_a_launch() -> None:
    assert plan(256, 256, 3136, 2, 132).merged_inside
    many = plan(256 * 3136, 64, 1, 2, 132)
    assert not many.merged_inside
    assert many.merging.parts == many.parts
    assert many.merging.blocks * gpu_plan.MERGED_CHANNELS == 64


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("tensors", [1, 2, 4])
@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_registers_hold_a_whole_tensor_or_none(
    slices: int, channels: int, span: int, tensors: int, together: bool
) -> None:
    cut = resident(slices, channels, span, 4, 132, tensors, together)
    if cut is None:
        return
    assert cut.part_places == cut.tile_values
    assert cut.parts * cut.tile_values >= cut.places
    assert cut.tile_values * cut.tile_channels * tensors <= 32 * cut.warps * gpu_plan.HELD
    assert cut.warps <= gpu_plan.MOST_WARPS
    if cut.parts > 1:
        assert together
        assert cut.programs * cut.warps <= 132 * gpu_plan.MOST_WARPS  # all of them run at once


def test_registers_hold_what_they_can_and_keep_all_processors_busy() -> None:
    assert resident(256, 512, 49, 2, 132, 1, False) is not None
    assert resident(256, 512, 49, 2, 132, 2, True) is None  # neither whole channels nor all parts at once
    assert resident(64, 512, 49, 2, 132, 4, False) is not None
    assert resident(256, 512, 3136, 2, 132, 1, True) is None  # too many values
    assert resident(256, 32, 49, 2, 132, 1, False) is None  # too few channels
    assert resident(256, 32, 49, 2, 132, 1, True).parts > 1  # whose parts keep the processors busy
    assert resident(64 * 196, 128, 1, 2, 132, 1, True).parts > 1


def test_positions_have_64_bits_only_where_32_do_not_reach() -> None:
    assert not plan(2**19, 1024, 1, 2, 132).wide
    assert plan(2**21, 1024, 1, 2, 132).wide
    assert plan(2**31 - 1, 1, 1, 2, 132).wide
    assert plan(1, 1, 2**31 - 1, 2, 132).wide
    assert plan(2**26, 1, 17, 2, 132).wide  # for the places, which are almost twice as many


@pytest.mark.parametrize("tensors", [1, 2, 3])
@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_groups_take_every_block_and_the_cache_holds_what_they_are_at(
    slices: int, channels: int, span: int, tensors: int
) -> None:
    cache = 50 << 20
    cut = rounds(slices, channels, span, 4, 132, cache, tensors)
    block_bytes = slices * span * (1 if span > 1 else min(power_of_two(channels), 16)) * 4 * tensors
    if cut is None:
        assert 2 * block_bytes > cache // gpu_plan.CACHED
        return
    assert min(cut.blocks, 2) <= cut.groups <= cut.blocks
    assert cut.groups * block_bytes <= cache // gpu_plan.CACHED
    assert cut.programs <= gpu_plan.PROGRAMS_TOGETHER * 132  # all of them run at once
    assert cut.registers * 32 * cut.warps * gpu_plan.PROGRAMS_TOGETHER <= 65536


def test_what_the_cache_does_not_hold_is_not_taken_in_turn() -> None:
    assert rounds(256, 64, 3136, 2, 132, 50 << 20, 1).groups > 1
    assert rounds(256 * 3136, 64, 1, 2, 132, 50 << 20, 1) is None
    assert rounds(256 * 196, 256, 1, 2, 132, 50 << 20, 2).groups > 1
