"""Group norms in the place of batch norms: the parameters, the groups, and what stays as it was."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from zoo import WITHOUT_NORMS, ZOO, Kind

import batchnorm as bn
from batchnorm.activations import ACTIVATIONS
from batchnorm.surgery import to_group_norm as replacing
from batchnorm.surgery.freeze import freeze
from batchnorm.surgery.to_group_norm import GroupNorm, to_group_norm


def swapped(model: nn.Module) -> nn.Module:
    """The same model with torch.nn.GroupNorm modules put in by hand."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                channels = child.num_features
                groups = max(n for n in range(1, channels // 2 + 1) if channels % n == 0 and n <= 32)
                group_norm = nn.GroupNorm(groups, channels, child.eps, affine=child.affine).to(torch.float64)
                if child.affine:
                    group_norm.load_state_dict({"weight": child.weight, "bias": child.bias})
                setattr(parent, name, group_norm)
    return model


@WITHOUT_NORMS
@pytest.mark.parametrize("kind", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("converted", [False, True])
def test_a_model_computes_what_hand_made_surgery_gives(kind: Kind, converted: bool) -> None:
    torch.manual_seed(0)
    model = kind.make().double()
    x = torch.randn(kind.shape, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 4)
    expected = swapped(model)
    before = dict(model.named_parameters())
    names = list(dict(model.named_modules()))
    if converted:
        bn.convert(model)
    record = to_group_norm(model)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(dict(model.named_modules())) == names
    assert len(record.layers) == sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert list(model.state_dict()) == list(expected.state_dict())
    for mode in (True, False):
        found = []
        for one in (model.train(mode), expected.train(mode)):
            torch.manual_seed(7)
            leaf = x.clone().requires_grad_()
            y = one(leaf)
            y.square().sum().backward()
            found.append((y, leaf.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
    bn.revert(model)
    assert not any(type(m).__module__.startswith("batchnorm") for m in model.modules())


def test_story_28_one_channel_a_group_erases_the_data() -> None:
    """pytorch/opacus#319, #567: gcd(32, C) groups, of one channel each, leave beta alone of (N, C) input."""
    x = torch.randn(6, 4)
    erased = nn.GroupNorm(math.gcd(32, 4), 4)(x)
    assert erased.abs().max() < 1e-3
    model = nn.Sequential(nn.BatchNorm1d(4))
    record = to_group_norm(model)
    assert record.layers[0].now == "GroupNorm of 2 groups"
    assert model(x).abs().min() > 0.1
    assert torch.equal(model(x)[:2], model(x[:2])), "no sample depends on another"


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [(64, 32, 32), (32, 32, 16), (48, 32, 24), (7, 32, 1), (6, 4, 3), (2, 32, 1), (64, 1, 1), (96, 10**12, 48)],
)
def test_the_number_of_groups(channels: int, groups: int, expected: int) -> None:
    layer = nn.BatchNorm2d(channels)
    to_group_norm(layer, groups)
    assert type(layer) is nn.GroupNorm
    assert (layer.num_groups, layer.num_channels) == (expected, channels)


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_act_and_residual_stay(act: str | None) -> None:
    layer = bn.BatchNorm2d(4, eps=1e-3, act=act, negative_slope=0.2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    x, residual = torch.randn(2, 3, 4, 5, 5).unbind()
    model = nn.Sequential(layer)
    to_group_norm(model)
    assert type(layer) is GroupNorm
    z = F.group_norm(x, 2, layer.weight, layer.bias, 1e-3) + residual
    wanted = z if act is None else F.leaky_relu(z, 0.2) if act == "leaky_relu" else getattr(F, act)(z)
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.fx.symbolic_trace(layer)):
        torch.testing.assert_close(module(x, residual), wanted)
    torch.testing.assert_close(model(x), layer(x, torch.zeros_like(x)))
    assert ("act" in repr(layer)) is (act is not None)


@pytest.mark.parametrize("affine", [True, False, "no beta"])
def test_the_affine_part(affine: bool | str) -> None:
    layer = bn.BatchNorm1d(4, affine=bool(affine), bias=affine is True)
    parameters = dict(layer.named_parameters())
    to_group_norm(layer)
    assert {name: id(p) for name, p in layer.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert layer.affine is bool(affine)
    assert not dict(layer.named_buffers())
    assert layer(torch.randn(3, 4)).shape == (3, 4)
    layer.reset_parameters()


def test_hooks_mode_attributes_and_sharing_stay() -> None:
    layer = nn.BatchNorm1d(4)
    layer.tag = "mine"
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    model = nn.ModuleDict({"a": layer, "b": layer}).eval()
    record = to_group_norm(model)
    assert [each.names for each in record.layers] == [("a", "b")]
    assert model["a"] is model["b"] is layer
    layer(torch.randn(2, 4))
    handle.remove()
    layer(torch.randn(2, 4))
    assert (calls, layer.tag, layer.training) == ([1], "mine", False)
    assert vars(layer).keys() == {*vars(nn.GroupNorm(1, 1)), "tag"}


def test_skipped_layers_are_named() -> None:
    class Own(nn.BatchNorm2d):
        pass

    make = {
        "frozen": nn.BatchNorm2d(4),
        "single": nn.BatchNorm1d(1),
        "picture": nn.BatchNorm2d(1),
        "lazy": nn.LazyBatchNorm2d(),
        "own": Own(4),
        "replaced": nn.BatchNorm2d(4),
    }
    model = nn.ModuleDict(make)
    freeze(model["frozen"])
    model["replaced"].forward = lambda x: x
    record = to_group_norm(model)
    assert [layer.names for layer in record.layers] == [("picture",)]
    reasons = {each.name: each.why for each in record.skipped}
    assert reasons.keys() == make.keys() - {"picture"}
    assert reasons["frozen"].startswith("frozen: no sample depends on the batch already")
    assert reasons["single"].startswith("one channel")
    assert to_group_norm(model, also=[Own]).layers[0].names == ("own",)
    assert "BatchNorm1d  left alone (one channel" in str(record)
    assert str(record).startswith("1 layer replaced\n   1  BatchNorm2d → GroupNorm of 1 group: picture")


def test_it_trains_on_with_the_optimizer_from_before() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bn.convert(model)
    to_group_norm(model)
    before = model[1].weight.clone()
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    before = [(type(layer), layer.__dict__) for layer in model]
    set_class = replacing.set_class

    def interrupted(module: nn.Module, cls: type, attributes: dict[str, Any]) -> None:
        if module is model[1]:
            raise KeyboardInterrupt
        set_class(module, cls, attributes)

    monkeypatch.setattr(replacing, "set_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_group_norm(model)
    assert [(type(layer), layer.__dict__) for layer in model] == before


def test_mistakes() -> None:
    with pytest.raises(TypeError, match=r"to_group_norm takes a torch.nn.Module, got Tensor"):
        to_group_norm(Tensor())
    with pytest.raises(ValueError, match="groups must be at least 1, not 0"):
        to_group_norm(nn.BatchNorm1d(4), 0)
    with pytest.raises(TypeError, match="groups must be an int, got float"):
        to_group_norm(nn.BatchNorm1d(4), 2.0)
    with pytest.warns(UserWarning, match="to_group_norm found no batch norm layer in it"):
        assert to_group_norm(nn.Linear(2, 2)).layers == ()


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_other_attributes_of_the_layer_stay(ours: bool, affine: bool) -> None:
    layer = (bn if ours else nn).BatchNorm2d(4, affine=affine)
    layer.register_buffer("extra", torch.ones(2))
    layer.register_buffer("passing", torch.ones(3), persistent=False)
    layer.register_parameter("alpha", nn.Parameter(torch.ones(1)))
    layer.child = nn.Linear(2, 2)
    layer.tag = "mine"
    model = nn.Sequential(layer)
    held = {name: id(tensor) for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
    bn.to_group_norm(model, groups=2)
    now = {name: id(tensor) for name, tensor in (*model[0].named_parameters(), *model[0].named_buffers())}
    assert now == {name: tensor for name, tensor in held.items() if "running" not in name and "tracked" not in name}
    assert "passing" not in model.state_dict()
    assert "0.extra" in model.state_dict()
    assert model[0].tag == "mine"
    assert model(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
