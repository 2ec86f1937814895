"""eval() and train() between a forward and its backward: the gradient is that of the forward, at every size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn

SHAPES = [(4, 3, 2, 2), (16, 32, 40, 40), (128, 64, 32, 32)]
"""Below and above the sizes from which the kernels run, in training and in inference."""


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"act": "relu"}, {"act": "silu"}, {"accumulate": 2}], ids=str)
def test_a_training_forward_before_the_backward_of_an_eval_forward(
    shape: tuple[int, ...], momentum: float | None, options: dict[str, object]
) -> None:
    """The training forward moves the statistics in place; small tensors gave wrong gradients, large ones raised."""
    torch.manual_seed(0)
    layer = bn.BatchNorm2d(shape[1], momentum=momentum, **options)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    alone = copy.deepcopy(layer)
    x, other = torch.randn(shape), torch.randn(shape) * 3 + 5
    wanted = []
    for each, between in ((layer, True), (alone, False)):
        inputs = x.clone().requires_grad_()
        y = each.eval()(inputs)
        if between:
            for _ in range(2):
                each.train()(other)
        y.square().sum().backward()
        wanted.append([inputs.grad, each.weight.grad, each.bias.grad])
    assert not torch.equal(layer.running_mean, alone.running_mean)
    for ours, expected in zip(*wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_without_gradients_nothing_is_copied() -> None:
    layer = bn.BatchNorm2d(3).eval()
    with torch.no_grad():
        mean, _ = layer._buffers_in_use().for_inference()
    assert mean is layer.running_mean


def test_a_residual_too() -> None:
    torch.manual_seed(0)
    layer = bn.BatchNorm2d(3, act="relu")
    x, r = torch.randn(4, 3, 2, 2, requires_grad=True), torch.randn(4, 3, 2, 2, requires_grad=True)
    reference = nn.BatchNorm2d(3).eval()
    expected = torch.autograd.grad((reference(x) + r).relu().sum(), (x, r))
    y = layer.eval()(x, r)
    layer.train()(torch.randn(4, 3, 2, 2) + 7)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), (x, r)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
