"""The cutting of a tensor into tiles: every value in exactly one tile of each pass, and sums in a fixed order."""

from __future__ import annotations

import ctypes
import random

import pytest

from batchnorm.kernels.cpu import plan as cpu_plan
from batchnorm.kernels.cpu.plan import (
    APPLY,
    FIELD,
    MAX_STEPS,
    MERGE,
    PREPARE,
    REDUCE,
    SLOPES,
    Job,
    Matrix,
    Plan,
    Step,
    Steps,
    plan,
)
from randomness import SEED

FORWARD = REDUCE | MERGE | PREPARE | APPLY
BACKWARD = FORWARD | SLOPES
JOBS = [
    (FORWARD, False), (REDUCE | MERGE, False), (PREPARE | APPLY, False),
    (BACKWARD, True), (PREPARE | REDUCE | MERGE, True), (PREPARE | SLOPES | APPLY, True),
]  # fmt: skip
"""The phases of the verbs and pairs, and whether they are of backward."""
L2 = 1 << 20


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


def covered(m: Matrix, steps: Steps) -> bool:
    """Whether the groups cover each channel once, and no step needs more tiles than the plan says."""
    if (steps.groups - 1) * steps.group_channels >= m.channels or steps.groups * steps.group_channels < m.channels:
        return False
    return all(
        step.tile_rows >= 1 <= step.tile_channels
        and -(-m.rows // step.tile_rows) * -(-steps.group_channels // step.tile_channels) <= steps.tiles
        for step in steps.steps
    )


def test_every_step_covers_the_matrix_once() -> None:
    for shape, planned in random_plans(1000):
        rows, channels, span, *_ = shape
        m = planned.matrix
        assert m.rows * m.fold == rows, (SEED, shape)
        assert (m.channels, m.span) == (channels, span)
        for phases, backward in JOBS:
            steps = planned.steps(phases, 1 + backward, backward, L2)
            assert covered(m, steps), (SEED, shape, steps)


def test_the_steps_have_all_phases_in_an_order_in_which_each_finds_what_it_needs() -> None:
    order = {True: [PREPARE, REDUCE, MERGE, SLOPES, APPLY], False: [REDUCE, MERGE, PREPARE, APPLY]}
    for shape, planned in random_plans(1000):
        for phases, backward in JOBS:
            steps = planned.steps(phases, 1 + backward, backward, L2).steps
            assert len(steps) <= MAX_STEPS
            wanted = [phase for phase in order[backward] if phases & phase]
            found = [phase for step in steps for phase in order[backward] if step.phases & phase]
            assert sorted(found) == sorted(wanted), (SEED, shape)
            if phases & REDUCE or not backward:
                assert found == wanted, (SEED, shape)
            for step in steps:
                if step.phases & ~(REDUCE | APPLY):  # per channel: a tile must have all rows
                    assert step.tile_rows == planned.matrix.rows, (SEED, shape)


def test_a_tile_that_is_reduced_is_a_whole_number_of_parts() -> None:
    for shape, planned in random_plans(1000):
        for phases, backward in JOBS:
            for step in planned.steps(phases, 2, backward, L2).steps:
                if step.phases & REDUCE and step.tile_rows < planned.matrix.rows:
                    assert step.tile_rows % planned.part_rows == 0, (SEED, shape, step)


def test_rows_that_are_folded_have_tiles_of_all_channels() -> None:
    """Those channels' columns lie apart."""
    for shape, planned in random_plans(2000):
        if planned.matrix.fold > 1:
            for phases, backward in JOBS:
                for step in planned.steps(phases, 2, backward, L2).steps:
                    if step.phases & (REDUCE | APPLY):
                        assert step.tile_channels == planned.matrix.channels, (SEED, shape, step)


def test_what_is_read_once_is_read_in_the_order_of_memory() -> None:
    """A tile of a job that does not reduce is a range of memory: some whole rows, or a part of one."""
    for shape, planned in random_plans(2000):
        m = planned.matrix
        for phases, backward in JOBS:
            for step in planned.steps(phases, 1 + backward, backward, L2).steps:
                if not phases & REDUCE and step.phases & APPLY and m.bytes > L2 and not m.by_columns:
                    assert step.tile_rows == 1 or step.tile_channels >= m.channels, (SEED, shape, step)


def test_long_rows_are_cut_into_groups_of_channels_that_are_whole_cache_lines() -> None:
    planned = plan(50176, 144, 1, 4, 2)
    steps = planned.steps(BACKWARD, 2, True, L2)
    assert (steps.groups, steps.group_channels) == (3, 48)
    assert planned.steps(REDUCE | MERGE, 1, False, L2).groups == 1, "nothing is read twice"
    assert plan(50176, 24, 1, 4, 2).steps(BACKWARD, 2, True, L2).groups == 1, "rows of one piece"
    assert plan(50176, 100, 1, 4, 2).steps(BACKWARD, 2, True, L2).groups == 1, "rows that are not whole lines"
    for shape, random_plan in random_plans(2000):
        m = random_plan.matrix
        found = random_plan.steps(BACKWARD, 2, True, L2)
        if found.groups > 1:
            assert (m.by_columns, m.fold) == (True, 1), (SEED, shape)
            assert found.group_channels * m.span * m.size >= 2 * 64, (SEED, shape, found)


def test_partial_sums_stay_small_beside_the_tensor() -> None:
    for shape, planned in random_plans(2000):
        m, threads = planned.matrix, shape[-1]
        if m.bytes > 1 << 20 and m.rows > 64 * threads:
            assert planned.parts * 3 * m.cells * 8 <= m.bytes, (SEED, shape, planned)


def test_rows_are_folded_to_whole_cache_lines_where_their_number_divides() -> None:
    assert plan(4096, 16, 1, 4, 2).matrix == Matrix(1024, 16, 1, 4, 4, True)
    assert plan(4096, 100, 1, 4, 2).matrix.fold == 4, "400 columns are 25 lines"
    assert plan(4099, 16, 1, 4, 2).matrix.fold == 1, "4099 is prime"
    assert plan(4096, 256, 1, 4, 2).matrix.fold == 1
    assert plan(4096, 16, 49, 4, 2).matrix.by_columns, "short slices of many rows"
    assert not plan(64, 16, 49, 4, 2).matrix.by_columns
    assert plan(64, 16, 49, 4, 2).matrix.fold == 1, "slices are not joined"


def test_results_that_exceed_the_caches_are_stored_past_them() -> None:
    small, large = plan(64, 128, 64, 4, 2), plan(128, 256, 784, 4, 2)
    assert not small.streams(2 << 20)
    assert large.streams(1 << 20)
    assert not plan(1024, 1021, 49, 4, 2).streams(1 << 20), "short runs that end within a line"
    assert not plan(4099, 1021, 1, 4, 2).streams(1 << 20), "rows that end within a line"


def test_a_job_is_fields_of_eight_bytes_in_the_order_that_the_loops_know() -> None:
    assert ctypes.sizeof(Job) == 8 * len(FIELD)
    for name, position in FIELD._asdict().items():
        assert getattr(Job, name).offset == 8 * position


def test_a_small_tensor_is_one_tile() -> None:
    steps = plan(8, 16, 16, 4, 8).steps(FORWARD, 1, False, L2)
    assert steps == Steps((Step(FORWARD, 8, 16),), group_channels=16, groups=1, tiles=1)
    assert cpu_plan._SMALL >= 8 * 16 * 16 * 4
