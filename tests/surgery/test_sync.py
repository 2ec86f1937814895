"""sync changes the class of each layer and nothing else; what it leaves alone is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from processes import succeed


class Block(nn.Module):
    """A residual block, as converted models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Conv2d(4, 4, 3), bn.BatchNorm2d(4, act="silu"), nn.Flatten(), nn.LazyBatchNorm1d())


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_only_the_class_of_each_layer_changes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm1d(3, act="relu", accumulate=2), nn.SyncBatchNorm(3))
    model[0].register_forward_hook(lambda *_: None)
    model[1].eval()
    before = [(m.weight, m.running_var, dict(m._forward_hooks), m.training) for m in model]
    record = bn.sync(model)
    assert record.layers == ("0", "1", "2")
    assert str(record) == "3 batch norm layers synchronized"
    assert all(type(m) is bn.SyncBatchNorm for m in model)
    for layer, (weight, var, hooks, training) in zip(model, before, strict=True):
        assert layer.weight is weight
        assert layer.running_var is var
        assert dict(layer._forward_hooks) == hooks
        assert layer.training is training
    assert (model[1].act, model[1].accumulate) == ("relu", 2)


def test_skipped_layers_are_named() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), Scaled(3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3))
    bn.freeze(model[3])
    record = bn.sync(model)
    assert record.layers == ("0",)
    assert [each.name for each in record.skipped] == ["1", "2", "3"]
    assert "frozen" in str(record)
    assert "lazy" in str(record)
    assert bn.sync(model, also=[Scaled]).layers == ("0", "1")


def test_it_takes_a_module() -> None:
    with pytest.raises(TypeError, match=r"sync takes a torch\.nn\.Module, got dict"):
        bn.sync({})  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["convert", "sync"])
def test_converted_networks_stay_fused(first: str) -> None:
    """pytorch/pytorch#187298: convert_sync_batchnorm drops a fused activation without a word."""
    model = network()
    x = torch.randn(3, 4, 8, 8)
    model(x)
    wanted = copy.deepcopy(model)
    for change in (bn.convert, bn.sync) if first == "convert" else (bn.sync, bn.convert):
        change(model)
    assert sum(type(m) is bn.SyncBatchNorm for m in model.modules()) == 3
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), wanted.train(mode)(x), rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == wanted.state_dict().keys()


PROCESSES = """
import copy, json, os, sys
import torch, batchnorm as bn
from torch import distributed as dist
from test_sync import network
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
model = network()
x = torch.randn(5, 4, 8, 8)
model(x)
alone = copy.deepcopy(model)
bn.convert(model)
bn.sync(model)
halves = [dist.new_group([0]), dist.new_group([1])]
apart = copy.deepcopy(alone)
bn.sync(apart, process_group=halves[rank])
mine = x[:2] if rank == 0 else x[2:]
y, z = alone(x), model(mine)
y = y[:2] if rank == 0 else y[2:]
result = {"output": float((y - z).abs().max())}
result["statistics"] = max(float((a - b).abs().max()) for a, b in zip(alone.buffers(), model.buffers()))
lonely = copy.deepcopy(apart)
for norm in lonely.modules():
    if isinstance(norm, bn.SyncBatchNorm):
        norm.process_group = halves[rank]
result["group"] = float((apart(mine) - lonely(mine)).abs().max()) + float((apart(mine) - z).abs().max() < 1e-3)
print(json.dumps(result))
"""


@pytest.mark.slow
def test_over_processes_converted_networks_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for line in succeed(PROCESSES, 2, folder=tmp_path):
        result = json.loads(line)
        assert result["output"] < 1e-5
        assert result["statistics"] < 1e-5
        assert result["group"] == 0, "a group of one normalizes by itself"
