"""The least traffic between memory and caches that a call can do with, in copies: the floor of its time.

A copy of x reads x and writes as much again, two tensors of x's size. So a tensor read or written is half a copy, and

    eval                  x, y                           1
    train, forward        x, y                           1
    train, backward       x, g, dx                       1.5   (g the gradient at y)
    with a residual       the residual in the forward    0.5
                          its gradient, and y or the residual to know the activation's derivative, in the backward    1

In training the forward reads x for the statistics and again to normalize, the backward x and g for the sums and again
for dx. The second time is free where one tile is still in the last-level cache: all values of the fewest channels that
can be read by themselves, one if contiguous, as many as share a cache line if channels_last. Where a tile is larger, it
is read from memory again: 0.5 more in the forward, 1 in the backward. (Behind an addition the second reading of g is
that of the residual's gradient, which by then holds the activation's derivative: y is read once.)
"""

from __future__ import annotations

from typing import NamedTuple

from batchnorm.bench.cases import Case

CACHE_LINE = 64


class Copies(NamedTuple):
    """How many copies of x forward and backward amount to."""

    forward: float
    backward: float

    @property
    def whole(self) -> float:
        """Both together."""
        return self.forward + self.backward


def copies(case: Case, cache_bytes: int) -> Copies:
    """The floor of a case on a machine whose last-level cache has `cache_bytes`."""
    forward = 1.5 if case.residual else 1.0
    if not case.train:
        return Copies(forward, 0.0)
    # Without an activation g is the residual's gradient itself, and no derivative asks for y.
    masked = case.residual and case.act is not None
    backward = 1.5 + (1.0 if masked else 0.0)
    if tile_bytes(case) > cache_bytes:
        forward += 0.5
        backward += 1.0
    return Copies(forward, backward)


def tile_bytes(case: Case) -> int:
    """All values of the fewest channels that can be read without others."""
    return case.values * (case.itemsize if case.layout == "contiguous" else CACHE_LINE)


def gigabytes_per_second(case: Case, amount: float, seconds: float) -> float:
    """The speed at which a call moves `amount` copies' traffic, in 10⁹ bytes a second."""
    return 2 * amount * case.tensor_bytes / seconds / 1e9
