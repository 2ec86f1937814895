"""The floor, counted by hand in tensors read and written."""

import pytest

from batchnorm.bench.cases import EVERY, Case, Copies, copies, gigabytes_per_second, tile_bytes

LARGE, SMALL = 1 << 40, 0


@pytest.mark.parametrize(
    ("variant", "mode", "cache", "forward", "backward"),
    [
        # tensors:             forward              backward
        ("bn", "eval", LARGE, "x y", ""),
        ("bn+relu", "eval", SMALL, "x y", ""),
        ("bn+add+relu", "eval", LARGE, "x residual y", ""),
        ("bn", "train", LARGE, "x y", "x g dx"),
        ("bn+relu", "train", LARGE, "x y", "x g dx"),
        ("bn+silu", "train", LARGE, "x y", "x g dx"),
        ("bn+add+relu", "train", LARGE, "x residual y", "x g y dx dresidual"),
        ("bn+relu", "train", SMALL, "x x y", "x g x g dx"),
        ("bn+add+relu", "train", SMALL, "x x residual y", "x g y dresidual x dresidual dx"),
    ],
)
def test_copies_are_half_the_tensors_that_move(variant, mode, cache, forward, backward):
    case = Case((64, 64, 112, 112), "channels_last", "float32", variant, mode)
    assert copies(case, cache) == Copies(len(forward.split()) / 2, len(backward.split()) / 2)


def test_the_figures_of_the_design():
    case = Case((64, 64, 112, 112), "contiguous")
    assert copies(case, 32 << 20).whole == 2.5
    assert copies(case, 8 << 20).whole == 2.5
    assert copies(case, 4 << 20) == Copies(1.0, 2.5), "x alone fits, x and g do not"
    assert copies(case, 1 << 20).whole == 4.0
    assert copies(Case((32, 64, 56, 56), "contiguous"), 1 << 20).whole == 2.5
    assert copies(Case((32, 64, 56, 56), "channels_last"), 1 << 20).whole == 4.0


def test_a_tile_is_a_channel_or_a_cache_line_of_them():
    assert tile_bytes(Case((2, 6, 4, 5), "contiguous")) == 40 * 4
    assert tile_bytes(Case((2, 6, 4, 5), "contiguous", "bfloat16")) == 40 * 2
    assert tile_bytes(Case((2, 6, 4, 5), "channels_last")) == 40 * 64
    assert tile_bytes(Case((2, 6, 4, 5), "channels_last", "bfloat16")) == 40 * 64
    assert tile_bytes(Case((9, 6), "rows")) == 9 * 64


def test_a_smaller_cache_never_lowers_the_floor():
    for case in EVERY:
        assert copies(case, LARGE).whole <= copies(case, SMALL).whole


def test_gigabytes_count_reading_and_writing():
    assert gigabytes_per_second(Case((1000, 250), "rows"), 2.5, 1e-3) == pytest.approx(5.0)
