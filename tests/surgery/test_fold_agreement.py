"""How far outputs moved: the measure, and what it makes of what cannot be compared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from batchnorm.surgery._folding.trials import Difference, difference

ONES = torch.ones(4)
NAN, INF = float("nan"), float("inf")


def test_the_largest_and_the_root_mean_square_relative_to_the_largest_magnitude() -> None:
    before, after = torch.tensor([1.0, -4.0, 2.0, 0.0]), torch.tensor([1.0, -4.0, 2.0, 0.5])
    found = difference([before], [after])
    assert found == Difference(0.5 / 4, math.sqrt(0.25 / 4) / 4, 1e-5)


def test_the_worst_tensor_counts_and_the_coarsest_type() -> None:
    whole = torch.arange(4)
    before, after = [ONES, whole, ONES.double(), ONES.half()], [ONES, whole + 1, ONES.double() * 1.25, ONES.half()]
    assert difference(before, after) == Difference(0.25, 0.25, 1e-2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([ONES], [ONES.double()]),
        ([ONES], [ONES.reshape(2, 2)]),
        ([ONES], [ONES, ONES]),
        ([torch.tensor([1.0, NAN])], [torch.tensor([1.0, 2.0])]),
        ([torch.tensor([1.0, NAN])], [torch.tensor([1.0, 0.0])]),
        ([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, INF])]),
        ([torch.tensor([1.0, -INF])], [torch.tensor([1.0, INF])]),
        ([ONES, torch.zeros(2)], [ONES, torch.ones(2)]),
    ],
)
def test_what_is_not_alike_is_infinitely_far(before: list[Tensor], after: list[Tensor]) -> None:
    found = difference(before, after)
    assert found is not None
    assert found.max == found.rms == INF


def test_infinities_and_nan_in_the_same_places_do_not_count() -> None:
    x = torch.tensor([2.0, INF, -INF, NAN])
    assert difference([x, torch.zeros(3), torch.zeros(0)], [x.clone(), torch.zeros(3), torch.zeros(0)]) == Difference(
        0.0, 0.0, 1e-5
    )


@pytest.mark.parametrize("nothing", [[], [torch.zeros(0)], [torch.arange(3)], [torch.tensor([NAN, INF])]])
def test_nothing_to_compare(nothing: list[Tensor]) -> None:
    assert difference(nothing, nothing) is None
