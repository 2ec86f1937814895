"""Schedules record densely at the start and a bounded number of steps in total."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from batchnorm.recording.steps import describe_schedule, every, log_spaced

MILLION = 1_000_000


@pytest.mark.parametrize("k", [1, 7, 100])
def test_every_keeps_its_distance_and_doubles_it(k: int) -> None:
    schedule = every(k, at_most=8)
    recorded = [step for step in range(40 * k) if schedule(step)]
    assert recorded == [*range(0, 8 * k, k), *range(8 * k, 16 * k, 2 * k), *range(16 * k, 32 * k, 4 * k), 32 * k]


@pytest.mark.parametrize("schedule", [every(1), every(10), every(1, at_most=2)], ids=repr)
def test_every_is_bounded_as_its_docstring_says(schedule: every) -> None:
    count = sum(map(schedule, range(MILLION)))
    assert count <= schedule.at_most * (1 + math.log2(MILLION / (schedule.k * schedule.at_most)) / 2) + 1
    if schedule.k == 1 and schedule.at_most == 256:
        assert 1_700 < count < 1_800


def test_log_spaced_counts_as_its_docstring_says() -> None:
    schedule = log_spaced()
    recorded = [step for step in range(MILLION) if schedule(step)]
    assert len(recorded) == 255
    assert sum(step < 1000 for step in recorded) == 105
    assert recorded[:20] == list(range(20))
    assert all(later <= 1.05 * earlier + 1 for earlier, later in pairwise(recorded))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: every(0), "k >= 1"),
        (lambda: every(2.0), "k >= 1"),  # type: ignore[arg-type]
        (lambda: every(True), "k >= 1"),
        (lambda: every(1, at_most=1), "at_most >= 2"),
        (lambda: log_spaced(0), "1 to 1000"),
        (lambda: log_spaced("many"), "1 to 1000"),  # type: ignore[arg-type]
    ],
)
def test_invalid_schedules_are_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_schedule_is_described_for_the_run() -> None:
    assert describe_schedule(every(5)) == "every(k=5, at_most=256)"
    assert describe_schedule(log_spaced()) == "log_spaced(per_decade=50)"
    assert "lambda" in describe_schedule(lambda step: True)
    assert describe_schedule(int) == "int"
