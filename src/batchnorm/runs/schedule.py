"""Which steps of a training run are recorded: functions step → bool, bounded in number however long the run is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], bool]


@dataclass(frozen=True)
class every:  # noqa: N801 - called as the function that it is to its users
    """A schedule that records every k-th step, and fewer and fewer of them in a long run.

    From step 0 on every k-th step is recorded, from step k·at_most on every 2k-th, then every 4k-th, and so on. So
    each doubling of a run's length adds some `at_most`/2 recorded steps, and a run of a million steps has at most
    at_most·(1 + log2(1e6/(k·at_most))/2) + 1 of them: some 1,800 for every(1).

    Args:
        k: the distance between recorded steps, at first; a whole number >= 1.
        at_most: how many steps are recorded before the distance first doubles; a whole number >= 2.

    Raises ValueError for other numbers.
    """

    k: int = 1
    at_most: int = 256

    def __post_init__(self) -> None:
        for name, value, least in (("k", self.k, 1), ("at_most", self.at_most, 2)):
            if type(value) is not int or value < least:
                raise ValueError(f"every() takes {name} >= {least}, a whole number, got {value!r}")

    def __call__(self, step: int) -> bool:
        doubled = (step // (self.k * self.at_most)).bit_length()
        return step % (self.k << doubled) == 0


@dataclass(frozen=True)
class log_spaced:  # noqa: N801 - called as the function that it is to its users
    """A schedule that records `per_decade` steps in every power of ten, evenly spread on a logarithmic scale.

    Where there are fewer steps than that, all are recorded. Training moves fastest at its start: with the default, 105
    of the first 1,000 steps are recorded and 255 of the first million, and the last one recorded is never more than 5 %
    before the end.

    Args:
        per_decade: how many steps, a whole number from 1 to 1000.

    Raises ValueError for other numbers.
    """

    per_decade: int = 50

    def __post_init__(self) -> None:
        if type(self.per_decade) is not int or not 1 <= self.per_decade <= 1000:
            raise ValueError(f"log_spaced() takes per_decade from 1 to 1000, a whole number, got {self.per_decade!r}")

    def __call__(self, step: int) -> bool:
        return step == 0 or self._mark(step + 1) > self._mark(step)

    def _mark(self, step: int) -> int:
        return math.floor(self.per_decade * math.log10(step))


def described(schedule: Schedule) -> str:
    """As run.json names it."""
    if isinstance(schedule, every | log_spaced):
        return repr(schedule)
    return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))
