"""diff(): every loss between two files is named and ranked by its effect, and equal models in other formats differ in
nothing."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from batchnorm.checks import sources
from batchnorm.checks.diff import compared, diff
from batchnorm.checks.differences import ASPECTS
from batchnorm.checks.readers import CheckpointError
from batchnorm.checks.sources import Network, SourceError
from randomness import SEED

h5py = pytest.importorskip("h5py")
onnx = pytest.importorskip("onnx")
safetensors = pytest.importorskip("safetensors.torch")


class Net(nn.Sequential):
    """Three norms of one shape and one of another, as after some training."""


def net(momentum: float | None = 0.1) -> Net:
    torch.manual_seed(SEED)
    model = Net(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.Conv2d(8, 5, 3, bias=False),
        nn.BatchNorm2d(5, momentum=momentum),
    )
    for norm in norms(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(100)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model.eval()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model if isinstance(module, nn.BatchNorm2d)]


def named(model: nn.Module) -> list[tuple[str, nn.BatchNorm2d]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def as_state(model: nn.Module, path: Path) -> None:
    torch.save({"state_dict": model.state_dict()}, path)


def as_pickle(model: nn.Module, path: Path) -> None:
    torch.save(model, path)


def as_safetensors(model: nn.Module, path: Path) -> None:
    safetensors.save_file(dict(model.state_dict()), path)


def as_onnx(model: nn.Module, path: Path) -> None:
    helper, nodes, tensors = onnx.helper, [], []
    for at, (name, norm) in enumerate(named(model)):
        inputs = [f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        tensors += [
            onnx.numpy_helper.from_array(norm.state_dict()[leaf.rpartition(".")[2]].float().numpy(), leaf)
            for leaf in inputs
        ]
        settings = {"epsilon": norm.eps, "momentum": 1 - norm.momentum, "training_mode": int(norm.training)}
        outputs = [f"x{at + 1}", *(f"{name}.{at}" for at in range(2 * norm.training))]
        nodes.append(helper.make_node("BatchNormalization", [f"x{at}", *inputs], outputs, **settings))
    ends = [helper.make_tensor_value_info(name, 1, None) for name in ("x0", f"x{len(nodes)}")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph), path)


def as_keras(model: nn.Module, path: Path) -> None:
    leaves = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    layers = []
    with h5py.File(path, "w") as file:
        for at, (_, norm) in enumerate(named(model)):
            name = f"batch_normalization_{at}"
            layers.append(
                {
                    "class_name": "BatchNormalization",
                    "config": {"name": name, "epsilon": norm.eps, "momentum": 1 - norm.momentum},
                }
            )
            for leaf, tensor in leaves.items():
                file[f"model_weights/{name}/{name}/{leaf}:0"] = norm.state_dict()[tensor].numpy()
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": {"layers": layers}})


FORMATS: dict[str, tuple[str, Callable[[nn.Module, Path], None]]] = {
    "state dict": (".pt", as_state),
    "pickle": (".pth", as_pickle),
    "safetensors": (".safetensors", as_safetensors),
    "onnx": (".onnx", as_onnx),
    "keras": (".h5", as_keras),
}


def stored(model: nn.Module, form: str, folder: Path, name: str = "b") -> Path:
    suffix, write = FORMATS[form]
    path = folder / f"{name}{suffix}"
    write(model, path)
    return path


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Network]:
    """The network of the same model in a format, each file read once."""
    return functools.cache(lambda form: sources.of(stored(net(), form, tmp_path_factory.mktemp(form))))


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(FORMATS, 2)])
def test_equal_models_in_other_formats_differ_in_nothing(first: str, second: str, read: Any) -> None:
    found = compared(read(first), read(second))
    assert found.changes == ()
    assert found.equal
    assert len(found.pairs) == 4
    assert str(found) == "4 batch norm layers: no difference."
    assert compared(read(second), read(first)).equal


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_differs_in_nothing_from_its_files(form: str, read: Any) -> None:
    model = net()
    assert compared(sources.of(model), read(form)).equal
    assert compared(read(form), sources.of(model.state_dict())).equal


def with_eps(model: Net) -> None:
    model[1].eps = 1e-3


def with_momentum(model: Net) -> None:
    model[4].momentum = 0.9


def with_mean(model: Net) -> None:
    model[1].running_mean[3] += 1


def with_variance(model: Net) -> None:
    model[1].running_var[3] *= 2


def with_biased_variance(model: Net) -> None:
    model[4].running_var.mul_(63 / 64)


def with_gamma(model: Net) -> None:
    model[8].weight.data[2] *= 2


def with_beta(model: Net) -> None:
    model[8].bias.data[2] += 1


def with_count(model: Net) -> None:
    model[1].num_batches_tracked.zero_()


def with_frozen(model: Net) -> None:
    model[1].requires_grad_(False)


def with_mode(model: Net) -> None:
    model[6].train()


def without_layer(model: Net) -> None:
    model[8] = nn.Identity()


def permuted(model: Net) -> None:
    for tensor in (model[6].weight.data, model[6].bias.data, model[6].running_mean, model[6].running_var):
        tensor.copy_(tensor.roll(3))


def renamed(model: Net) -> Net:
    return nn.Sequential(*model[:8], nn.Identity(), model[8])  # type: ignore[return-value]


def halved(model: Net) -> None:
    with torch.no_grad():
        for tensor in (*model[4].parameters(), model[4].running_mean, model[4].running_var):
            tensor.copy_(tensor.half())


def fused(model: Net) -> None:
    model[3], model[4] = fuse_conv_bn_eval(model[3], model[4]), nn.Identity()


TENSORS = ("state dict", "pickle", "safetensors")
LOSSES: dict[str, tuple[Callable[[Net], Any], str, tuple[str, ...]]] = {
    "eps": (with_eps, "1", ("pickle", "onnx", "keras")),
    "momentum": (with_momentum, "4", ("pickle", "onnx", "keras")),
    "mean": (with_mean, "1", tuple(FORMATS)),
    "variance": (with_variance, "1", tuple(FORMATS)),
    "biased variance": (with_biased_variance, "4", tuple(FORMATS)),
    "gamma": (with_gamma, "8", tuple(FORMATS)),
    "beta": (with_beta, "8", tuple(FORMATS)),
    "count": (with_count, "1", TENSORS),
    "frozen": (with_frozen, "1", ("pickle",)),
    "mode": (with_mode, "6", ("pickle", "onnx")),
    "missing": (without_layer, "8", tuple(FORMATS)),
    "permuted": (permuted, "6", tuple(FORMATS)),
    "renamed": (renamed, "8", TENSORS),
    "half precision": (halved, "4", tuple(FORMATS)),
    "fused": (fused, "4", TENSORS),
}
HARMLESS = {"momentum", "count", "frozen", "renamed", "fused"}


CASES = [
    pytest.param(aspect, form, marks=[pytest.mark.slow] * (form != forms[0]))
    for aspect, (_, _, forms) in LOSSES.items()
    for form in forms
]


@pytest.mark.parametrize(("aspect", "form"), CASES)
def test_a_loss_is_named_with_its_layer(aspect: str, form: str, read: Any, tmp_path: Path) -> None:
    lose, layer, _ = LOSSES[aspect]
    lossy = net()
    lossy = lose(lossy) or lossy
    whole, other = read("pickle"), sources.of(stored(lossy, form, tmp_path))
    found = compared(whole, other)
    assert [(one.aspect, one.layer) for one in found.changes] == [(aspect, layer)]
    effect = found.changes[0].effect
    assert math.isnan(effect) if aspect == "mode" else (effect == 0) is (aspect in HARMLESS)
    assert ASPECTS[aspect] in str(found)
    assert [one.aspect for one in compared(other, whole).changes] == [aspect], "seen from the other side"


def test_losses_are_ranked_by_their_effect(tmp_path: Path) -> None:
    model, lossy = net(), net()
    for lose in (with_eps, with_biased_variance, permuted, with_gamma, with_count):
        lose(lossy)
    lossy[8].momentum = None
    found = diff(stored(model, "pickle", tmp_path, "a"), stored(lossy, "pickle", tmp_path))
    assert [one.aspect for one in found.changes] == [
        "permuted",
        "gamma",
        "biased variance",
        "eps",
        "momentum",
        "count",
    ]
    effects = [one.effect for one in found.changes]
    assert effects == sorted(effects, reverse=True)
    assert "5 of 4" not in found.headline
    assert found.headline.startswith("4 of 4 batch norm layers differ. The worst difference is permuted of 6:")
    described = found.as_dict()
    assert described["changes"][0]["aspect"] == "permuted"
    assert "momentum 0.1 in A, None (cumulative) in B" in str(found)


def test_the_effect_is_that_of_the_outputs() -> None:
    """|Δa|·std + |Δb + Δa·mean| is the larger change of the outputs of mean - std and mean + std."""
    a, b = net()[1].double(), copy.deepcopy(net()[1]).double()
    b.running_var[2:5] *= 3
    ends = torch.stack([a.running_mean + sign * a.running_var.sqrt() for sign in (-1, 1)])[..., None, None]
    with torch.no_grad():
        moved = (b(ends) - a(ends)).abs().amax((0, 2, 3))
        expected = float((moved.square().mean() / a.weight.square().mean()).sqrt())
    (change,) = diff(a, b).changes
    assert change.effect == pytest.approx(expected, rel=1e-6)
    assert change.units == (2, 3, 4)


def test_all_units_are_no_list_and_texts_name_the_worst_unit() -> None:
    model, other = net(), net()
    other[1].running_mean[3] += 2
    other[1].running_mean[4] += 1
    (change,) = diff(model, other).changes
    assert "differs in 2 of 8 units, most in unit 3" in change.text
    assert change.units == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_one_difference_of_all_tensors(dtype: torch.dtype) -> None:
    model = net()
    found = diff(model, copy.deepcopy(model).to(dtype))
    assert {one.aspect for one in found.changes} == {"half precision"}
    name = str(dtype).removeprefix("torch.")
    assert f"gamma, beta, running_mean, running_var rounded to {name} in B" in str(found)
    assert f"rounded to {name} in A" in str(diff(copy.deepcopy(model).to(dtype), model))


def test_a_variance_beyond_float16_comes_first() -> None:
    model = net()
    model[4].running_var[0] = 1e6
    found = diff(model, copy.deepcopy(model).half())
    assert (found.changes[0].layer, found.changes[0].aspect) == ("4", "half precision")
    assert found.changes[0].effect > 0.1, "a unit divided by infinity returns beta"


def test_the_number_of_values_behind_a_biased_variance() -> None:
    model, other = net(), net()
    other[1].running_var.mul_(255 / 256)
    assert "biased in B, for m = 256 values" in str(diff(model, other))
    assert "biased in A, for m = 256 values" in str(diff(other, model))
    other[1].running_var.mul_(0.1)
    assert [one.aspect for one in diff(model, other).changes] == ["variance"]


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.body."])
def test_a_prefix_is_one_line(prefix: str) -> None:
    state = net().state_dict()
    found = diff(state, {f"{prefix}{name}": tensor for name, tensor in state.items()})
    assert {one.aspect for one in found.changes} == {"renamed"}
    assert f"1, 4 … 8 (4): has the prefix {prefix!r} in B" in str(found)


def test_wrappers_and_copies_are_no_difference() -> None:
    model = net()
    state = model.state_dict()
    assert diff(model, {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}).equal
    found = diff(state, {"model": state, "ema": state})
    assert found.equal
    assert found.notes == ("B has 2 copies of the model: model is compared, ema not.",)
    assert found.notes[0] in str(found)
    assert diff({"model": state, "ema": state}, {"model": state, "ema": state}).equal


def test_layers_of_other_names_are_paired_by_their_values_in_any_order() -> None:
    state = net().state_dict()
    names = {"1": "z", "4": "a", "6": "m", "8": "b"}
    other = {}
    for old in ("6", "4", "8", "1"):
        other |= {
            name.replace(f"{old}.", f"{names[old]}."): t for name, t in state.items() if name.startswith(f"{old}.")
        }
    found = diff(state, other)
    assert {(one.layer, one.other) for one in found.changes} == set(names.items())
    assert {one.aspect for one in found.changes} == {"renamed"}


def test_without_names_and_values_shape_and_order_pair_and_the_farthest_stays_alone() -> None:
    model, other = net(), net()
    other[1].running_mean += 0.01
    other[4].running_mean += 0.01
    state = {f"bn{at}.{leaf}": t for at in (1, 4, 8) for leaf, t in other[at].state_dict().items()}
    found = diff(model.state_dict(), state)
    partners = {first.name: second.name for first, second in found.pairs if first and second}
    assert partners == {"1": "bn1", "4": "bn4", "8": "bn8"}
    assert [one.layer for one in found.changes if one.aspect == "missing"] == ["6"]


def test_swapped_layers_are_permuted() -> None:
    model, other = net(), net()
    other[1], other[6] = other[6], other[1]
    found = diff(model, other)
    assert [(one.aspect, one.text) for one in sorted(found.changes, key=lambda one: one.layer)] == [
        ("permuted", "has the values of 6 in B"),
        ("permuted", "has the values of 1 in B"),
    ]


def test_tensors_that_are_missing() -> None:
    state = net().state_dict()
    found = diff(
        state, {name: tensor for name, tensor in state.items() if name not in ("1.weight", "4.num_batches_tracked")}
    )
    assert [(one.aspect, one.layer, one.text) for one in found.changes] == [
        ("missing", "1", "gamma missing in B: without, gamma is 1"),
        ("missing", "4", "num_batches_tracked missing in B"),
    ]


def test_other_shapes_come_first() -> None:
    model, other = net(), net()
    other[1] = nn.BatchNorm2d(4)
    other[6].running_var[0] = 100.0
    found = diff(model, other)
    assert [one.aspect for one in found.changes] == ["shape", "variance"]
    assert found.changes[0].effect == math.inf
    assert found.as_dict()["changes"][0]["effect"] == math.inf
    assert "it cannot be loaded" in found.headline


def test_eps_that_one_format_does_not_store_is_the_default() -> None:
    model = net()
    model[1].eps = 1e-3
    found = diff(model, model.state_dict())
    assert [one.text for one in found.changes] == ["eps 0.001 in A, not stored in B, where the default is 1e-05"]
    assert diff(model.state_dict(), net().state_dict()).equal, "neither knows"


def test_values_that_are_not_finite() -> None:
    model, other = net(), net()
    other[1].running_var[0] = float("nan")
    found = diff(model, other)
    assert (found.changes[0].aspect, found.changes[0].effect) == ("variance", math.inf)
    assert diff(other, copy.deepcopy(other)).equal, "NaN is NaN"
    assert diff(other, model).changes[0].effect == 0, "an output that was not finite cannot become worse"


def test_a_model_before_and_after_a_change() -> None:
    model = net()
    before = bn.check(model)
    with torch.no_grad():
        model[1].running_mean.add_(1)
    assert [one.aspect for one in diff(before, model).changes] == ["mean"]
    model.double()
    before = bn.check(model)
    with torch.no_grad():
        model[4].running_mean.add_(1)
    assert [one.layer for one in diff(before, model).changes] == ["4"], "float64 tensors are copied, too"
    bn.freeze(model)
    assert {one.aspect for one in diff(before, model).changes} == {"mean", "frozen"}


def test_training_mode_of_a_model_is_a_difference_and_no_finding() -> None:
    model = net()
    found = diff(model, copy.deepcopy(model).train())
    assert {one.aspect for one in found.changes} == {"mode"}
    assert "eval mode in A, training mode in B" in str(found)
    assert "the output depends on the batch" in found.headline
    assert "saved-in-training-mode" not in {finding.kind.slug for finding in bn.check(model.train()).findings}


def test_frozen_layers_of_a_pickled_model(tmp_path: Path) -> None:
    model = net()
    frozen = copy.deepcopy(model)
    bn.freeze(frozen)
    found = diff(stored(model, "pickle", tmp_path, "a"), stored(frozen, "pickle", tmp_path))
    assert {one.aspect for one in found.changes} == {"frozen"}
    assert diff(frozen, stored(frozen, "pickle", tmp_path)).equal


def test_nothing_in_common_and_nothing_at_all() -> None:
    assert str(diff({"fc.weight": np.ones((2, 3))}, nn.Linear(2, 3))) == "Neither has a batch norm layer."
    found = diff({"fc.weight": np.ones((2, 3))}, net())
    assert [one.aspect for one in found.changes] == ["missing"] * 4
    assert "missing in A" in found.changes[0].text


@pytest.mark.parametrize("bad", [None, 3, [1], {}, {"a": 1}])
def test_what_cannot_be_compared(bad: Any) -> None:
    with pytest.raises(SourceError):
        diff(net(), bad)
    with pytest.raises(SourceError):
        diff(bad, net())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        diff(tmp_path / "none.pt", net())
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(CheckpointError):
        diff(net(), tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "metadata",
    [
        3,
        {"1": 3},
        {"1": {"batchnorm": []}},
        {"1": {"batchnorm": {"eps": "x"}}},
        {1: {"batchnorm": {}}},
        {"1": {"batchnorm": {"eps": 10**400}}},
    ],
)
def test_metadata_that_is_damaged_is_left_out(metadata: Any, tmp_path: Path) -> None:
    state = net().state_dict()
    state._metadata = metadata
    torch.save(state, tmp_path / "a.pt")
    assert diff(state, net().state_dict()).equal
    assert diff(tmp_path / "a.pt", net().state_dict()).equal


def test_nothing_is_changed_and_nothing_runs(tmp_path: Path) -> None:
    model = net()
    before = pickle.dumps(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diff(model, copy.deepcopy(model).half())
    assert pickle.dumps(model.state_dict()) == before
