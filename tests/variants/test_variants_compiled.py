"""Each regime under torch.compile, without a graph break: the same outputs, gradients and running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn

NOW = {"rmax_steps": (0, 2), "dmax_steps": (0, 2)}
LAYERS: dict[str, Callable[[], Any]] = {
    "renorm": lambda: bn.BatchRenorm1d(4, **NOW),
    "renorm, cumulative": lambda: bn.BatchRenorm1d(4, momentum=None, act="relu", **NOW),
    "ghost": lambda: bn.GhostBatchNorm1d(4, 2),
    "domain": lambda: bn.DomainBatchNorm1d(4, 2),
    "batch of one": lambda: bn.BatchNorm1d(4, batch_of_one="running"),
    "sync, alone": lambda: bn.SyncBatchNorm(4, act="silu"),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_compiled_whole_it_is_the_same(make: Callable[[], Any]) -> None:
    """PyTorch recomputes in backward what it finds cheap: r and d of renorm would come from moved statistics."""
    torch.manual_seed(0)
    plain = make()
    layer = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(6, 4)
        y, z = plain(x), compiled(x)
        torch.testing.assert_close(z, y)
        (y.square().sum() + z.square().sum()).backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


def test_a_compiled_layer_follows_its_domain() -> None:
    torch._dynamo.reset()
    layer = bn.DomainBatchNorm1d(4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for number in (0, 1, 0, 2):
        with bn.domain(number):
            compiled(torch.randn(5, 4))
    assert [layer.num_batches_tracked, layer.num_batches_tracked_1, layer.num_batches_tracked_2] == [2, 1, 1]


def test_domains_are_chosen_inside_of_compiled_code() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.DomainBatchNorm1d(4, 2)

        def forward(self, clean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            with bn.domain(1):
                moved = self.norm(other)
            return self.norm(clean) + moved

    torch._dynamo.reset()
    net = Both()
    torch.compile(net, backend="aot_eager")(torch.randn(5, 4), torch.randn(5, 4) + 9)
    assert (net.norm.running_mean_1 > 0.5).all()
    assert (net.norm.running_mean.abs() < 0.5).all()


def test_lengths_compile() -> None:
    torch._dynamo.reset()
    layer = bn.BatchNorm1d(4)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    for length in (5, 6):
        x, lengths = torch.randn(3, 4, length), torch.tensor([5, 2, 0])
        torch.testing.assert_close(compiled(x, lengths=lengths), plain(x, lengths=lengths))
    torch.testing.assert_close(layer.running_var, plain.running_var)
