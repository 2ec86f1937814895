"""Random small networks: no gradient differs, or the error is PyTorch's."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from leaning import equal
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from randomness import SEED

CHANNELS, SIZE = 4, 6
IN_PLACE = "modified by an inplace operation"
ACTS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    torch.relu_,
    F.silu,
    torch.sigmoid,
    F.gelu,
    torch.tanh,
    lambda x: F.relu6(x, inplace=True),
    lambda x: F.relu(x, True),
    lambda x: F.hardswish(x, inplace=True),
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: F.elu(x),
    lambda x: x.relu(),
    lambda x: x.clamp(min=0),
    lambda x: x.mul_(0.5),
    lambda x: x + 1,
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: x.double().float(),
]


class Net(nn.Module):
    """A random program over tensors of one shape, drawn once and run in every forward."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.program: list[tuple[Any, ...]] = []
        steps = [
            *("norm", "ours", "conv", "act") * 3,
            *("add", "iadd", "mul", "cat", "pad", "pool", "view", "slice", "hidden", "detach", "hook", "drop"),
            *("fused", "checkpoint", "no_grad", "twice", "reflect", "flat"),
        ]
        for _ in range(draw.randrange(6, 24)):
            kind = draw.choice(steps)
            if kind in ("conv", "cat", "pad", "checkpoint", "reflect"):
                inputs = 2 * CHANNELS if kind == "cat" else CHANNELS
                padded = 0 if kind in ("pad", "reflect") else 1
                self.convs.append(nn.Conv2d(inputs, CHANNELS, 3, padding=padded, bias=draw.random() < 0.5))
            if kind in ("norm", "checkpoint", "twice"):
                self.norms.append(nn.BatchNorm2d(CHANNELS, affine=draw.random() < 0.8))
            if kind in ("ours", "fused"):
                act = draw.choice([None, "relu", "silu", "relu6", "sigmoid"])
                self.norms.append(bn.BatchNorm2d(CHANNELS, act=act))
            if kind in ("norm", "ours") and draw.random() < 0.1:
                self.norms[-1].eval()
            layers = (len(self.convs) - 1, len(self.norms) - 1)
            self.program.append((kind, *layers, draw.randrange(100), draw.randrange(100), draw.choice(ACTS)))

    def train(self, mode: bool = True) -> Net:
        """Do not touch the layers that are in eval mode."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        pool = [self.start(x)]
        for kind, conv, norm, first, second, act in self.program:
            # mostly the last tensor, so that chains are long
            a = pool[-1] if first < 70 else pool[first % len(pool)]
            b = pool[second % len(pool)]
            pool.append(self.run(kind, conv, norm, a, b, act))
        return torch.cat([tensor.flatten() for tensor in pool[-3:]])

    def start(self, x: Tensor) -> Tensor:
        return x * 1

    def run(self, kind: str, conv: int, norm: int, a: Tensor, b: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        if kind in ("norm", "ours"):
            return self.norms[norm](a)
        if kind == "fused":
            return self.norms[norm](a, b)
        if kind == "twice":
            return self.norms[norm](self.norms[norm](a))
        if kind == "conv":
            return self.convs[conv](a)
        if kind == "act":
            return act(a)
        if kind == "add":
            return a + b
        if kind == "iadd":
            a += b
            return a
        if kind == "mul":
            return a * b.mean((2, 3), keepdim=True)
        if kind == "cat":
            return self.convs[conv](torch.cat([a, b], 1))
        if kind in ("pad", "reflect"):
            mode = "constant" if kind == "pad" else "reflect"
            return self.convs[conv](F.pad(a, (1, 1, 1, 1), mode=mode))
        if kind == "pool":
            return F.max_pool2d(a, 3, 1, 1)
        if kind == "view":
            return F.silu(a.view(a.shape[0], -1)).view(a.shape) if a.is_contiguous() else a
        if kind == "flat":
            return a.transpose(2, 3).square()
        if kind == "slice":
            return F.silu(torch.cat([a[:, :2], b[:, 2:]], 1))
        if kind == "hidden":
            a.detach().mul_(0.5)  # in place, and autograd's graph does not show it
            return a
        if kind == "detach":
            return a.detach() + b
        if kind == "hook":
            a.register_hook(lambda grad: grad * 2) if a.requires_grad else None
            return a
        if kind == "drop":
            return F.dropout(a, 0.3)
        if kind == "checkpoint":
            return checkpoint(lambda x: F.relu(self.norms[norm](self.convs[conv](x))), a, use_reentrant=False)
        assert kind == "no_grad"
        with torch.no_grad():
            return F.relu(a) + b


def outcome(network: Net, x: Tensor) -> tuple[list[Tensor | None], str]:
    """Loss and gradients, and the error instead."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    try:
        loss = network(x).square().mean()
        loss.backward()
    except RuntimeError as error:
        return [], str(error)
    return [loss.detach(), x.grad, *(parameter.grad for parameter in network.parameters())], ""


@pytest.mark.parametrize("block", range(6))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.usefixtures("kernel_route")
def test_random_networks(block: int, layout: torch.memory_format) -> None:
    saved = compared = stricter = 0
    for number in range(20):
        seed = SEED + 20 * block + number
        torch.manual_seed(seed)
        network = Net(seed).to(memory_format=layout)  # type: ignore[call-overload]
        other = copy.deepcopy(network)
        record = bn.lean(other)
        for _ in range(2):
            x = torch.randn(3, CHANNELS, SIZE, SIZE).to(memory_format=layout)
            expected, error = outcome(network, x)
            found, other_error = outcome(other, x)
            if not error:
                if IN_PLACE in other_error:  # of a tensor that the batch norm saved, and whose backward did not run
                    stricter += 1
                    continue
                assert other_error == "", f"{seed} {network.program}"
                assert equal(expected, found), f"{seed} {network.program}"
                compared += 1
            elif other_error:
                assert IN_PLACE in error or error == other_error, seed
                assert IN_PLACE in other_error or error == other_error, seed
            saved += record.bytes > 0
    assert compared > 5
    assert stricter < 3
    assert saved > 5
