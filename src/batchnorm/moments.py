"""Moments: count, mean and sum of squared deviations of a set of values, which merge exactly.

They merge batches, devices, processes and data sets, and work on Python floats, NumPy arrays and torch tensors. No
formula uses E[x²] - E[x]², which loses all digits if the mean is large relative to the deviation.

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
        count: the number of values; an array of mean's shape if channels have different counts.
        mean: their mean: a number or an array.
        m2: the sum of their squared deviations from the mean; of mean's shape.

    With count 0, mean and m2 are ignored, NaN included.
    """

    count: Any
    mean: Any
    m2: Any

    @classmethod
    def of_variance(cls, count: Any, mean: Any, var: Any, *, unbiased: bool = False) -> Moments:
        """Make moments from a count, a mean and a variance.

        Args:
            count: n, the number of values.
            mean: their mean.
            var: their variance, divided by n as in the forward pass.
            unbiased: the variance is divided by n - 1, as running_var is.
        """
        return cls(count, mean, var * (count - 1 if unbiased else count))

    @property
    def var(self) -> Any:
        """The biased variance m2/n, which normalization uses; NaN in arrays where n is 0."""
        return self.m2 / self.count

    @property
    def unbiased_var(self) -> Any:
        """The unbiased variance m2/(n - 1), which running_var stores; needs at least two values."""
        return self.m2 / (self.count - 1)

    def merge(self, *others: Moments) -> Moments:
        """Return the moments of the values of this and `others` together, up to rounding, in any order."""
        return merge((self, *others))


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of the union of any number of parts, empty parts included.

    mean = r + Σ n_i·(mean_i - r)/n with r = Σ n_i·mean_i/n, and m2 = Σ m2_i + Σ n_i·(mean_i - mean)². The second sums
    are as small as the spread between the parts, so no digits are lost if the mean is many deviations from 0.

    Raises ValueError if there is no part: shape and type are then unknown.
    """
    all_parts = list(parts)
    if not all_parts:
        raise ValueError("merge needs at least one part, which may be empty (count 0)")
    filled = [_zero_where_empty(p) for p in all_parts if not (isinstance(p.count, int | float) and p.count == 0)]
    if not filled:
        return all_parts[0]
    count = sum(part.count for part in filled)
    divisor = count + (count == 0)
    rough = sum(part.count * part.mean for part in filled) / divisor
    mean = rough + sum(part.count * (part.mean - rough) for part in filled) / divisor
    m2 = sum(part.m2 + part.count * (part.mean - mean) ** 2 for part in filled)
    return Moments(count, mean, m2)


def merge_rows(parts: Moments) -> Moments:
    """`merge` without a loop: k parts are the rows of tensors, count (k, 1), mean and m2 (k, C)."""
    parts = _zero_where_empty(parts)
    count = parts.count.sum(0)
    divisor = count + (count == 0)
    rough = (parts.count * parts.mean).sum(0) / divisor
    mean = rough + (parts.count * (parts.mean - rough)).sum(0) / divisor
    return Moments(count, mean, (parts.m2 + parts.count * (parts.mean - mean) ** 2).sum(0))


def _zero_where_empty(part: Moments) -> Moments:
    """Set mean and m2 to 0 in channels whose count is 0, so that they add no NaN."""
    if isinstance(part.count, int | float):
        return part
    empty = part.count == 0
    if isinstance(empty, np.ndarray | np.bool_):
        return Moments(part.count, np.where(empty, 0.0, part.mean), np.where(empty, 0.0, part.m2))
    return Moments(part.count, part.mean.masked_fill(empty, 0), part.m2.masked_fill(empty, 0))
