"""Models without this package: the same numbers, and they load where it cannot be imported."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import WITHOUT_NORMS, ZOO, Kind

import batchnorm as bn
from batchnorm.activations import ACTIVATIONS
from batchnorm.surgery import convert
from batchnorm.surgery import to_group_norm as replacing
from batchnorm.surgery.freeze import freeze, unfreeze
from batchnorm.surgery.to_group_norm import to_group_norm
from batchnorm.surgery.to_torch import to_torch


class Own(bn.BatchNorm2d):
    """A user's subclass of this package's layer."""


def ours() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        bn.BatchNorm2d(4, act="relu"),
        nn.Conv2d(4, 4, 1),
        bn.BatchNorm2d(4, momentum=None, eps=1e-3),
        nn.Sequential(bn.BatchNorm2d(4, act="leaky_relu", negative_slope=0.3, affine=False), nn.BatchNorm2d(4)),
        bn.BatchNorm2d(4, track_running_stats=False, bias=False),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 4)
    model(images())
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6)


def assert_same(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    for mode in (True, False):
        found = []
        for one in (model.train(mode), other.train(mode)):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(7)
            y = one(leaf)
            y.square().sum().backward()
            found.append((y, leaf.grad, list(one.state_dict().values())))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def native(model: nn.Module) -> bool:
    return not any(base.__module__.startswith("batchnorm") for m in model.modules() for base in type(m).__mro__)


def test_our_layers_become_torchs() -> None:
    model = ours()
    other = copy.deepcopy(model)
    parameters = list(model.parameters())
    record = to_torch(model)
    assert native(model)
    assert [type(each) for each in model] == [
        nn.Conv2d,
        nn.Sequential,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Sequential,
        nn.BatchNorm2d,
    ]
    assert_same(model, other, images())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert repr(model[4][0]) == repr(
        nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.LeakyReLU(0.3)),
    )
    assert (model[3].eps, model[3].momentum) == (1e-3, None)
    assert vars(model[3]).keys() == vars(nn.BatchNorm2d(4)).keys()
    assert vars(model[1]).keys() == vars(nn.Sequential()).keys()
    assert [layer.now for layer in record.layers] == [
        "torch.nn.Sequential(BatchNorm2d, ReLU)",
        "torch.nn.BatchNorm2d",
        "torch.nn.Sequential(BatchNorm2d, LeakyReLU)",
        "torch.nn.BatchNorm2d",
    ]
    assert "BatchNorm2d → torch.nn.Sequential(BatchNorm2d, ReLU): 1" in str(record)


def test_renamed_keys_load_old_checkpoints() -> None:
    model = ours()
    old = copy.deepcopy(model.state_dict())
    record = to_torch(model)
    assert record.renamed["1.weight"] == "1.0.weight"
    assert record.renamed["4.0.running_mean"] == "4.0.0.running_mean"
    assert "3.weight" not in record.renamed
    assert ", 8 keys renamed, as 1.weight → 1.0.weight" in str(record)
    renamed = {record.renamed.get(key, key): value for key, value in old.items()}
    assert list(renamed) == list(model.state_dict())
    model.load_state_dict(renamed, strict=True)


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("group", [False, True])
def test_every_activation(act: str | None, group: bool) -> None:
    layer = bn.BatchNorm1d(4, act=act, negative_slope=0.2)
    if group:
        to_group_norm(layer)
    other = copy.deepcopy(layer)
    to_torch(layer)
    assert native(layer)
    assert_same(layer, other, torch.randn(5, 4))


@WITHOUT_NORMS
@pytest.mark.parametrize("kind", ZOO.values(), ids=ZOO)
def test_converted_models_are_what_they_were(kind: Kind) -> None:
    torch.manual_seed(0)
    model = kind.make()
    x = torch.randn(kind.shape)
    model(x)
    other = copy.deepcopy(model)
    bn.convert(model)
    record = to_torch(model)
    assert {name: type(m) for name, m in model.named_modules()} == {n: type(m) for n, m in other.named_modules()}
    assert record.renamed == {}
    assert_same(model, other, x)
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in other.modules()]


def test_a_converted_layer_whose_activation_was_set() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh())
    bn.convert(model)
    model[1].act = "relu"
    other = copy.deepcopy(model)
    to_torch(model)
    assert native(model)
    assert isinstance(model[1][1], nn.ReLU)
    assert_same(model, other, images())


@pytest.mark.slow
def test_it_loads_without_the_package(tmp_path: Path) -> None:
    model = ours().eval()
    to_group_norm(model[4][1])
    model.append(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).eval())
    bn.convert(model)
    code = (
        "import sys, torch\n"
        "class Absent:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'batchnorm': raise ImportError('batchnorm is not installed')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)\n"
        "print('same')\n"
    )
    x = images()
    y = model(x)
    file = tmp_path / "model.pt"
    run = [sys.executable, "-c", code, str(file)]
    torch.save((model, x, y), file)
    assert "batchnorm is not installed" in subprocess.run(run, capture_output=True, text=True, check=False).stderr
    to_torch(model)
    torch.save((model, x, y), file)
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr


def test_hooks_stay_on_the_layer() -> None:
    layer = bn.BatchNorm1d(4, act="relu")
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.min() >= 0))
    to_torch(layer)
    layer(torch.randn(5, 4))
    assert seen == [True]


def test_a_residual_cannot_be_expressed() -> None:
    layer = bn.BatchNorm1d(4)
    x = torch.randn(5, 4)
    layer(x, x)
    to_torch(layer)
    with pytest.raises(TypeError, match="positional argument"):
        layer(x, x)


def test_frozen_layers_are_refused_before_anything_changes() -> None:
    for model in (ours(), nn.Sequential(nn.BatchNorm1d(4), bn.BatchNorm1d(4))):
        freeze(model)
        before = {name: (type(m), m.__dict__) for name, m in model.named_modules()}
        with pytest.raises(ValueError, match=r"to_torch changed nothing.*1 is frozen: unfreeze it first"):
            to_torch(model)
        assert {name: (type(m), m.__dict__) for name, m in model.named_modules()} == before
        unfreeze(model)
        to_torch(model)
        assert native(model)


def test_all_obstacles_are_named() -> None:
    model = nn.ModuleDict({"lazy": bn.LazyBatchNorm1d(), "own": Own(4, act="relu"), "fine": bn.BatchNorm1d(4)})
    with pytest.raises(ValueError, match=r"lazy \(LazyBatchNorm1d\) cannot .*: lazy.*; own \(Own\) cannot .*subclass"):
        to_torch(model)
    assert type(model["fine"]) is bn.BatchNorm1d
    del model["lazy"]
    other = copy.deepcopy(model)
    to_torch(model, also=[Own])
    assert native(model)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(model["own"](x), other["own"](x))


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours()
    model.append(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    bn.convert(model)
    before = {name: (type(m), m.__dict__) for name, m in model.named_modules()}
    for module, at in ((replacing, 2), (convert, 1)):
        calls = []
        set_class = module.set_class

        def interrupted(*given: Any, calls: list = calls, at: int = at, set_class: Any = set_class) -> None:
            calls.append(given)
            if len(calls) == at:
                raise KeyboardInterrupt
            set_class(*given)

        with monkeypatch.context() as patch:
            patch.setattr(module, "set_class", interrupted)
            with pytest.raises(KeyboardInterrupt):
                to_torch(model)
        assert {name: (type(m), m.__dict__) for name, m in model.named_modules()} == before


def test_mistakes() -> None:
    with pytest.raises(TypeError, match=r"to_torch takes a torch.nn.Module, got str"):
        to_torch("model.pt")
    record = to_torch(nn.Sequential(nn.BatchNorm1d(3)))
    assert (record.layers, str(record)) == ((), "0 layers replaced")
