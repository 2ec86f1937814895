"""The cutting of a tensor into tiles: every value in exactly one, none too large for the cache it is meant for."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest

from batchnorm.kernels.cpu import plan as cpu_plan
from batchnorm.kernels.cpu import system
from batchnorm.kernels.cpu.plan import FIELD, Job, Matrix, Plan, Tiling, exceeds_caches, plan
from randomness import SEED


@pytest.fixture(autouse=True)
def _forget_plans() -> None:
    plan.cache_clear()


def random_plans(count: int) -> list[tuple[tuple[int, int, int, int, int], Plan]]:
    draw = random.Random(SEED)
    shapes = []
    for _ in range(count):
        span = draw.choice([1, 1, 2, 7, 49, 63, 64, 196, 3136, 50176])
        shapes.append((draw.randint(1, 4000), draw.randint(1, 2048), span, draw.choice([2, 4, 8]), draw.randint(1, 64)))
    return [(shape, plan(*shape)) for shape in shapes]


def covered(shape: Matrix, tiling: Tiling) -> bool:
    """Whether the tiles, numbered as the loops number them, cover each row of each channel once."""
    across = -(-shape.channels // tiling.tile_channels)
    down = -(-shape.rows // tiling.tile_rows)
    return tiling.tiles == across * down and tiling.parts == down and tiling.tile_rows >= 1 <= tiling.tile_channels


def test_every_tiling_covers_the_matrix_once() -> None:
    for shape, planned in random_plans(2000):
        rows, channels, span, *_ = shape
        m = planned.matrix
        assert m.rows * m.fold == rows, (SEED, shape)
        assert (m.channels, m.span) == (channels, span)
        for tiling in (planned.streamed, planned.channels, *filter(None, planned.resident)):
            assert covered(m, tiling), (SEED, shape, tiling)


def test_a_tile_for_one_pass_has_all_rows_and_fits_in_the_threads_share_of_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_plan, "last_level_bytes", lambda: 32 << 20)
    found = 0
    for shape, planned in random_plans(2000):
        m, threads = planned.matrix, shape[-1]
        for tensors, tiling in enumerate(planned.resident):
            if tiling is not None:
                found += 1
                tile_bytes = tensors * m.rows * tiling.tile_channels * m.span * m.size
                assert tiling.parts == 1
                assert tile_bytes <= max((24 << 20) // threads, 1 << 19), (SEED, shape, tiling)
    assert found > 100


def test_what_is_done_a_channel_at_a_time_has_tiles_of_all_rows() -> None:
    assert all(planned.channels.parts == 1 for _, planned in random_plans(200))


def test_partial_sums_stay_small_beside_the_tensor() -> None:
    for shape, planned in random_plans(2000):
        m, threads = planned.matrix, shape[-1]
        tensor = m.rows * m.row_bytes
        if tensor > 1 << 20 and m.rows > 64 * threads:
            assert planned.streamed.parts * 3 * m.cells * 8 <= tensor, (SEED, shape, planned.streamed)


def test_narrow_rows_are_folded_where_their_number_divides() -> None:
    assert plan(4096, 16, 1, 4, 2).matrix == Matrix(512, 16, 1, 8, 4)
    assert plan(4099, 16, 1, 4, 2).matrix.fold == 1, "4099 is prime"
    assert plan(4096, 256, 1, 4, 2).matrix.fold == 1
    assert plan(4096, 16, 49, 4, 2).matrix.fold == 1, "a slice is not split"


def test_a_tensor_larger_than_the_cache_is_written_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_plan, "last_level_bytes", lambda: 32 << 20)
    small, large = plan(64, 512, 49, 4, 2).matrix, plan(128, 256, 784, 4, 2).matrix
    assert not exceeds_caches(small, 2)
    assert exceeds_caches(large, 2)


def test_the_cache_is_as_large_as_the_machine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
        (tmp_path / f"index{index}" / "level").write_text(f"{index + 1}\n")
    monkeypatch.setattr(system, "_CACHES", tmp_path)
    assert cpu_plan.last_level_bytes.__wrapped__() == 32 << 20


@pytest.mark.parametrize("content", [None, "", "K", "much", "0K"])
def test_an_unknown_cache_size_falls_back_to_8_mib(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "index0").mkdir()
        (tmp_path / "index0" / "size").write_text(content)
    monkeypatch.setattr(system, "_CACHES", tmp_path)
    assert cpu_plan.last_level_bytes.__wrapped__() == 8 << 20


def test_a_job_is_fields_of_eight_bytes_in_the_order_that_the_loops_know() -> None:
    assert ctypes.sizeof(Job) == 8 * len(FIELD)
    for name, position in FIELD._asdict().items():
        assert getattr(Job, name).offset == 8 * position
