"""Every trainable parameter is in exactly one group, and gamma and beta are in theirs."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from zoo import WITHOUT_NORMS, ZOO, Kind

import batchnorm as bn
from batchnorm.surgery.freeze import freeze
from batchnorm.surgery.param_groups import param_groups


class Everything(nn.Module):
    """Parameters of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.lstm = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.token = nn.Parameter(torch.zeros(4))
        self.bias = nn.Parameter(torch.zeros(2, 2))
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm1d(4),
                nn.SyncBatchNorm(4),
                bn.BatchNorm2d(4, act="relu"),
                nn.InstanceNorm2d(4, affine=True),
                nn.GroupNorm(2, 4),
                nn.LayerNorm((2, 2)),
                nn.RMSNorm(4),
                nn.LocalResponseNorm(2),
                type("Own", (nn.BatchNorm2d,), {})(4),
                nn.BatchNorm2d(4, affine=False),
            ]
        )


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Positive(nn.Module):
    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.exp()


def named(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    """Names of the parameters in each group; fails where one is in two or in none."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    every = list(chain.from_iterable(group["params"] for group in groups))
    assert len(every) == len(set(every))
    assert set(every) == {p for p in model.parameters() if p.requires_grad}
    return {group["name"]: {names[p] for p in group["params"]} for group in groups}


def test_each_parameter_in_its_group() -> None:
    model = Everything()
    found = named(model, param_groups(model, 1e-4))
    with_affine = {f"norms.{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8)}
    assert found["gamma"] == {f"{name}.weight" for name in with_affine}
    assert found["beta"] == {f"{name}.bias" for name in with_affine - {"norms.6"}}
    assert found["biases"] == {
        "conv.bias",
        *("lstm.bias_ih_l0", "lstm.bias_hh_l0"),
        *("attention.in_proj_bias", "attention.out_proj.bias"),
    }
    assert {"token", "bias", "conv.weight", "attention.bias_k", "lstm.weight_ih_l0"} <= found["weights"]


@WITHOUT_NORMS
@pytest.mark.parametrize("kind", ZOO.values(), ids=ZOO)
def test_any_model_and_its_conversion(kind: Kind) -> None:
    model = kind.make()
    model(torch.randn(kind.shape))
    before = named(model, param_groups(model, 0.1))
    bn.convert(model)
    assert named(model, param_groups(model, 0.1)) == before
    assert before.get("gamma", set()) == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
    }


def test_story_12_gamma_decays_only_if_asked() -> None:
    """ultralytics/yolov5#4104: an optimizer given all parameters lets gamma decay. One step with zero gradients."""

    def step(make: object) -> dict[str, bool]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        before = copy.deepcopy(model.state_dict())
        optimizer = make(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return {name: not torch.equal(before[name], value) for name, value in model.named_parameters()}

    assert all(step(lambda model: torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)).values())
    moved = step(lambda model: torch.optim.SGD(param_groups(model, 0.1), 0.1))
    assert [name for name, did in moved.items() if did] == ["0.weight"]
    moved = step(lambda model: torch.optim.AdamW(param_groups(model, 0.0, gamma_decay=0.1, beta_decay=0.1), 0.1))
    assert [name for name, did in moved.items() if did] == ["1.weight", "1.bias"]
    moved = step(lambda model: torch.optim.SGD(param_groups(model, 0.0, bias_decay=0.1, lr=0.5), 0.1))
    assert [name for name, did in moved.items() if did] == ["0.bias"]


def test_options_and_decays_are_in_the_groups() -> None:
    groups = param_groups(Everything(), 0.1, gamma_decay=0.2, beta_decay=0.3, bias_decay=0.4, lr=0.5, nesterov=True)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("weights", 0.1),
        ("gamma", 0.2),
        ("beta", 0.3),
        ("biases", 0.4),
    ]
    assert all((group["lr"], group["nesterov"]) == (0.5, True) for group in groups)


def test_frozen_ones_and_empty_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    assert named(model, param_groups(model, 0.1)).keys() == {"weights", "gamma", "beta"}
    freeze(model, gamma=False)
    assert named(model, param_groups(model, 0.1)).keys() == {"weights", "gamma"}
    with pytest.warns(UserWarning, match="param_groups found no normalization layer in it"):
        assert param_groups(nn.ReLU(), 0.1) == []


def test_shared_parameters_are_in_one_group() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    model[3].weight = model[0].weight
    model[0].bias = model[1].bias
    model[3].bias = model[2].bias
    found = named(model, param_groups(model, 0.1))
    assert found == {"weights": {"0.weight"}, "gamma": {"1.weight"}, "beta": {"0.bias", "2.bias"}}


def test_parametrized_gamma() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    parametrize.register_parametrization(model[1], "weight", Positive())
    torch.nn.utils.parametrizations.weight_norm(model[0])
    found = named(model, param_groups(model, 0.1))
    assert found["gamma"] == {"1.parametrizations.weight.original"}
    assert found["weights"] == {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}


def test_norms_that_the_caller_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), ScaleNorm())
    with pytest.warns(UserWarning, match="param_groups found no normalization layer in it"):
        assert "gamma" not in named(model, param_groups(model, 0.1))
    assert named(model, param_groups(model, 0.1, also=[ScaleNorm]))["gamma"] == {"1.weight"}


def test_mistakes() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"1.weight is lazy and has no shape yet: run a batch through the model first"):
        param_groups(model, 0.1)
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got generator"):
        param_groups(model.parameters(), 0.1)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight decay of gamma must be finite and at least 0"):
            param_groups(model, 0.1, gamma_decay=wrong)
    with pytest.raises(TypeError, match="weight decay of weights must be a number, got str"):
        param_groups(model, "0.1")
    with pytest.raises(TypeError, match="sets 'params' of each group itself"):
        param_groups(model, 0.1, params=[])
