"""stamp(): eps and momentum stay with the state dict, through files, and a state with another eps does not load."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.checks import sources
from batchnorm.frameworks import STAMP

EPS = 1e-3


def net(eps: float = EPS, momentum: float | None = 0.01) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4),
        bn.BatchNorm1d(4, eps=eps, momentum=momentum),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=eps, momentum=momentum)),
    )


def stamped(eps: float = EPS, momentum: float | None = 0.01) -> nn.Sequential:
    model = net(eps, momentum)
    bn.stamp(model)
    return model


def test_it_says_which_layers() -> None:
    model = net()
    found = bn.stamp(model)
    assert found.layers == ("1", "2.1")
    assert str(found) == "2 layers with eps and momentum in the metadata of the state dict"


def test_subclasses_are_skipped_but_for_those_in_also() -> None:
    class Own(nn.BatchNorm1d):
        pass

    model = nn.Sequential(Own(3), nn.BatchNorm1d(3))
    assert [layer.name for layer in bn.stamp(model).skipped] == ["0"]
    assert bn.stamp(model, also=[Own]).layers == ("0", "1")
    assert STAMP in model.state_dict()._metadata["0"]


def test_the_keys_stay_and_the_metadata_has_both() -> None:
    state = stamped().state_dict()
    assert list(state) == list(net().state_dict())
    assert state._metadata["2.1"][STAMP] == {"eps": EPS, "momentum": 0.01}
    assert state._metadata["2.1"]["version"] == 2
    net().load_state_dict(state)  # a model without a stamp takes it


def test_settings_are_those_at_the_time_of_saving() -> None:
    model = stamped()
    model[1].eps = 2e-3
    assert model.state_dict()._metadata["1"][STAMP]["eps"] == 2e-3


def test_the_same_settings_load() -> None:
    for momentum in (0.01, None):
        other = stamped(momentum=momentum)
        other.load_state_dict(stamped(momentum=momentum).state_dict())
        other.load_state_dict(copy.deepcopy(other.state_dict()))


def test_another_eps_is_an_error_that_names_the_layers() -> None:
    with pytest.raises(RuntimeError, match=r"eps of 1 is 1e-05, the state was saved with 0.001") as error:
        stamped(1e-5).load_state_dict(stamped().state_dict(), strict=False)
    assert "eps of 2.1 is" in str(error.value)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_another_momentum_is_a_warning(momentum: float | None) -> None:
    with pytest.warns(UserWarning, match=f"momentum of (1|2.1) is {momentum}, the state was saved with 0.01") as caught:
        stamped(momentum=momentum).load_state_dict(stamped().state_dict())
    assert len(caught) == 2


@pytest.mark.parametrize("drop", [dict, lambda state: {name: tensor.clone() for name, tensor in state.items()}])
def test_a_format_that_drops_it_is_one_warning(drop) -> None:
    with pytest.warns(UserWarning, match="not verified: it has no metadata, which safetensors") as caught:
        stamped(1e-5).load_state_dict(drop(stamped().state_dict()))
    assert len(caught) == 1


def test_safetensors_drops_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = stamped()
    safetensors.save_file(model.state_dict(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="not verified"):
        model.load_state_dict(safetensors.load_file(tmp_path / "a.safetensors"))


def test_a_state_without_a_stamp_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="not verified: it was saved without a stamp"):
        stamped().load_state_dict(net().state_dict())


def test_inside_of_another_model_and_a_part_of_one() -> None:
    outer, other = nn.Sequential(stamped()), nn.Sequential(stamped(1e-5))
    with pytest.raises(RuntimeError, match=r"eps of 0.1 is 1e-05"):
        other.load_state_dict(outer.state_dict())
    with pytest.raises(RuntimeError, match="eps of 1 is 1e-05"):
        other[0][2].load_state_dict(outer[0][2].state_dict())


def test_a_layer_alone() -> None:
    layer, other = nn.BatchNorm1d(3, eps=EPS), nn.BatchNorm1d(3)
    bn.stamp(layer)
    bn.stamp(other)
    with pytest.raises(RuntimeError, match="eps of the layer is 1e-05"):
        other.load_state_dict(layer.state_dict())


def test_a_second_call_changes_nothing() -> None:
    model = stamped(1e-5)
    bn.stamp(model)
    assert len(model[1]._state_dict_hooks) == 1
    assert len(model[1]._load_state_dict_pre_hooks) == 1
    assert len(model._load_state_dict_pre_hooks) == 1
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(stamped().state_dict())
    assert str(error.value).count("eps of 1 is") == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_stamped_too(duplicate) -> None:
    model = duplicate(stamped(1e-5))
    model[1].eps = 5e-5
    assert model.state_dict()._metadata["1"][STAMP]["eps"] == 5e-5
    with pytest.raises(RuntimeError, match="eps of 1 is 5e-05"):
        model.load_state_dict(stamped().state_dict())


def test_converted_and_frozen_layers_stay_stamped() -> None:
    model = net()
    bn.stamp(model)
    bn.convert(model)
    bn.freeze(model)
    assert model.state_dict()._metadata["2.1"][STAMP]["eps"] == EPS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("nested", [lambda state: state, lambda state: {"epoch": 3, "model": state}])
def test_files_of_torch_save_keep_it_and_check_reads_it(nested, tmp_path: Path) -> None:
    state = nested(stamped(momentum=None).state_dict())
    torch.save(state, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=True)
    for given in (state, tmp_path / "a.pt"):
        layers = sources.of(given).layers
        assert [layer.settings["eps"] for layer in layers] == [EPS, EPS]
        assert all(layer.settings["eps_known"] and layer.settings["cumulative"] for layer in layers)
    assert [one.aspect for one in bn.diff(tmp_path / "a.pt", net(1e-5, None)).changes] == ["eps", "eps"]


def test_no_model_and_no_layer() -> None:
    with pytest.raises(TypeError, match=r"stamp takes a torch.nn.Module"):
        bn.stamp({"a": 1})  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="stamp found no batch norm layer"):
        assert bn.stamp(nn.Linear(2, 2)).layers == ()
