"""What a tool returns reads as its text wherever it is shown, and its class has a name to annotate with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.records import Record


def network(name: str = "norm") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    model.add_module(name, nn.BatchNorm2d(4))
    model.add_module("act", nn.ReLU())
    model(torch.randn(4, 3, 6, 6))
    return model


X = torch.randn(4, 3, 6, 6)
MADE: dict[str, Callable[[nn.Module], object]] = {
    "Checkup": bn.check,
    "Explanation": bn.explain,
    "Conversion": bn.convert,
    "Reversion": lambda model: (bn.convert(model), bn.revert(model))[1],
    "Folding": lambda model: bn.fold(model.eval(), X),
    "Freezing": bn.freeze,
    "Memory": lambda model: bn.memory(model, X),
    "Packing": lambda model: bn.to_onednn(model.eval(), X),
    "Recalibration": lambda model: bn.recalibrate(model, [X]),
    "Comparison": lambda model: bn.compare(model, X),
    "Undoing": lambda model: bn.undo(model, [X]),
    "Averaging": lambda model: bn.average(model, [model.state_dict()], [X]),
    "Pooling": bn.pool_statistics,
    "PooledStates": lambda model: bn.pool_states([model]),
    "Syncing": bn.sync,
    "Repairing": lambda model: bn.repair(model, [copy.deepcopy(model)], [X]),
    "Replacing": bn.to_group_norm,
}


def made(name: str, model: nn.Module) -> object:
    return MADE[name](model)


def test_adapting_too() -> None:
    with bn.adapt(network().eval()) as done:
        assert type(done) is bn.Adapting
        assert repr(done) == str(done)


@pytest.mark.parametrize("name", MADE)
def test_print_and_repr_are_the_summary(name: str) -> None:
    record = made(name, network())
    assert isinstance(record, Record)
    assert type(record) is getattr(bn, name)
    assert repr(record) == str(record)
    assert not repr(record).startswith(f"{name}(")


@pytest.mark.parametrize("name", MADE)
def test_in_a_notebook_names_stay_text(name: str) -> None:
    html = made(name, network("<script>alert(1)</script>"))._repr_html_()  # type: ignore[attr-defined]
    assert "<script>" not in html
    assert html.startswith(("<pre", "<table"))


def test_the_model_shows_what_was_fused() -> None:
    model = network()
    before = repr(model)
    bn.convert(model)
    assert "fused with relu" in repr(model)
    assert "fused with relu" in repr(copy.deepcopy(model))
    bn.convert(model, fuse=False)
    assert "fused" not in repr(model)
    bn.convert(model)
    done = bn.revert(model)
    assert repr(model) == before
    assert str(done) == (
        "1 batch norm layer reverted to torch.nn: norm\n1 module with the original methods: (the model)"
    )
    assert str(bn.revert(model)) == "nothing to revert: no layer was converted"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


def test_a_residual_is_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Residual()
    bn.convert(model)
    assert "fused with residual and relu" in repr(model)
