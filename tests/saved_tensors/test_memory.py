"""memory(): what forward keeps, counted by storages, by layer and kind; and that nothing is different afterwards."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.saved_tensors._counter import current
from randomness import SEED


def network() -> nn.Sequential:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


X = torch.randn(2, 3, 16, 16)
PLANE = 2 * 16 * 16 * 4
"""Bytes of one channel of a batch."""


def by(record: bn.Memory) -> dict[tuple[str, str], int]:
    return {(entry.layer, entry.kind): entry.bytes for entry in record.entries}


def test_each_storage_counts_under_the_first_layer_that_saves_it() -> None:
    record = bn.memory(network(), X)
    found = by(record)
    assert found[("0", "convolution")] == 3 * PLANE
    assert 8 * PLANE <= found[("1", "norm")] < 9 * PLANE  # with mean and rstd
    assert found[("2", "activation")] == 8 * PLANE
    assert ("3", "convolution") not in found  # its input is the output of the activation
    assert record.total == sum(found.values())
    assert record.by_kind["activation"] == 8 * PLANE
    assert list(record.by_layer)[-1] == "0"


def test_a_fused_network_stays_fused() -> None:
    model = network()
    bn.convert(model)
    found = by(bn.memory(model, torch.randn(8, 3, 64, 64)))  # large enough for the kernels
    assert ("2", "activation") not in found
    assert found[("3", "convolution")] == 8 * (8 * 64 * 64 * 4)


def test_parameters_and_buffers_are_not_counted() -> None:
    frozen = nn.BatchNorm1d(3).eval()
    record = bn.memory(frozen, torch.randn(5, 3))
    assert record.total == 5 * 3 * 4  # x alone, not running_mean and running_var
    assert not record.training
    small, large = (bn.memory(nn.Linear(6, outputs), torch.randn(4, 6)).total for outputs in (2, 200))
    assert small == large == 4 * 6 * 4


def test_a_mask_is_a_mask() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x > 0, x, 0.1 * x)

    record = bn.memory(nn.Sequential(nn.Linear(4, 8), Masked()), torch.randn(3, 4))
    assert by(record)[("1", "mask")] == 3 * 8


def test_functions_and_other_layers_are_of_other_kinds() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.map(x)) * 2

    found = by(bn.memory(nn.Sequential(Block(), nn.Softmax(1), nn.GroupNorm(2, 8)), torch.randn(3, 4)))
    assert found[("0.map", "convolution")] == 3 * 4 * 4
    assert found[("0", "other")] == 3 * 8 * 4
    assert found[("1", "activation")] == 3 * 8 * 4
    assert ("2", "norm") in found


def test_a_tensor_that_is_freed_within_the_forward_is_not_counted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                (self.map(x) ** 2).exp()  # dropped, and its memory is used again
            return self.map(x)

    assert bn.memory(Twice(), torch.randn(64, 4)).total == 64 * 4 * 4


def test_views_and_empty_tensors_share_and_add_nothing() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = x[:, :2], x[:, 2:]
            return left.sin() + right.cos() + x[:0].exp().sum()

    assert bn.memory(nn.Sequential(nn.Linear(3, 4), Halves()), torch.randn(5, 3)).by_layer["1"] == 5 * 4 * 4


def test_sparse_tensors_have_the_size_of_their_parts() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sparse.mm(x.to_sparse(), self.weight)

    record = bn.memory(Sparse(), torch.eye(4))
    assert record.total == 4 * 4 + 2 * 4 * 8


@pytest.mark.parametrize(
    "batch", [X, (X, torch.zeros(2)), [X], {"input": X}], ids=["tensor", "tuple", "list", "mapping"]
)
def test_batches_are_those_of_the_other_tools(batch: object) -> None:
    assert bn.memory(network(), batch).total == bn.memory(network(), X).total


def test_forward_fn_runs_the_model_and_its_loss_counts() -> None:
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    record = bn.memory(network(), (X, labels), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert record.total > bn.memory(network(), X).total


def test_nothing_is_different_afterwards() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5), nn.BatchNorm2d(4))
    model[2].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    x = X.clone()
    bn.memory(model, x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is one for parameter, one in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(x, X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert current() is None


def test_measuring_keeps_nothing() -> None:
    """Activations of a large network that stay in memory end a measurement a few networks later."""
    model = network()
    bn.convert(model)
    images = torch.randn(8, 3, 64, 64)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    before = tensors()
    for _ in range(3):
        bn.memory(model, images)
    assert tensors() == before


def test_it_measures_without_gradients_around_and_in_inference_mode() -> None:
    model = network()
    expected = bn.memory(model, X).total
    with torch.no_grad():
        assert bn.memory(model, X).total == expected
    with torch.inference_mode():
        assert bn.memory(model, X.clone()).total == expected


def test_autocast_of_the_caller_holds() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert bn.memory(network(), X).total < bn.memory(network().double(), X.double()).total


def test_a_lazy_model_stays_lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(8), bn.LazyBatchNorm1d())
    assert bn.memory(model, torch.randn(4, 3)).total > 0
    assert type(model[0]) is nn.LazyLinear


def test_of_a_checkpointed_part_only_the_input_is_counted() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inside, x, use_reentrant=False)

    assert bn.memory(Checkpointed(), X).total == 3 * PLANE


def test_what_lean_reports_is_counted_and_under_the_layer_that_runs() -> None:
    class Reports(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda packed: packed):
                return x.sin()

        def pack(self, tensor: torch.Tensor) -> torch.Tensor:
            count = current()
            if count is not None:
                count(tensor)
            return tensor.detach()

    assert by(bn.memory(nn.Sequential(nn.Linear(3, 4), Reports()), torch.randn(5, 3)))[("1", "other")] == 5 * 4 * 4


def test_what_lean_keeps_is_counted_and_nothing_else() -> None:
    model, images = network(), torch.randn(8, 3, 64, 64)
    bn.convert(model)
    everything = bn.memory(model, images)
    with bn.lean(model) as record:
        less = bn.memory(model, images)
    output = 8 * 8 * 64 * 64 * 4
    assert everything.total - less.total == record.bytes == output
    assert by(less)[("0", "convolution")] == images.nbytes
    assert by(less)[("1", "norm")] == by(everything)[("1", "norm")]
    assert bn.memory(model, images) == everything


def test_a_shared_layer_has_its_first_name_and_the_wrapped_model_its_own_names() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert {entry.layer for entry in bn.memory(nn.DataParallel(model), torch.randn(2, 4)).entries} == {"0", "1"}


def test_the_record_prints_its_total_its_kinds_and_the_largest_layers() -> None:
    record = bn.memory(network(), torch.randn(64, 3, 32, 32))
    lines = str(record).splitlines()
    assert lines[0] == "4.8 MiB kept by one forward in training mode, in 5 storages"
    assert lines[1] == "       2.0 MiB   42%  saved by norms"
    assert lines[4] == "the 3 layers that keep most, of 3"
    assert lines[5] == "       2.0 MiB  1 (BatchNorm2d)"
    assert record.as_dict()["bytes"] == record.total == sum(e["bytes"] for e in record.as_dict()["entries"])
    assert str(bn.memory(nn.ReLU(), X)) == "0.0 KiB kept by one forward in training mode, in 0 storages"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"memory takes a torch.nn.Module, got str"):
        bn.memory("resnet", X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a batch is a tensor, a tuple or list"):
        bn.memory(network(), 3)
    with pytest.raises(TypeError, match="got an empty"):
        bn.memory(network(), [])
    with pytest.raises(TypeError, match="forward_fn must be a function"):
        bn.memory(network(), X, "forward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a part of the model is compiled"):
        bn.memory(nn.Sequential(torch.compile(network(), backend="eager")), X)


def test_an_error_of_the_model_leaves_it_and_counts_no_longer() -> None:
    model = network()
    before = model[1].num_batches_tracked.clone()
    with pytest.raises(RuntimeError, match="channels"):
        bn.memory(model, torch.randn(2, 5, 8, 8))
    model.append(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        bn.memory(model, X)
    assert torch.equal(model[1].num_batches_tracked, before)
    assert current() is None
