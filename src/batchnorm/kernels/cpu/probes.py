"""Measure the caches, the memory and the threads of this machine, in a quarter of a second.

What the system reports about caches is no substitute: in a virtual machine it may be the whole host's last level.

Every time is the shortest of several rounds over all sizes, so that a disturbance of some milliseconds spoils a round
and not a size. A rate that rises with the size is noise, too: larger data are never faster.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, cycle
from math import log
from statistics import median
from time import perf_counter
from typing import NamedTuple

from batchnorm.kernels.cpu import copying
from batchnorm.kernels.cpu.copying import COPY, COPY_PAST_CACHES, READ

MOST_MEMORY = 96 << 20
"""Bytes that are touched for the measurement at most."""
LEAST_MEMORY = 16 << 20
"""Bytes without which nothing is measured."""
L2_LIMITS = (256 << 10, 4 << 20)
CACHED_LIMIT = 256 << 20

_SETS = tuple(size << 10 for size in (192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096))
_TOTALS = tuple(size << 20 for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96))
_CLEARLY = 0.7  # of the rate in L2: the next level has half of it on most processors
_WORTHWHILE = 1.05  # results in the cache serve whatever reads them next: to store past it must gain this factor
_REGIONS_SECONDS, _L2_SECONDS, _COPY_SECONDS = 0.01, 0.02, 0.09
_REGIONS = 101
_PASS = 24 << 20  # bytes for each thread in a timed pass: small data are processed several times


class Rate(NamedTuple):
    """Bytes per second of a copy by all threads: `total` bytes, source and target together."""

    total: int
    ordinary: float
    nontemporal: float


@contextmanager
def touched(size: int) -> Iterator[int]:
    """The address of memory for the probes, freed at the end. Not by malloc, which may keep what is freed."""
    with mmap.mmap(-1, size) as memory:
        view = ctypes.c_char.from_buffer(memory)
        try:
            address = ctypes.addressof(view)
            filled = 64 << 10
            ctypes.memset(address, 1, filled)  # not 0: untouched pages and lines of zeros are a special case
            while filled < size:  # in parallel, so that each thread touches memory near it
                more = min(filled, size - filled)
                copying.copy(address, address + filled, more, nontemporal=False)
                filled += more
            yield address
        finally:
            del view  # or the memory cannot be freed


def region_seconds(threads: int) -> float:
    """Seconds for a parallel region that does next to nothing, started from Python; the median, as a call has it."""
    lines = ctypes.create_string_buffer(copying.LINE * threads)
    region = READ, ctypes.addressof(lines), 0, copying.LINE * threads, copying.LINE, 1
    _seconds(*region)  # compiles, and starts the threads
    found: list[float] = []
    while len(found) < _REGIONS and sum(found) < _REGIONS_SECONDS:
        found.append(_seconds(*region))
    return median(found)


@dataclass(frozen=True)
class Prober:
    """Measures with touched memory at `address`, on `threads` threads. Rates include the start of the threads."""

    address: int
    size: int
    threads: int

    def l2_bytes(self, reported: int) -> int:
        """The largest data that each thread re-reads clearly faster than from the next level, while all threads do.

        Where even the largest are as fast, `reported`, what the system reports, decides.
        """
        threads = min(self.threads, max(1, self.size // _SETS[-1]))
        rates = _rates([self._reading(size * threads, threads) for size in _SETS], _L2_SECONDS)
        return within_l2(_SETS, _falling(rates), reported)

    def bandwidths(self, l2: int) -> tuple[tuple[Rate, ...], tuple[tuple[int, float], ...]]:
        """The rates of copies, and of reading alone, by all threads: from what their L2 caches take to all memory."""
        possible = [total for total in _TOTALS if total <= self.size]
        totals = [total for total in possible if total >= l2 * self.threads] or possible[-1:]
        probes = [
            probe
            for total in totals
            for probe in (
                self._copying(total, COPY),
                self._copying(total, COPY_PAST_CACHES),
                self._reading(total, self.threads),
            )
        ]
        rates = _rates(probes, _COPY_SECONDS)
        ended = len(rates) // 3
        ordinary, nontemporal, reading = (_falling(rates[kind : 3 * ended : 3]) for kind in range(3))
        return tuple(map(Rate, totals, ordinary, nontemporal)), tuple(zip(totals, reading, strict=False))

    def _reading(self, size: int, threads: int) -> Callable[[], float]:
        return lambda: self._seconds_a_byte(READ, 0, size, threads, size)

    def _copying(self, total: int, does: int) -> Callable[[], float]:
        target = self.address + self.size // 2
        return lambda: self._seconds_a_byte(does, target, total // 2, self.threads, total)

    def _seconds_a_byte(self, does: int, target: int, size: int, threads: int, total: int) -> float:
        """Seconds for each of `total` bytes; each thread processes one piece, several times if it is small."""
        repeats = max(1, _PASS * threads // total)
        piece = copying.whole_lines(-(-size // threads))
        return _seconds(does, self.address, target, size, piece, repeats) / (repeats * total)


def within_l2(sizes: Sequence[int], rates: Sequence[float], reported: int) -> int:
    """The size after which the rates fall, within L2_LIMITS; `reported` where they do not."""
    plateau = median(rates[:3] or [0.0])
    fast = [size for size, rate in zip(sizes, rates, strict=False) if rate >= _CLEARLY * plateau]
    found = max(fast) if len(fast) < len(rates) else reported
    return min(max(found, L2_LIMITS[0]), L2_LIMITS[1])


def cached_bytes(copies: Sequence[Rate], l2: int, threads: int) -> int:
    """The largest total that an ordinary copy is better for: the split of all sizes in two that gains the most.

    So no single size decides. Where the ordinary copy is better for all, up to MOST_MEMORY, the limit is CACHED_LIMIT.
    """
    gains = [log(_WORTHWHILE * rate.ordinary / rate.nontemporal) for rate in copies]
    sums = [0.0, *accumulate(gains)]
    ordinary = sums.index(max(sums))  # how many of the sizes
    found = copies[ordinary - 1].total if ordinary else 0
    if found >= MOST_MEMORY:
        found = CACHED_LIMIT
    return min(max(found, l2 * threads), CACHED_LIMIT)


def _rates(probes: Sequence[Callable[[], float]], budget: float) -> list[float]:
    """Bytes per second of each probe: the best of as many rounds as the budget of seconds has.

    Fewer rates than probes where not even the first round ends in time.
    """
    best: list[float] = []
    end = perf_counter() + budget
    for place in cycle(range(len(probes))):
        if perf_counter() > end:
            break
        seconds = min(probes[place](), probes[place]())  # in the second, the caches have what they can take
        if place == len(best):
            best.append(seconds)
        best[place] = min(best[place], seconds)
    return [1 / seconds for seconds in best]


def _falling(rates: Sequence[float]) -> list[float]:
    """No rate is lower than those of larger data."""
    return list(accumulate(reversed(rates), max))[::-1]


def _seconds(*arguments: int) -> float:
    start = perf_counter()
    copying.run(*arguments)
    return perf_counter() - start
