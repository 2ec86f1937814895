"""The floor: the least memory traffic that a call needs, in copies of x.

A copy of x reads one tensor of x's size and writes another. So each tensor that is read or written is half a copy:

    eval                  x, y                           1
    train, forward        x, y                           1
    train, backward       x, g, dx                       1.5   (g the gradient at y)
    with a residual       the residual in the forward    0.5
                          in the backward, its gradient, and y or the residual for the activation's derivative  1

In training, the forward reads x for the statistics and again to normalize; the backward reads x and g for the sums
and again for dx. The second read is free if one tile, of x or of x and g, stays in the L2 of the core that read it. A
tile has the fewest channels that can be read without others: one channel if contiguous, those of one cache line if
channels_last. A larger tile is read again: 0.5 more in the forward, 1 more in the backward. (With a residual, the
second pass reads the residual's gradient instead of g. It includes the activation's derivative, so y is read once.)
"""

from __future__ import annotations

from typing import NamedTuple

from batchnorm.bench.cases import Case

CACHE_LINE = 64


class Copies(NamedTuple):
    """The traffic of forward and backward in copies of x."""

    forward: float
    backward: float

    @property
    def whole(self) -> float:
        return self.forward + self.backward


def copies(case: Case, cache_bytes: int) -> Copies:
    """The floor of a case on a machine whose L2 has `cache_bytes`."""
    forward = 1.5 if case.residual else 1.0
    if not case.train:
        return Copies(forward, 0.0)
    # Without an activation, g is also the residual's gradient, and no derivative needs y.
    backward = 2.5 if case.residual and case.act is not None else 1.5
    tile = tile_bytes(case)
    return Copies(forward + 0.5 * (tile > cache_bytes), backward + (2 * tile > cache_bytes))


def tile_bytes(case: Case) -> int:
    """Bytes of one tile of x: the fewest channels that can be read without others."""
    return case.values * (case.itemsize if case.layout == "contiguous" else CACHE_LINE)


def gigabytes_per_second(case: Case, amount: float, seconds: float) -> float:
    """The memory traffic in 10⁹ bytes per second of a call that moves `amount` copies of x in `seconds`."""
    return 2 * amount * case.tensor_bytes / seconds / 1e9
