"""The loops that measure: every byte is copied and none beside them, by both kinds of stores; every value is read."""

from __future__ import annotations

import random

import numpy as np
import pytest

from batchnorm.kernels.cpu import copying
from randomness import SEED

SIZES = (0, 1, 63, 64, 65, 255, 256, 1000, 100_003, 3_000_001)


@pytest.mark.parametrize("nontemporal", [False, True], ids=["ordinary", "non-temporal"])
@pytest.mark.parametrize("size", SIZES)
def test_a_copy_has_every_byte_at_any_address(size: int, nontemporal: bool) -> None:
    draw = np.random.default_rng(SEED)
    for source_offset in (0, 1, 7, 64):
        for target_offset in (0, 3, 63, 64):
            source = draw.integers(0, 256, size + 200, dtype=np.uint8)
            target = np.zeros(size + 200, dtype=np.uint8)
            copying.copy(source.ctypes.data + source_offset, target.ctypes.data + target_offset, size, nontemporal)
            end = target_offset + size
            assert np.array_equal(target[target_offset:end], source[source_offset : source_offset + size]), SEED
            assert not target[:target_offset].any()
            assert not target[end:].any()


def test_every_value_is_read_as_often_as_asked() -> None:
    draw = random.Random(SEED)
    values = np.random.default_rng(SEED).integers(-1000, 1000, 8 * 3000)
    for _ in range(50):
        lines, piece, repeats = draw.randint(1, 3000), draw.randint(1, 700), draw.randint(1, 3)
        arguments = (values.ctypes.data, 0, copying.LINE * lines, copying.LINE * piece, repeats)
        assert copying.run(copying.READ, *arguments) == repeats * values[: 8 * lines].sum(), SEED


def test_only_one_of_the_copies_has_non_temporal_stores() -> None:
    ordinary, past_caches, reading = copying.assembly().split("define internal")[1:]
    assert past_caches.count("store") == past_caches.count("!nontemporal") == 5
    assert ordinary.count("store") == 5
    assert "!nontemporal" not in ordinary + reading


def test_a_negative_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="size must be 0 or more, got -1"):
        copying.copy(0, 0, -1, nontemporal=False)


def test_nothing_is_touched_for_no_bytes() -> None:
    copying.copy(0, 0, 0, nontemporal=True)
    assert copying.run(copying.READ, 0, 0, 0, copying.LINE) == 0
