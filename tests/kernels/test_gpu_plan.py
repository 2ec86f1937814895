"""Tilings of a tensor for the GPU: every value once, sizes as Triton needs them, no more programs than run at once."""

from __future__ import annotations

from itertools import product

import pytest

from batchnorm.kernels.gpu import plan as gpu_plan
from batchnorm.kernels.gpu.plan import plan_passes, plan_resident, plan_rounds, power_of_two

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
def test_parts_cover_every_position_once_and_have_no_empty_part(
    slices: int, channels: int, span: int, size: int
) -> None:
    tiling = plan_passes(slices, channels, span, size, 132)
    assert (tiling.parts - 1) * tiling.part_positions < tiling.positions <= tiling.parts * tiling.part_positions
    assert (tiling.blocks - 1) * tiling.tile_channels < channels <= tiling.blocks * tiling.tile_channels
    assert tiling.part_positions % tiling.tile_values == 0
    assert tiling.programs == tiling.parts * tiling.blocks
    assert tiling.values == slices * span


@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_slices_are_pitched_apart_or_longer_than_a_tile(slices: int, channels: int, span: int) -> None:
    tiling = plan_passes(slices, channels, span, 4, 132)
    if tiling.pitch:
        assert tiling.pitch == power_of_two(span)
        assert tiling.tile_values % tiling.pitch == 0
        assert tiling.positions == slices * tiling.pitch
    else:
        assert span >= tiling.tile_values
        assert tiling.positions == tiling.values


@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_tiles_are_powers_of_two_and_fit(slices: int, channels: int, span: int) -> None:
    tiling = plan_passes(slices, channels, span, 4, 132)
    constants = tiling.constants
    assert all(
        power_of_two(constants[name]) == constants[name] for name in ("TILE_VALUES", "TILE_CHANNELS", "TILE_PARTS")
    )
    assert tiling.tile_values * tiling.tile_channels <= gpu_plan.TILE_SIZE
    assert constants["TILE_PARTS"] * tiling.tile_channels <= gpu_plan.MERGE_TILE_SIZE
    assert tiling.tile_channels == 1 or span == 1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_a_load_takes_what_divides_all_that_lies_side_by_side(slices: int, channels: int, span: int, size: int) -> None:
    alignment = plan_passes(slices, channels, span, size, 132).alignment
    run = channels if span == 1 else span
    assert run % alignment == 0
    assert alignment * size <= 16
    assert alignment * size == 16 or run % (2 * alignment)


@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_parts_are_shared_out_only_to_fill_the_device(slices: int, channels: int, span: int) -> None:
    tiling = plan_passes(slices, channels, span, 4, 132)
    assert tiling.parts <= gpu_plan.MAX_PARTS
    assert tiling.parts == 1 or tiling.programs <= gpu_plan.PROGRAMS_PER_SM * 132


def test_few_parts_are_merged_by_the_second_pass_and_many_by_a_launch() -> None:
    assert plan_passes(256, 256, 3136, 2, 132).merges_inline
    many = plan_passes(256 * 3136, 64, 1, 2, 132)
    assert not many.merges_inline
    assert many.merging.parts == many.parts
    assert many.merging.blocks * gpu_plan.MERGE_CHANNELS == 64


@pytest.mark.parametrize("cooperative", [True, False])
@pytest.mark.parametrize("tensors", [1, 2, 4])
@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_registers_hold_a_whole_tensor_or_none(
    slices: int, channels: int, span: int, tensors: int, cooperative: bool
) -> None:
    tiling = plan_resident(slices, channels, span, 4, 132, tensors, cooperative)
    if tiling is None:
        return
    assert tiling.part_positions == tiling.tile_values
    assert tiling.parts * tiling.tile_values >= tiling.positions
    assert tiling.tile_values * tiling.tile_channels * tensors <= 32 * tiling.warps * gpu_plan.VALUES_PER_THREAD
    assert tiling.warps <= gpu_plan.MAX_WARPS_PER_SM
    if tiling.parts > 1:
        assert cooperative
        assert tiling.programs * tiling.warps <= 132 * gpu_plan.MAX_WARPS_PER_SM  # all of them run at once


def test_registers_hold_what_they_can_and_keep_all_processors_busy() -> None:
    assert plan_resident(256, 512, 49, 2, 132, 1, False) is not None
    assert plan_resident(256, 512, 49, 2, 132, 2, True) is None  # neither whole channels nor all parts at once
    assert plan_resident(64, 512, 49, 2, 132, 4, False) is not None
    assert plan_resident(256, 512, 3136, 2, 132, 1, True) is None  # too many values
    assert plan_resident(256, 32, 49, 2, 132, 1, False) is None  # too few channels
    assert plan_resident(256, 32, 49, 2, 132, 1, True).parts > 1  # whose parts keep the processors busy
    assert plan_resident(64 * 196, 128, 1, 2, 132, 1, True).parts > 1


def test_positions_have_64_bits_only_where_32_do_not_reach() -> None:
    assert not plan_passes(2**19, 1024, 1, 2, 132).int64
    assert plan_passes(2**21, 1024, 1, 2, 132).int64
    assert plan_passes(2**31 - 1, 1, 1, 2, 132).int64
    assert plan_passes(1, 1, 2**31 - 1, 2, 132).int64
    assert plan_passes(2**26, 1, 17, 2, 132).int64  # for the positions, which are almost twice as many


@pytest.mark.parametrize("tensors", [1, 2, 3])
@pytest.mark.parametrize(("slices", "channels", "span"), SHAPES)
def test_groups_take_every_block_and_the_cache_holds_what_they_are_at(
    slices: int, channels: int, span: int, tensors: int
) -> None:
    cache = 50 << 20
    tiling = plan_rounds(slices, channels, span, 4, 132, cache, tensors)
    block_bytes = slices * span * (1 if span > 1 else min(power_of_two(channels), 16)) * 4 * tensors
    if tiling is None:
        assert 2 * block_bytes > cache // gpu_plan.L2_DIVISOR
        return
    assert min(tiling.blocks, 2) <= tiling.groups <= tiling.blocks
    assert tiling.groups * block_bytes <= cache // gpu_plan.L2_DIVISOR
    assert tiling.programs <= gpu_plan.COOPERATIVE_PROGRAMS_PER_SM * 132  # all of them run at once
    assert tiling.registers * 32 * tiling.warps * gpu_plan.COOPERATIVE_PROGRAMS_PER_SM <= 65536


def test_what_the_cache_does_not_hold_is_not_taken_in_turn() -> None:
    assert plan_rounds(256, 64, 3136, 2, 132, 50 << 20, 1).groups > 1
    assert plan_rounds(256 * 3136, 64, 1, 2, 132, 50 << 20, 1) is None
    assert plan_rounds(256 * 196, 256, 1, 2, 132, 50 << 20, 2).groups > 1
