"""Layers are found by their names in models, state dicts and checkpoints, with what is known of them."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.checks import sources
from batchnorm.checks.readers import CheckpointError
from batchnorm.checks.sources import SourceError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
    )


def names(found: sources.Network) -> list[str]:
    return [layer.name for layer in found.layers]


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["plain", "DataParallel"])
def test_of_a_model_with_its_settings(wrap: Any) -> None:
    model = net()
    model[4].eps, model[4].momentum = 1e-3, None
    found = sources.of(wrap(model))
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
    found = sources.of(nest(net().state_dict()))
    assert names(found) == ["1", "4"]
    assert not found.layers[0].settings["eps_known"]
    assert found.layers[0].settings["batches"] == 0


def test_copies_have_different_labels_and_layers_keep_their_names() -> None:
    state = net().state_dict()
    assert names(sources.of({"model": state, "ema": state})) == ["model: 1", "model: 4", "ema: 1", "ema: 4"]


def test_a_layer_alone() -> None:
    assert names(sources.of(nn.BatchNorm1d(3).state_dict())) == [""]
    assert names(sources.of(nn.BatchNorm1d(3))) == [""]


def test_tensors_in_mappings_by_layer() -> None:
    state = {"encoder": {"bn": dict(nn.BatchNorm1d(3).state_dict())}, "bn2": dict(nn.BatchNorm1d(3).state_dict())}
    assert sorted(names(sources.of(state))) == ["(top): bn2", "encoder: bn"]


def test_kerass_names_in_arrays() -> None:
    weights = {
        f"block/bn/{name}:0": np.ones(3, np.float32) for name in ("gamma", "beta", "moving_mean", "moving_variance")
    }
    (layer,) = sources.of(weights).layers
    assert (layer.name, layer.settings["framework"], layer.settings["eps"]) == ("block/bn", "Keras", 1e-3)
    assert layer.settings["batches"] is None


def test_a_bias_right_before_a_norm_is_known() -> None:
    below = [layer.settings["below"] for layer in sources.of(net()).layers]
    assert below[0][0] == "0.bias"
    assert below[0][1] > 0
    assert below[1] is None
    model = net()
    first, second = sources.of(model).layers
    np.testing.assert_array_equal(first["below"][0], model[0].bias.detach().numpy())
    assert np.isnan(second["below"]).all()


def test_modes_and_what_is_frozen_are_known_of_modules(tmp_path: Path) -> None:
    model = net().eval()
    model[1].train().requires_grad_(False)
    model[4].momentum = None
    torch.save(model, tmp_path / "model.pt")
    for given in (model, tmp_path / "model.pt"):
        first, second = (layer.settings for layer in sources.of(given).layers)
        assert (first["training"], first["frozen"], "cumulative" in first) == (True, True, False)
        assert (second["training"], second["frozen"], second["cumulative"]) == (False, False, True)


def test_vectors_are_known_by_name() -> None:
    found = sources.of({"model": net().state_dict()})
    assert "model.0.bias" in found.vectors
    assert "model.0.weight" not in found.vectors


@pytest.mark.parametrize(
    ("below", "found"),
    [
        (nn.Conv2d(2, 3, 1), "0"),
        (nn.Conv2d(2, 3, 1, bias=False), "0"),
        (nn.ConvTranspose2d(2, 3, 1), "0"),
        (nn.Conv2d(2, 4, 1, bias=False), ""),
        (nn.Conv2d(2, 4, 1), ""),
        (nn.PReLU(3), ""),
        (nn.Identity(), ""),
    ],
    ids=str,
)
def test_the_weight_right_before_a_norm_is_known(below: nn.Module, found: str) -> None:
    model = nn.Sequential(below, nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    for given, kinds in ((model, ["BatchNorm2d", "SyncBatchNorm"]), (dict(model.state_dict()), [None, None])):
        layers = sources.of(given).layers
        assert [layer.settings["producer"] for layer in layers] == [found, ""]
        assert [layer.settings.get("class") for layer in layers] == kinds


def test_shapes_that_do_not_fit_are_kept_and_their_values_left_out() -> None:
    state = net().state_dict()
    state["1.weight"] = torch.ones(5)
    del state["4.running_mean"]
    first, second = sources.of(state).layers
    assert first.settings["shapes"]["gamma"] == (5,)
    assert np.isnan(first["gamma"]).all()
    assert second.settings["shapes"]["running_mean"] is None


def test_without_beta_it_is_0_and_without_both_nothing_is_learned() -> None:
    (one,) = sources.of(bn.BatchNorm2d(4, bias=False)).layers
    assert (one["beta"] == 0).all()
    (other,) = sources.of(nn.BatchNorm2d(4, affine=False)).layers
    assert not other.settings["affine"]
    assert np.isnan(other["gamma"]).all()


def test_instance_norms_and_layer_norms_are_none() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(4, track_running_stats=True, affine=True), nn.LayerNorm(4), nn.GroupNorm(2, 4)
    )
    assert sources.of(model).layers == ()


def test_a_mapping_inside_itself_ends() -> None:
    state: dict[str, Any] = {"bn": dict(nn.BatchNorm1d(3).state_dict())}
    state["again"] = state
    assert len(sources.of(state).layers) == 1


@pytest.mark.parametrize("given", [3, None, [1, 2], {}, {"lr": 0.1}])
def test_what_is_nothing_to_check_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(SourceError, match=r"^(expected a model|the mapping holds no tensors)") as error:
        sources.of(given)
    assert "\n" not in str(error.value)


def test_meta_tensors_have_no_values() -> None:
    with pytest.raises(SourceError, match="meta"):
        sources.of(nn.BatchNorm1d(3, device="meta"))


def named(**layers: nn.Module) -> nn.Module:
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


@pytest.mark.parametrize("name", ["stage1/bn", "a/b/c", "block/bn:0"])
def test_a_module_name_may_hold_a_slash(name: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.BatchNorm2d(4))
    model.add_module("plain", nn.Sequential(nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[0].running_var.fill_(-1.0)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for given in (model, model.state_dict(), tmp_path / "a.pt"):
        assert names(sources.of(given)) == [name, "plain.0"]
        assert not bn.check(given).healthy


def test_a_name_of_keras_may_hold_a_dot() -> None:
    weights = {f"net.v2/bn.1/{name}:0": np.ones(3) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    assert names(sources.of(weights)) == ["net.v2/bn.1"]


class Twice(nn.Module):
    """One module under two names, as nnU-Net and MONAI register it."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, units, 1, bias=False), nn.BatchNorm2d(units)
        self.all_modules = nn.Sequential(self.conv, self.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_modules(x)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_module_under_two_names_is_one_layer(legacy: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Twice(8), nn.Conv2d(8, 3, 1, bias=False), Twice(5))
    for _ in range(60):
        model(torch.randn(4, 3, 8, 8))
    torch.save({"net": model.state_dict()}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for given in (model, model.state_dict(), tmp_path / "a.pt", arrays):
        found = bn.check(given)
        assert names(found.network) == ["0.norm", "2.norm"]
        assert found.headline == "2 batch norm layers, 13 units: nothing found"
        assert [row.aliases for row in bn.explain(given).rows] == [("0.all_modules.1",), ("2.all_modules.1",)]
        assert found.as_dict()["layers"][0]["aliases"] == ("0.all_modules.1",)


def test_statistics_shared_under_different_gammas_are_two_layers() -> None:
    model = named(a=nn.BatchNorm1d(4), b=nn.BatchNorm1d(4))
    model.b.running_mean, model.b.running_var = model.a.running_mean, model.a.running_var
    assert names(sources.of(model)) == ["a", "b"]


def test_empty_layers_and_parts_of_one_tensor_are_not_one() -> None:
    whole = torch.arange(1.0, 9.0)
    halves = [{f"{role}": whole[at : at + 4] for role in ("running_mean", "running_var")} for at in (0, 4)]
    assert (
        len(sources.of({f"bn{at}.{role}": half[role] for at, half in enumerate(halves) for role in half}).layers) == 2
    )
    assert len(sources.of(named(a=nn.BatchNorm1d(0), b=nn.BatchNorm1d(0))).layers) == 2


def test_layers_that_an_exporter_stored_once_as_they_are_equal_stay_apart(tmp_path: Path) -> None:
    """The exporter to ONNX stores equal tensors once: two fresh layers are no single one; a shared, trained one is."""
    pytest.importorskip("onnx")
    shared = nn.BatchNorm2d(3)
    shared.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    shared.running_var.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for layers, expected in (([nn.BatchNorm2d(3), nn.BatchNorm2d(3)], 2), ([shared, shared], 1)):
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings: dict[str, Any] = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
            torch.onnx.export(model, (torch.randn(1, 3, 4, 4),), str(tmp_path / "a.onnx"), dynamo=False, **settings)
        found = bn.check(tmp_path / "a.onnx")
        assert len(found.network.layers) == expected
        assert "identical-statistics" not in [finding.kind.slug for finding in found.findings]


def numbered(count: int) -> nn.Module:
    """Layers whose alphabetical order ("conv10" before "conv2") is not the network's."""
    model = nn.Sequential()
    for at in range(count):
        model.add_module(f"conv{at}", nn.Conv2d(2, 2, 1))
        model.add_module(f"norm{at}", nn.BatchNorm2d(2))
    return model


def test_safetensors_sorts_names_and_the_layers_still_come_in_network_order(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(numbered(12).state_dict(), tmp_path / "a.safetensors")
    expected = [f"norm{at}" for at in range(12)]
    assert names(sources.of(tmp_path / "a.safetensors")) == expected
    assert names(sources.of(safetensors.load_file(tmp_path / "a.safetensors"))) == expected


def test_shards_come_in_network_order(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = numbered(12).state_dict()
    parts = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for at, (name, tensor) in enumerate(state.items()):
        parts[f"model-{1 + (at > 40)}.safetensors"][name] = tensor
    for file, tensors in parts.items():
        safetensors.save_file(tensors, tmp_path / file)
    where = {name: file for file, tensors in parts.items() for name in tensors}
    index = json.dumps({"weight_map": where}, sort_keys=True)
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    assert names(sources.of(tmp_path)) == [f"norm{at}" for at in range(12)]


def test_an_order_that_is_not_the_alphabets_is_kept() -> None:
    state = numbered(12).state_dict()
    backwards = {name: state[name] for at in reversed(range(12)) for name in state if name.startswith(f"norm{at}.")}
    assert names(sources.of(backwards)) == [f"norm{at}" for at in reversed(range(12))]


@pytest.mark.parametrize("config", [True, False], ids=["config", "names"])
def test_keras_3_groups_come_in_network_order(config: bool, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    order = ["zeta", *(f"bn{at}" for at in range(11))] if config else []
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for at in range(12):
            group = file.create_group(f"layers/batch_normalization{f'_{at}' if at else ''}/vars")
            if config:
                group.attrs["name"] = order[at]
            for tensor in range(4):
                group[str(tensor)] = np.ones(2) + at
    if config:
        layers = [{"class_name": "BatchNormalization", "config": {"name": name}} for name in order]
        with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
            archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": layers}}))
            archive.writestr("model.weights.h5", weights.getvalue())
        assert names(sources.of(tmp_path / "a.keras")) == order
    else:
        (tmp_path / "a.weights.h5").write_bytes(weights.getvalue())
        expected = ["batch_normalization", *(f"batch_normalization_{at}" for at in range(1, 12))]
        assert names(sources.of(tmp_path / "a.weights.h5")) == expected


@pytest.mark.parametrize("pieces", [False, True], ids=["one list", "in pieces"])
def test_keras_2_lists_the_order_of_layers_in_attributes(pieces: bool, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    order = ["stem", "inner", "a_last"]
    inner = ["inner/z/", "inner/b/"]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if pieces:
            file.attrs["layer_names0"], file.attrs["layer_names1"] = np.bytes_(order[:2]), np.bytes_(order[2:])
        else:
            file.attrs["layer_names"] = np.bytes_(order)
        roles = ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0")
        for layer in order:
            paths = [f"{path}{role}" for path in (inner if layer == "inner" else [f"{layer}/"]) for role in roles]
            file.create_group(layer).attrs["weight_names"] = np.bytes_(paths)
            for path in paths:
                file[f"{layer}/{path}"] = np.ones(2)
    assert names(sources.of(tmp_path / "a.h5")) == ["stem", "z", "b", "a_last"]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100), b"<html>"])
def test_errors_name_the_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / ("long_" * 30 + "name.pt")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))}: [a-z]") as error:
        bn.check(file)
    assert str(error.value).count(file.name) == 1


def test_errors_of_values_that_are_read_later_name_the_file_too(tmp_path: Path) -> None:
    state = {"bn.running_mean": torch.ones(4), "bn.running_var": torch.ones(4, device="meta")}
    torch.save(state, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'meta.pt'))}: .*meta"):
        bn.check(tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'no.pt'))}: there is no such file$"):
        bn.check(tmp_path / "no.pt")


def test_too_many_values_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST", 5)
    torch.save(nn.BatchNorm1d(3).state_dict(), tmp_path / "a.pt")
    with pytest.raises(SourceError, match=f"^{re.escape(str(tmp_path / 'a.pt'))}: its batch norm layers hold"):
        bn.check(tmp_path / "a.pt")
