"""What the criterion allows where a residual precedes an activation: the roundings that are there, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accuracy import ACTIVATIONS, Case, pytorchs
from batchnorm.kernels.aten import gradient, gradient_by_y
from batchnorm.kernels.contract import DERIVATIVES_BY_Y
from batchnorm.testing import truth, verdicts

BEHIND_AN_ADDITION = sorted(act for act in ACTIVATIONS if act not in (None, "relu"))


def case(act: str, dtype: torch.dtype = torch.bfloat16, offset: float = 100.0) -> Case:
    """x a hundred deviations from zero: what is summed on the way is much larger than what comes out."""
    torch.manual_seed(0)
    x, residual, grad_y = torch.randn(3, 64, 4, 6, 6).to(dtype)
    parameters = torch.rand(4) + 0.5, torch.randn(4)
    running = torch.zeros(4), torch.ones(4)
    return Case((x.float() + offset).to(dtype), grad_y, *parameters, residual, *running, act=act).away_from_kinks()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", BEHIND_AN_ADDITION)
def test_a_rounding_moves_a_derivative_by_no_more_than_the_last_digit(act: str, dtype: torch.dtype) -> None:
    z = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    one = torch.ones_like(z)

    def derivative(rounding: Tensor | None) -> Tensor:
        if act in DERIVATIVES_BY_Y:
            y = ACTIVATIONS[act](z, 0.01)
            return gradient_by_y(one, y if rounding is None else y.to(dtype).double(), act)
        return gradient(one, z if rounding is None else z.to(dtype).double(), act, 0.01)

    moved = (derivative(z) - derivative(None)).abs()
    moved[(z.abs() - 3).abs() < 0.02] = 0  # hardswish's kinks
    moved[(z - 6).abs() < 0.04] = 0  # and relu6's
    assert moved.max() <= torch.finfo(dtype).eps
    assert bool(moved.max() > torch.finfo(dtype).eps / 16) is (act not in ("relu6", "leaky_relu"))


@pytest.mark.parametrize("act", BEHIND_AN_ADDITION)
def test_what_a_residual_allows_is_little(act: str) -> None:
    """It was a rounding of the largest term of every formula: hundreds of times as much, of statistics as well."""
    example = case(act)
    right = {name: torch.from_numpy(value) for name, value in truth(example).items()}
    plain = {verdict.name: verdict for verdict in verdicts(right, {}, case(act, offset=0.0))}
    far = {verdict.name: verdict for verdict in verdicts(right, {}, example)}
    for name in ("mean", "var", "running_mean", "running_var"):
        assert (far[name].allowance < 1e-3 * abs(right[name]).numpy().clip(1)).all(), name
    for name in ("y", "dresidual", "dbeta"):
        assert (far[name].allowance <= 2 * plain[name].allowance + 1e-3).all(), "as without the offset"
    assert (far["dbeta"].allowance <= 0.02 * example.grad_y.double().abs().sum((0, 2, 3)).numpy()).all()


@pytest.mark.parametrize("act", BEHIND_AN_ADDITION)
def test_pytorchs_own_operators_pass_by_what_is_allowed_alone(act: str) -> None:
    """Of what they round besides, batch_norm's result, nothing is allowed for: in float32 it is small."""
    example = case(act, torch.float32, offset=1.0)
    assert all(verdict.good for verdict in verdicts(pytorchs(example), {}, example))
