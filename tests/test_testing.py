"""assert_accurate passes what is right, and fails where it must, with the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accuracy import pytorchs
from batchnorm.testing import Call, assert_accurate, truth


def call(dtype: torch.dtype = torch.float32, offset: float = 0.0, act: str | None = "silu") -> Call:
    x, grad_y, residual = (torch.randn(16, 3, 5, 5).to(dtype) for _ in range(3))
    gamma, beta, mean = torch.randn(3, 3)
    return Call(x + offset, grad_y, gamma, beta, residual, mean, torch.rand(3) + 0.5, act=act)


def outputs(one: Call) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pytorchs(one).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [None, "relu", "silu", "tanh"])
def test_pytorchs_own_operators_pass(dtype: torch.dtype, act: str | None) -> None:
    one = call(dtype, act=act).away_from_kinks()
    assert_accurate(outputs(one), outputs(one), truth(one))
    assert_accurate({"dresidual": None}, {}, truth(one))


@pytest.mark.parametrize("name", ["y", "dx", "dgamma", "dbeta", "dresidual", "running_mean", "running_var"])
def test_one_value_that_is_off_fails_with_the_numbers(name: str) -> None:
    one = call()
    ours = outputs(one)
    ours[name].view(-1)[-1] += 0.5
    with pytest.raises(AssertionError, match=rf"(?s)^{name}: error 5.0e-01 where PyTorch's is .*\nby hand.*eps=1e-05"):
        assert_accurate(ours, outputs(one), truth(one), note="by hand")


def test_what_is_no_number_fails() -> None:
    one = call()
    for bad in (float("nan"), float("inf")):
        ours = outputs(one)
        ours["y"][0, 1, 0, 0] = bad
        with pytest.raises(AssertionError, match=r"^y: error inf"):
            assert_accurate(ours, outputs(one), truth(one))


def test_a_variance_by_the_mean_of_squares_fails_far_from_zero() -> None:
    """E[x²] - E[x]² in float32, many deviations from zero: what the criterion is there to find."""
    one = replace(call(offset=1e3, act=None), residual=None)
    x = one.x
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x * x).mean((0, 2, 3), keepdim=True) - mean * mean
    y = (x - mean) / (var + one.eps).sqrt() * one.gamma.view(1, 3, 1, 1) + one.beta.view(1, 3, 1, 1)
    assert_accurate({"y": outputs(one)["y"]}, {}, truth(one))
    with pytest.raises(AssertionError, match=r"^y: error"):
        assert_accurate({"y": y}, {}, truth(one))


def test_a_biased_running_variance_fails() -> None:
    one = call()
    ours = outputs(one)
    moved = truth(one).values["running_var"] - 0.1 * truth(one).values["var"] / 399
    ours["running_var"] = torch.from_numpy(moved).float()
    with pytest.raises(AssertionError, match=r"^running_var"):
        assert_accurate(ours, outputs(one), truth(one))


def test_another_shape_is_refused() -> None:
    one = call()
    with pytest.raises(ValueError, match=r"dgamma: shape \(1, 3\), not \(3,\)"):
        assert_accurate({"dgamma": torch.zeros(1, 3)}, {}, truth(one))
