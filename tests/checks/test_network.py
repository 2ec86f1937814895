"""Layers are found by their names in models, state dicts and checkpoints, with what is known of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.checks import network
from batchnorm.checks.network import SourceError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
    )


def names(found: network.Network) -> list[str]:
    return [layer.name for layer in found.layers]


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["plain", "DataParallel"])
def test_of_a_model_with_its_settings(wrap: Any) -> None:
    model = net()
    model[4].eps, model[4].momentum = 1e-3, None
    found = network.of(wrap(model))
    assert names(found) == ["1", "4"]
    assert found.layers[0].settings["eps"] == 1e-5
    assert found.layers[0].settings["momentum"] == 0.1
    assert found.layers[1].settings["eps"] == 1e-3
    assert "momentum" not in found.layers[1].settings
    assert found.layers[0].settings["eps_known"]
    torch.testing.assert_close(torch.from_numpy(found.layers[0]["gamma"][0]).float(), model[1].weight.detach())


def deeper(state: dict[str, Any]) -> dict[str, Any]:
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}
    return {"model": {"net": wrapped}, "optimizer": {"state": {0: {"exp_avg": state["1.bias"]}}}}


NESTS = {
    "flat": lambda state: state,
    "state_dict": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
    "deeper": deeper,
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_of_a_state_dict_however_it_is_nested(nest: Any) -> None:
    found = network.of(nest(net().state_dict()))
    assert names(found) == ["1", "4"]
    assert not found.layers[0].settings["eps_known"]
    assert found.layers[0].settings["batches"] == 0


def test_copies_are_told_apart_and_the_layers_keep_their_names() -> None:
    state = net().state_dict()
    assert names(network.of({"model": state, "ema": state})) == ["model: 1", "model: 4", "ema: 1", "ema: 4"]


def test_a_layer_alone() -> None:
    assert names(network.of(nn.BatchNorm1d(3).state_dict())) == [""]
    assert names(network.of(nn.BatchNorm1d(3))) == [""]


def test_tensors_in_mappings_by_layer() -> None:
    state = {"encoder": {"bn": dict(nn.BatchNorm1d(3).state_dict())}, "bn2": dict(nn.BatchNorm1d(3).state_dict())}
    assert sorted(names(network.of(state))) == ["(top): bn2", "encoder: bn"]


def test_kerass_names_in_arrays() -> None:
    weights = {
        f"block/bn/{name}:0": np.ones(3, np.float32) for name in ("gamma", "beta", "moving_mean", "moving_variance")
    }
    (layer,) = network.of(weights).layers
    assert (layer.name, layer.settings["framework"], layer.settings["eps"]) == ("block/bn", "Keras", 1e-3)
    assert layer.settings["batches"] is None


def test_a_bias_right_before_a_norm_is_known() -> None:
    below = [layer.settings["below"] for layer in network.of(net()).layers]
    assert below[0][0] == "0.bias"
    assert below[0][1] > 0
    assert below[1] is None


def test_shapes_that_do_not_fit_are_kept_and_their_values_left_out() -> None:
    state = net().state_dict()
    state["1.weight"] = torch.ones(5)
    del state["4.running_mean"]
    first, second = network.of(state).layers
    assert first.settings["shapes"]["gamma"] == (5,)
    assert np.isnan(first["gamma"]).all()
    assert second.settings["shapes"]["running_mean"] is None


def test_without_beta_it_is_0_and_without_both_nothing_is_learned() -> None:
    (one,) = network.of(bn.BatchNorm2d(4, bias=False)).layers
    assert (one["beta"] == 0).all()
    (other,) = network.of(nn.BatchNorm2d(4, affine=False)).layers
    assert not other.settings["affine"]
    assert np.isnan(other["gamma"]).all()


def test_instance_norms_and_layer_norms_are_none() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(4, track_running_stats=True, affine=True), nn.LayerNorm(4), nn.GroupNorm(2, 4)
    )
    assert network.of(model).layers == ()


def test_a_mapping_inside_itself_ends() -> None:
    state: dict[str, Any] = {"bn": dict(nn.BatchNorm1d(3).state_dict())}
    state["again"] = state
    assert len(network.of(state).layers) == 1


@pytest.mark.parametrize("given", [3, None, [1, 2], {}, {"lr": 0.1}])
def test_what_is_nothing_to_check_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(SourceError, match=r"^(check takes|the mapping holds no tensors)") as error:
        network.of(given)
    assert "\n" not in str(error.value)


def test_meta_tensors_have_no_values() -> None:
    with pytest.raises(SourceError, match="meta"):
        network.of(nn.BatchNorm1d(3, device="meta"))
