"""What the tests of `lean` share: training two copies of a network side by side, and what forward keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.saved_tensors import _counter

Mode = Callable[[], AbstractContextManager[Any]]


def step(network: nn.Module, batches: Sequence[Tensor], mode: Mode = nullcontext) -> list[Tensor | None]:
    """The loss of each batch, and the gradients that they leave."""
    losses: list[Tensor] = []
    network.zero_grad()
    for inputs in batches:  # several of them accumulate
        with mode():
            loss = network(inputs).float().square().mean()
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(parameter.grad for parameter in network.parameters())]


def equal(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> bool:
    """Whether all tensors have the same bits; None is equal to None."""
    return len(left) == len(right) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def assert_equal_steps(
    network: nn.Module,
    inputs: Callable[[], Tensor],
    steps: int = 5,
    mode: Mode = nullcontext,
    accumulate: int = 1,
) -> bn.Lean:
    """Train two copies, one of them lean, on the same batches: losses, gradients and statistics are equal."""
    network = network.train()
    other = copy.deepcopy(network)
    record = bn.lean(other)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-3, momentum=0.9) for each in (network, other)]
    for _ in range(steps):
        batches = [inputs() for _ in range(accumulate)]
        state = torch.get_rng_state()
        plain = step(network, batches, mode)
        torch.set_rng_state(state)
        assert equal(plain, step(other, batches, mode))
        for optimizer in optimizers:
            optimizer.step()
    assert equal(list(network.buffers()), list(other.buffers()))
    assert record.aside is None
    assert record.bytes > 0
    return record


def kept_bytes(network: nn.Module, inputs: Tensor, mode: Mode = nullcontext) -> int:
    """Bytes of the distinct storages that forward keeps for backward, without parameters and buffers."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}

    def count(tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in owned:
            kept[address] = tensor.detach()

    def pack(tensor: Tensor) -> Tensor:
        count(tensor)
        return tensor.detach()

    with _counter.counting(count), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mode():
        output = network(inputs)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def share_saved(network: nn.Module, inputs: Tensor, mode: Mode = nullcontext) -> float:
    """How much less a lean forward keeps, as a share of what an ordinary one keeps."""
    plain, leaned = copy.deepcopy(network), copy.deepcopy(network)
    bn.lean(leaned)
    return 1 - kept_bytes(leaned, inputs, mode) / kept_bytes(plain, inputs, mode)
