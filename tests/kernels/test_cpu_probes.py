"""What is concluded from rates: noise in one of them moves no fact far, and slow machines end in time, too."""

from __future__ import annotations

import random

import pytest

from batchnorm.kernels.cpu import probes
from batchnorm.kernels.cpu.probes import Prober, Rate, cached_bytes, within_l2
from randomness import SEED

MIB = 1 << 20
SETS = tuple(size << 10 for size in (192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096))
TOTALS = tuple(total * MIB for total in (2, 4, 8, 16, 24, 32, 48, 64, 96))


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ([400, 400, 400, 400, 390, 380, 220, 200, 200, 200], 1024),
        ([400, 400, 400, 200, 200, 200, 200, 60, 50, 50], 384),  # three levels: the last does not count
        ([400, 300, 150, 150, 150, 150, 150, 150, 150, 150], 256),
        ([100] * 10, 2048),  # no fall: as reported
        ([8] * 10, 2048),
        ([400], 2048),
        ([], 2048),
    ],
)
def test_l2_ends_where_the_rates_fall(rates: list[float], found: int) -> None:
    assert within_l2(SETS, rates, 2048 << 10) == found << 10


@pytest.mark.parametrize(("reported", "found"), [(0, 256 << 10), (64 << 10, 256 << 10), (512 * MIB, 4 * MIB)])
def test_what_is_reported_counts_within_limits(reported: int, found: int) -> None:
    assert within_l2(SETS, [100] * 10, reported) == found


def copies(ordinary: list[float], nontemporal: list[float]) -> list[Rate]:
    return [Rate(*row) for row in zip(TOTALS, ordinary, nontemporal, strict=True)]


ORDINARY = [300.0, 250, 200, 180, 120, 100, 60, 50, 45]
NONTEMPORAL = [85.0, 85, 85, 82, 80, 79, 75, 70, 60]


def test_results_are_stored_past_the_caches_where_that_is_faster() -> None:
    assert cached_bytes(copies(ORDINARY, NONTEMPORAL), MIB, 2) == 32 * MIB


def test_a_single_disturbed_rate_does_not_decide() -> None:
    draw = random.Random(SEED)
    for _ in range(200):
        rates = [list(ORDINARY), list(NONTEMPORAL)]
        rates[draw.randrange(2)][draw.randrange(4)] /= 3
        assert cached_bytes(copies(*rates), MIB, 2) == 32 * MIB, SEED


@pytest.mark.parametrize(
    ("ordinary", "nontemporal", "found"),
    [
        ([50.0] * 9, [50.0] * 9, 256),  # no difference: results stay in the caches
        ([50.0] * 9, [10.0] * 9, 256),
        ([10.0] * 9, [50.0] * 9, 2),  # the threads' L2 at least
    ],
)
def test_the_ends_of_the_range(ordinary: list[float], nontemporal: list[float], found: int) -> None:
    assert cached_bytes(copies(ordinary, nontemporal), MIB, 2) == found * MIB


def test_sizes_that_were_not_reached_are_not_guessed() -> None:
    assert cached_bytes(copies(ORDINARY, NONTEMPORAL)[:4], MIB, 2) == 16 * MIB


def test_with_many_threads_the_limit_holds() -> None:
    assert cached_bytes(copies(ORDINARY, NONTEMPORAL), 4 * MIB, 128) == 256 * MIB


class Clock:
    """Seconds that pass when a probe runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def probe(self, *seconds: float) -> probes.Callable[[], float]:
        waiting = [*seconds]

        def run() -> float:
            taken = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            self.now += taken
            return taken

        return run


def test_the_best_of_all_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(probes, "perf_counter", clock)
    rates = probes._rates([clock.probe(4, 4, 2, 4), clock.probe(8, 4)], budget=40)
    assert rates == [1 / 2, 1 / 4]


def test_what_the_budget_does_not_allow_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(probes, "perf_counter", clock)
    assert len(probes._rates([clock.probe(1)] * 100, budget=5)) == 3
    assert probes._rates([clock.probe(1)] * 100, budget=-1) == []


def test_incomplete_rates_of_a_size_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_rates", lambda probes, budget: [5.0, 4.0, 6.0, 3.0, 2.0])
    found = Prober(0, 96 * MIB, 2).bandwidths(MIB)
    assert found == ((Rate(2 * MIB, 5.0, 4.0),), ((2 * MIB, 6.0),))


def test_with_more_threads_than_memory_the_largest_size_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_rates", lambda probes, budget: [5.0] * len(probes))
    copies, reading = Prober(0, 96 * MIB, 200).bandwidths(MIB)
    assert [rate.total for rate in copies] == [total for total, _ in reading] == [96 * MIB]
    assert Prober(0, 16 * MIB, 200).l2_bytes(MIB) == MIB
