"""assert_accurate passes accurate results and fails with numbers otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accuracy import pytorchs
from batchnorm.activations import ACTIVATIONS, BY_Y
from batchnorm.kernels.aten import activate, gradient, gradient_by_y
from batchnorm.testing import Call, assert_accurate, truth, verdicts


def call(dtype: torch.dtype = torch.float32, offset: float = 0.0, act: str | None = "silu") -> Call:
    x, grad_y, residual = (torch.randn(16, 3, 5, 5).to(dtype) for _ in range(3))
    gamma, beta, mean = torch.randn(3, 3)
    return Call(x + offset, grad_y, gamma, beta, residual, mean, torch.rand(3) + 0.5, act=act)


def outputs(one: Call) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pytorchs(one).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [None, "relu", "silu", "tanh"])
def test_pytorchs_operators_pass(dtype: torch.dtype, act: str | None) -> None:
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


def test_nan_and_infinity_fail() -> None:
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


BEHIND_AN_ADDITION = sorted(act for act in ACTIVATIONS if act != "relu")


def case(act: str, dtype: torch.dtype = torch.bfloat16, offset: float = 100.0) -> Call:
    """x a hundred deviations from zero: what is summed on the way is much larger than what comes out."""
    torch.manual_seed(0)
    x, residual, grad_y = torch.randn(3, 64, 4, 6, 6).to(dtype)
    parameters = torch.rand(4) + 0.5, torch.randn(4)
    running = torch.zeros(4), torch.ones(4)
    return Call((x.float() + offset).to(dtype), grad_y, *parameters, residual, *running, act=act).away_from_kinks()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", BEHIND_AN_ADDITION)
def test_a_rounding_moves_a_derivative_by_no_more_than_the_last_digit(act: str, dtype: torch.dtype) -> None:
    z = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    one = torch.ones_like(z)

    def derivative(rounding: Tensor | None) -> Tensor:
        if act in BY_Y:
            y = activate(z, act, 0.01)
            return gradient_by_y(one, y if rounding is None else y.to(dtype).double(), act)
        return gradient(one, z if rounding is None else z.to(dtype).double(), act, 0.01)

    moved = (derivative(z) - derivative(None)).abs()
    moved[(z.abs() - 3).abs() < 0.02] = 0  # hardswish's kinks
    moved[(z - 6).abs() < 0.04] = 0  # and relu6's
    assert moved.max() <= torch.finfo(dtype).eps
    assert bool(moved.max() > torch.finfo(dtype).eps / 16) is (act not in ("relu6", "leaky_relu"))


@pytest.mark.parametrize("act", BEHIND_AN_ADDITION)
def test_the_allowance_of_a_residual_is_small(act: str) -> None:
    """It was a rounding of the largest term of every formula: hundreds of times as much, of statistics as well."""
    example = case(act)
    exact = truth(example)
    right = {name: torch.from_numpy(value) for name, value in exact.values.items()}
    plain = {verdict.name: verdict for verdict in verdicts(right, {}, truth(case(act, offset=0.0)))}
    far = {verdict.name: verdict for verdict in verdicts(right, {}, exact)}
    for name in ("mean", "var", "running_mean", "running_var"):
        assert (far[name].allowance < 1e-3 * abs(right[name]).numpy().clip(1)).all(), name
    for name in ("y", "dresidual", "dbeta"):
        assert (far[name].allowance <= 2 * plain[name].allowance + 1e-3).all(), "as without the offset"
    assert (far["dbeta"].allowance <= 0.02 * example.grad_y.double().abs().sum((0, 2, 3)).numpy()).all()


@pytest.mark.parametrize("act", BEHIND_AN_ADDITION)
def test_pytorchs_operators_pass_within_the_allowance(act: str) -> None:
    """Of what they round besides, batch_norm's result, nothing is allowed for: in float32 it is small."""
    example = case(act, torch.float32, offset=1.0)
    assert all(verdict.good for verdict in verdicts(pytorchs(example), {}, truth(example)))
