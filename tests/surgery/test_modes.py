"""Types, autocast, errors, and PyTorch's transformations over converted models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import BasicBlock, ResNet

import batchnorm as bn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_type(dtype: torch.dtype) -> None:
    stock = ResNet(BasicBlock(8, 8), out=8).to(dtype)
    model = copy.deepcopy(stock)
    bn.convert(model)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    y, other = model(x), stock(x)
    assert y.dtype == other.dtype
    torch.testing.assert_close(y, other, rtol=5e-2, atol=5e-2)


def test_autocast_gives_the_types_that_it_gave() -> None:
    stock = ResNet(BasicBlock(8, 8), out=8)
    model = copy.deepcopy(stock)
    bn.convert(model)
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, other = model(x), stock(x)
    assert y.dtype == other.dtype
    torch.testing.assert_close(y, other, rtol=5e-2, atol=5e-2)


def test_errors_are_those_of_the_layer() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    bn.convert(model)
    with pytest.raises(ValueError, match=r"BatchNorm2d expected 4D input \(got 3D input\)"):
        model(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 3, 1, 1))
    assert model[0].num_batches_tracked <= 1


def test_jit_trace_sees_every_module() -> None:
    model = ResNet(BasicBlock(8, 8), out=8).eval()
    stock = copy.deepcopy(model)
    bn.convert(model)
    x = torch.randn(2, 3, 6, 6)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), stock(x))
    assert any(node.kind() == "prim::CallMethod" for node in traced.layer1.graph.nodes())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # of torch.func's own use
def test_vmap_and_forward_mode() -> None:
    model = ResNet(BasicBlock(8, 8), out=8).eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    stock = copy.deepcopy(model)
    bn.convert(model)
    x = torch.randn(3, 2, 3, 6, 6)
    torch.testing.assert_close(torch.vmap(model)(x), torch.stack([stock(part) for part in x]))
    tangent = torch.ones_like(x[0])
    ours, theirs = (torch.func.jvp(m, (x[0],), (tangent,)) for m in (model, stock))
    torch.testing.assert_close(ours, theirs)
