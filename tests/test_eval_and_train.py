"""eval() and train() between a forward and its backward: the gradient is that of the forward, at every size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.running_stats import eval_averages

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


PARTITIONED = "aot_eager_decomp_partition"
"""As the default backend divides a graph into forward and backward, without the minutes that it takes to compile."""


ROUTES = [
    *(("eager", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    *((route, torch.float32) for route in ("compiled", "compiled, then eager", "eager, then compiled")),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize(("route", "dtype"), ROUTES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("what", ["function", "layer"])
def test_by_the_function_and_compiled_too(what: str, shape: tuple[int, ...], route: str, dtype: torch.dtype) -> None:
    """The function saved the buffers themselves; a compiled backward copied them again, after they had changed."""
    torch.manual_seed(0)
    layer = bn.BatchNorm2d(shape[1], act="silu", dtype=dtype)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    x, other = torch.randn(shape).to(dtype), (torch.randn(shape) * 3 + 5).to(dtype)
    fixed = [t.double().clone() for t in (layer.running_mean, layer.running_var)]
    wide = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    z = nn.functional.batch_norm(wide[0], *fixed, *wide[1:])
    expected = torch.autograd.grad(nn.functional.silu(z).square().sum(), wide)

    def by_function(x: torch.Tensor) -> torch.Tensor:
        held = layer.running_mean, layer.running_var, layer.weight, layer.bias
        return bn.functional.batch_norm(x, *held, layer.training, act="silu")

    eager = by_function if what == "function" else layer
    torch._dynamo.reset()
    compiled = torch.compile(eager, backend=PARTITIONED, fullgraph=True) if route != "eager" else eager
    first, second = (eager if name == "eager" else compiled for name in (route.split(", then ") * 2)[:2])
    layer.eval()
    inputs = x.requires_grad_(), layer.weight, layer.bias
    y = first(x)
    layer.train()
    second(other)
    assert not torch.equal(layer.running_mean.double(), fixed[0])
    close = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for ours, right in zip(torch.autograd.grad(y.square().sum(), inputs), expected, strict=True):
        assert (ours - right).abs().max() <= close * right.abs().max()


def test_without_gradients_nothing_is_copied() -> None:
    averages = torch.zeros(3), torch.ones(3)
    with torch.no_grad():
        assert eval_averages(averages) is averages
    assert eval_averages(averages)[0] is not averages[0]


def test_what_is_exported_normalizes_by_the_buffers_themselves() -> None:
    """Tools that fold a batch norm of an exported graph look for its buffers."""
    exported = torch.export.export(nn.Sequential(bn.BatchNorm2d(3, act="relu")).eval(), (torch.randn(2, 3, 4, 4),))
    names = {node.target.name() for node in exported.graph.nodes if node.op == "call_function"}
    assert names == {"aten::batch_norm", "aten::relu"}


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
