"""Moments: count, mean and sum of squared deviations of a set of values, merged exactly with those of others.

The one currency of statistics in this package: batches, devices, processes and whole data sets are merged through it.
Works on Python floats, NumPy arrays and torch tensors alike, since it needs little but their operators.
No E[x²] - E[x]² anywhere: it loses all digits once the mean is large against the deviation.

Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American Statistician, 1983.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of a set of values, per channel, which merge exactly.

    count = n, mean = Σx/n, m2 = Σ(x - mean)².

    Args:
        count: how many values: a number, or an array of mean's shape where channels have different counts.
        mean: their mean: a number or an array.
        m2: the sum of their squared deviations from the mean; of mean's shape.

    A part with count 0 has no statistics: what its mean and m2 hold, NaN included, is ignored.
    """

    count: Any
    mean: Any
    m2: Any

    @classmethod
    def of_variance(cls, count: Any, mean: Any, var: Any, *, unbiased: bool = False) -> Moments:
        """Make moments from a count, a mean and a variance.

        Args:
            count: n, how many values.
            mean: their mean.
            var: their variance, divided by n as in the forward pass.
            unbiased: the variance is divided by n - 1 instead, as running_var is.
        """
        return cls(count, mean, var * (count - 1 if unbiased else count))

    @property
    def var(self) -> Any:
        """The biased variance m2/n, which normalization uses; NaN of arrays without values (0/0)."""
        return self.m2 / self.count

    @property
    def unbiased_var(self) -> Any:
        """The unbiased variance m2/(n - 1), which running_var stores; it needs two values."""
        return self.m2 / (self.count - 1)

    def merge(self, *others: Moments) -> Moments:
        """Give the moments of the values of this and of `others` together, exact up to rounding.

        Order and grouping do not matter.
        """
        return merge((self, *others))


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of the union of any number of parts, empty parts included.

    mean = r + Σ n_i·(mean_i - r)/n with r = Σ n_i·mean_i/n, and m2 = Σ m2_i + Σ n_i·(mean_i - mean)²: what the second
    sums add is as small as the spread between parts, so that a mean of many deviations costs no digits.

    Raises ValueError where there is no part at all, since then neither shape nor type is known.
    """
    everything = list(parts)
    if not everything:
        raise ValueError("merge needs at least one part (an empty part, with count 0, will do)")
    known = [
        _ignoring_nothing(part) for part in everything if not (isinstance(part.count, int | float) and part.count == 0)
    ]
    if not known:
        return everything[0]
    count = sum(part.count for part in known)
    divisor = count + (count == 0)
    rough = sum(part.count * part.mean for part in known) / divisor
    mean = rough + sum(part.count * (part.mean - rough) for part in known) / divisor
    m2 = sum(part.m2 + part.count * (part.mean - mean) ** 2 for part in known)
    return Moments(count, mean, m2)


def merge_rows(parts: Moments) -> Moments:
    """`merge` of k parts in the rows of tensors, count (k, 1), mean and m2 (k, C): as many operators for any k."""
    kept = _ignoring_nothing(parts)
    count = kept.count.sum(0)
    divisor = count + (count == 0)
    rough = (kept.count * kept.mean).sum(0) / divisor
    mean = rough + (kept.count * (kept.mean - rough)).sum(0) / divisor
    return Moments(count, mean, (kept.m2 + kept.count * (kept.mean - mean) ** 2).sum(0))


def _ignoring_nothing(part: Moments) -> Moments:
    """The part with zeros where an array of counts is 0, so that no NaN of a channel without values is summed."""
    if isinstance(part.count, int | float):
        return part
    empty = part.count == 0
    if isinstance(empty, np.ndarray | np.bool_):
        return Moments(part.count, np.where(empty, 0.0, part.mean), np.where(empty, 0.0, part.m2))
    return Moments(part.count, part.mean.masked_fill(empty, 0), part.m2.masked_fill(empty, 0))
