"""Merging moments: the moments of the whole, whatever the parts, their number, their order and what holds them.

Relative error bounds stated here: of the mean against the deviation, and of the variance, LOOSE·eps·(1 + mean/std),
from one rounding of each part's mean. E[x²] - E[x]² would be wrong by eps·(mean/std)², which is 1 at 1e8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.moments import Moments, merge

LOOSE = 64
EPS = np.finfo(np.float64).eps


def moments_of(values: np.ndarray) -> Moments:
    """By definition, over rows; NaN of nothing, as a channel without values has."""
    if len(values) == 0:
        return Moments(0, np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan))
    mean = values.mean(0)
    return Moments(len(values), mean, ((values - mean) ** 2).sum(0))


def exact(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance with more digits than float64 has: of integers, in Python's own arithmetic."""
    columns = [[int(v) for v in column] for column in values.T]
    n = len(values)
    sums = [sum(c) for c in columns]
    squares = [n * sum(v * v for v in c) - s * s for c, s in zip(columns, sums, strict=True)]
    return np.array([s / n for s in sums]), np.array([q / (n * n) for q in squares])


def assert_moments(got: Moments, values: np.ndarray) -> None:
    mean, var = exact(values)
    assert got.count == len(values)
    bound = LOOSE * EPS * (np.sqrt(var) + np.abs(mean))
    assert (np.abs(got.mean - mean) <= bound).all(), f"mean {got.mean} not {mean}"
    assert (np.abs(got.var - var) <= LOOSE * EPS * var + bound**2 + 2 * bound * np.sqrt(var)).all(), f"{got.var} {var}"


batches = st.builds(
    lambda seed, n, offset, spread: (
        np.random.default_rng(seed).integers(-spread, spread + 1, (n, 3)).astype(float) + offset
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.sampled_from([0, 3, -(10**4), 10**8, 10**11]),
    st.sampled_from([1, 1000, 10**6]),
)
cuts = st.lists(st.integers(0, 60), max_size=9)


def split(values: np.ndarray, at: list[int]) -> list[np.ndarray]:
    """At the given rows; a row named twice gives an empty part."""
    return np.split(values, sorted(min(i, len(values)) for i in at))


@settings(max_examples=300)
@given(values=batches, at=cuts)
def test_parts_merge_to_the_moments_of_the_whole(values: np.ndarray, at: list[int]) -> None:
    assert_moments(merge(moments_of(part) for part in split(values, at)), values)


@settings(max_examples=150)
@given(values=batches, at=cuts, other=cuts, order=st.randoms())
def test_neither_split_nor_order_nor_grouping_matters(
    values: np.ndarray, at: list[int], other: list[int], order
) -> None:
    parts = [moments_of(part) for part in split(values, other)]
    order.shuffle(parts)
    grouped = merge([merge(parts[:2]), *[merge([part]) for part in parts[2:]]])
    assert_moments(grouped, values)
    assert_moments(parts[0].merge(*parts[1:]), values)
    assert_moments(merge(moments_of(part) for part in split(values, at)), values)


@settings(max_examples=100)
@given(values=batches, at=cuts)
def test_a_merge_one_by_one_is_the_merge_of_all(values: np.ndarray, at: list[int]) -> None:
    total = Moments(0, np.full(3, np.nan), np.full(3, np.nan))
    for part in split(values, at):
        total = total.merge(moments_of(part))
    assert_moments(total, values)


def test_mean_of_1e8_deviations_costs_no_digits_of_the_variance() -> None:
    values = np.random.default_rng(0).integers(-1, 2, (4096, 3)).astype(float) + 1e8
    merged = merge(moments_of(part) for part in np.split(values, 64))
    np.testing.assert_allclose(merged.var, exact(values)[1], rtol=1e-7)
    naive = (values**2).mean(0) - values.mean(0) ** 2
    assert (np.abs(naive / exact(values)[1] - 1) > 0.1).all(), "the test would not see the difference"


HOLDERS: dict[str, Callable[[np.ndarray], object]] = {
    "numpy": np.asarray,
    "torch": torch.from_numpy,
    "numpy 0-d": lambda v: v[0],
    "python": lambda v: float(v[0]),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_floats_arrays_and_tensors_merge_alike(holder: str) -> None:
    values = np.random.default_rng(1).normal(5, 2, (20, 3))
    hold = HOLDERS[holder]
    parts = [moments_of(part) for part in np.split(values, [0, 7, 11])]
    merged = merge(Moments(p.count, hold(p.mean), hold(p.m2)) for p in parts)
    assert type(merged.mean) is type(hold(values[0]))
    np.testing.assert_allclose(np.asarray(merged.mean), hold(values.mean(0)), rtol=1e-14)
    np.testing.assert_allclose(np.asarray(merged.var), hold(values.var(0)), rtol=1e-13)
    np.testing.assert_allclose(np.asarray(merged.unbiased_var), hold(values.var(0, ddof=1)), rtol=1e-13)


@pytest.mark.parametrize("hold", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_counts_per_channel(hold: Callable[[np.ndarray], object]) -> None:
    random = np.random.default_rng(2)
    channels = [[random.normal(c, 1, n) for n in counts] for c, counts in enumerate([(3, 0, 5), (0, 4, 0), (1, 1, 2)])]
    parts = []
    for i in range(3):
        columns = [moments_of(channel[i][:, None]) for channel in channels]
        count, mean, m2 = (np.array([np.ravel(getattr(c, k))[0] for c in columns]) for k in ("count", "mean", "m2"))
        parts.append(Moments(hold(count.astype(float)), hold(mean), hold(m2)))
    for order in itertools.permutations(parts):
        merged = merge(order)
        whole = [np.concatenate(channel) for channel in channels]
        np.testing.assert_array_equal(np.asarray(merged.count), [len(w) for w in whole])
        np.testing.assert_allclose(np.asarray(merged.mean), [w.mean() for w in whole], rtol=1e-13)
        np.testing.assert_allclose(np.asarray(merged.var), [w.var() for w in whole], rtol=1e-13)


def test_a_channel_without_values_in_any_part_stays_unknown() -> None:
    nothing = np.array([0.0, 2.0]), np.array([np.nan, 1.0]), np.array([np.nan, 0.5])
    merged = merge([Moments(*nothing), Moments(*nothing)])
    assert merged.count.tolist() == [0, 4]
    with np.errstate(invalid="ignore"):
        assert np.isnan(merged.var[0])
    assert merged.mean[1] == 1.0


def test_empty_parts_stay_empty_and_no_parts_raise() -> None:
    assert merge([Moments(0, float("nan"), float("nan"))] * 2).count == 0
    with pytest.raises(ValueError, match="at least one part"):
        merge([])


def test_variance_divides_by_n_or_by_one_less() -> None:
    moments = Moments(4, 1.0, 6.0)
    assert moments.var == 1.5
    assert moments.unbiased_var == 2.0
    assert Moments.of_variance(4, 1.0, 1.5) == moments
    assert Moments.of_variance(4, 1.0, 2.0, unbiased=True) == moments


def test_one_part_is_itself() -> None:
    merged = merge([Moments(3, np.array([1e8]), np.array([2.0]))])
    assert (merged.count, merged.mean[0], merged.m2[0]) == (3, 1e8, 2.0)
