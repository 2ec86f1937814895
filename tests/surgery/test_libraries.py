"""Every tool finds the batch norms of other libraries, or says why not, and computes what their forwards compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import batchnorm as bn
import libraries
from batchnorm.variants.libraries import _REGISTERED, kind_of, qualified_name
from libraries import (
    ABN,
    FROZEN,
    IMAGES,
    BatchNormAct2d,
    BatchRenorm1d,
    C,
    Conv2dSame,
    InPlaceABN,
    ScaledStdConv2d,
    Twice,
    filled,
    images,
    network,
)
from randomness import SEED


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(SEED)
    before = dict(_REGISTERED)
    yield
    _REGISTERED.clear()
    _REGISTERED.update(before)


TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "recalibrate": lambda model: bn.recalibrate(model, [images(), images()]),
    "compare": lambda model: bn.compare(model, images()),
    "undo": lambda model: bn.undo(model, [images()]),
    "pool_statistics": bn.pool_statistics,
    "freeze": bn.freeze,
    "fold": lambda model: bn.fold(model, images()),
    "sync": bn.sync,
    "to_group_norm": bn.to_group_norm,
    "convert": bn.convert,
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_finds_every_layer_or_says_why_not(tool: str, name: str) -> None:
    record = TOOLS[tool](network(name))
    layers = [getattr(layer, "name", None) or getattr(layer, "names", (layer,))[0] for layer in record.layers]
    skipped = {layer.name: layer.why for layer in getattr(record, "skipped", ())}
    assert ("1" in layers) != ("1" in skipped)
    if name in FROZEN and tool not in ("pool_statistics", "fold", "convert"):
        assert skipped["1"].startswith("frozen")
    if name == "BatchNormAct2d":
        assert "1" in layers


@pytest.mark.parametrize("name", sorted(IMAGES.keys() - set(FROZEN)))
def test_recalibrated_statistics_are_those_of_the_data(name: str) -> None:
    model, data = network(name), [images(), images()]
    record = bn.recalibrate(model, data)
    x = torch.cat([model[0](batch) for batch in data]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, x.mean(1))
    torch.testing.assert_close(model[1].running_var, x.var(1))
    assert [layer.names for layer in record.layers] == [("1",)]
    assert "forward" not in vars(model[1])


@pytest.mark.parametrize("name", IMAGES)
def test_fold_keeps_the_outputs_and_what_follows(name: str) -> None:
    model, x = network(name), images()
    expected, keys = model(x), {key for key in model.state_dict() if ".act." in key}
    record = bn.fold(model, x)
    assert [(layer.name, layer.into) for layer in record.layers] == [("1", "0")]
    assert record.max_error < 1e-5
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not list(model[1].buffers())
    assert {key for key in model.state_dict() if key.startswith("1.")} == keys
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", ["BatchNormAct2d, no act", "FrozenBatchNorm2d", "DETR", "mmcv"])
def test_fold_into_the_convolution_after(name: str) -> None:
    model, x = nn.Sequential(filled(IMAGES[name](3)), nn.Conv2d(3, 2, 3)).eval(), images()
    expected = model(x)
    assert [layer.before for layer in bn.fold(model, x).layers] == [False]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_an_activation_of_the_norm_cannot_be_folded_into_what_follows() -> None:
    for name in ("BatchNormAct2d", "ABN", "FrozenBatchNormAct2d"):
        model = nn.Sequential(filled(IMAGES[name](3)), nn.Conv2d(3, 2, 3)).eval()
        (skipped,) = bn.fold(model, images()).skipped
        assert "applies an activation" in skipped.why


def test_undo_of_a_scale_with_magnitude() -> None:
    model, x = network("InPlaceABN"), images()
    bn.undo(model, [x])
    torch.testing.assert_close(model[1](model[0](x)), F.leaky_relu(model[0](x), 0.01), rtol=1e-4, atol=1e-4)


def test_freeze_and_adapt() -> None:
    for layer in (filled(BatchNormAct2d(3, nn.ReLU())), filled(ABN(3)), filled(InPlaceABN(3))):
        model, x = nn.Sequential(layer).eval(), images()
        expected = model(x.clone())
        bn.freeze(model)
        torch.testing.assert_close(model.train()(x.clone()), expected)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        bn.unfreeze(model)
        assert all(parameter.requires_grad for parameter in layer.parameters())
        with bn.adapt(model.eval(), prior=0) as record:
            assert record.layers == ("0",)
            adapted = model(x.clone())
        by_hand = copy.deepcopy(model)
        by_hand[0].running_mean.copy_(x.mean((0, 2, 3)))
        by_hand[0].running_var.copy_(x.var((0, 2, 3), correction=0))
        torch.testing.assert_close(adapted, by_hand(x.clone()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["BatchNormAct2d", "SyncBatchNormAct", "ABN", "mmcv"])
def test_sync_and_group_norm_keep_the_activation(name: str) -> None:
    model, x = network(name), images()
    expected = model(x)
    assert bn.sync(model).layers == ("1",)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.train()(x)
    groups = network(name)
    act = bn.to_group_norm(groups).layers and getattr(groups[1], "act", None)
    assert act == {"BatchNormAct2d": "silu", "SyncBatchNormAct": "relu", "ABN": "leaky_relu"}.get(name)
    assert not list(groups[1].children())
    groups(x)


def test_parts_of_a_split_norm_are_not_replaced_without_it() -> None:
    for tool in (bn.sync, bn.to_group_norm):
        model = network("SplitBatchNorm2d")
        record = tool(model)
        assert not record.layers
        assert {layer.name: layer.why for layer in record.skipped}["1.aux_bn.0"].startswith("it is a part of a layer")
        model.train()(images())


def test_batch_renorm_of_sb3_has_other_names() -> None:
    model = nn.Sequential(nn.Linear(3, C), filled(BatchRenorm1d(C)))
    x = torch.randn(30, 3)
    groups = {group["name"]: group["params"] for group in bn.param_groups(model, 0.1)}
    assert [p is model[1].scale for p in groups["gamma"]] == [True]
    assert [p is model[1].bias for p in groups["beta"]] == [True]
    model.eval()
    bn.recalibrate(model, [x])
    torch.testing.assert_close(model[1].ra_var, model[0](x).var(0))
    assert int(model[1].steps) == 0
    assert bn.sync(model).skipped[0].why.startswith("its training statistics are not the batch's")
    expected = model(x)
    assert len(bn.fold(model, x).layers) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    plain = nn.Sequential(nn.Linear(3, C), BatchRenorm1d(C, affine=False)).eval()
    with torch.no_grad():
        plain[1].scale.fill_(7)
    expected = plain(x)
    assert len(bn.fold(plain, x).layers) == 1
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_convert_fuses_the_own_activation_and_reverts() -> None:
    model = network("BatchNormAct2d").train()
    stock, x = copy.deepcopy(model), images()
    (layer,) = bn.convert(model).layers
    assert (layer.kind, layer.converted, layer.act) == ("BatchNormAct2d", True, "silu")
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, stock[1].running_var)
    assert len(bn.fold(copy.deepcopy(model).eval(), x).layers) == 1
    bn.revert(model)
    assert type(model[1]) is BatchNormAct2d


class Mine(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Loose(nn.Module):
    """No subclass of torch.nn's batch norms."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("running_mean", torch.zeros(c))
        self.register_buffer("running_var", torch.ones(c))
        self.eps, self.momentum = 1e-5, 0.2

    def forward(self, x: Tensor) -> Tensor:
        buffers = self.running_mean, self.running_var
        return F.batch_norm(x, *buffers, self.weight, self.bias, self.training, self.momentum, self.eps)


def test_convert_also_replaces_and_reverts_to_the_subclass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Mine(4), nn.ReLU())
    bn.freeze(model)
    assert bn.convert(copy.deepcopy(model)).converted == 0
    assert bn.convert(model, also=[Mine]).converted == 1
    bn.unfreeze(model)
    assert type(model[1]) is bn.BatchNorm2d
    bn.revert(model)
    assert type(model[1]) is Mine


@pytest.mark.parametrize("cls", [Mine, Loose])
def test_the_record_offers_the_line_to_write(cls: type[nn.Module], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), cls(4)).eval()
    (skipped,) = bn.recalibrate(model, [images()]).skipped
    line = f'batchnorm.register_layer("{qualified_name(cls)}")'
    assert line in skipped.why
    with pytest.raises(ValueError, match="no batch norm layer to watch") as caught:
        bn.watch(model, tmp_path / "run")
    assert line in str(caught.value)
    exec(line, {"batchnorm": bn})
    assert [len(TOOLS[tool](copy.deepcopy(model)).layers) for tool in ("recalibrate", "fold", "freeze")] == [1, 1, 1]
    bn.watch(model, tmp_path / "run")


def test_unknown_classes_are_not_proved_by_one_mode_or_an_error() -> None:
    class Half(Mine):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * (1 if self.training else 2)

    class Broken(Mine):
        def forward(self, input: Tensor) -> Tensor:
            torch.rand(1)
            raise RuntimeError("no")

    for layer in (Twice(4), Half(4), Broken(4)):
        state = torch.get_rng_state()
        (skipped,) = bn.freeze(nn.Sequential(layer)).skipped
        assert "may compute something else" in skipped.why
        assert torch.equal(torch.get_rng_state(), state)
        assert int(layer.num_batches_tracked) == 0


def test_also_takes_classes_that_are_no_subclasses() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Loose(4)).eval()
    record = bn.recalibrate(model, [images()], also=[Loose])
    assert [layer.names for layer in record.layers] == [("1",)]
    assert len(bn.fold(model, images(), also=[Loose]).layers) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"layer": 3}, TypeError, "takes a class"),
        ({"layer": int}, TypeError, "takes a class"),
        ({"layer": "Norm"}, ValueError, "has no module"),
        ({"layer": "a..Norm"}, ValueError, "has no module"),
        ({"layer": nn.BatchNorm2d}, ValueError, "known already"),
        ({"layer": bn.BatchNorm2d}, ValueError, "known already"),
        ({"layer": "a.Norm", "mean": 3}, TypeError, "mean must be the name"),
        ({"layer": "a.Norm", "eps": 0.0}, ValueError, "eps must be positive"),
        ({"layer": "a.Norm", "eps": float("nan")}, ValueError, "eps must be positive"),
        ({"layer": "a.Norm", "eps": None}, TypeError, "eps must be"),
        ({"layer": "a.Norm", "frozen": 1}, TypeError, "frozen must be"),
        ({"layer": "a.Norm", "follows": "act"}, TypeError, "follows must be"),
    ],
)
def test_register_layer_refuses(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    before = dict(_REGISTERED)
    with pytest.raises(error, match=words):
        bn.register_layer(**arguments)
    assert before == _REGISTERED


def test_register_layer_with_other_names_and_an_activation() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mu", torch.randn(4))
            self.register_buffer("sigma2", torch.rand(4) + 0.5)
            self.g, self.after = nn.Parameter(torch.randn(4)), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(x, self.mu, self.sigma2, self.g, None, self.training, 0.1, 1e-3)
            return self.after(x)

    bn.register_layer(Other, mean="mu", var="sigma2", gamma="g", eps=1e-3, follows=["after"])
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Other()).eval(), images()
    bn.recalibrate(model, [x])
    torch.testing.assert_close(model[1].mu, model[0](x).mean((0, 2, 3)))
    expected = model(x)
    assert len(bn.fold(model, x).layers) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


# --- convolutions of subclasses


@pytest.mark.parametrize("size", [7, 8])
def test_fold_into_a_convolution_that_pads(size: int) -> None:
    model = nn.Sequential(Conv2dSame(3, C, 3, stride=2, bias=False), filled(BatchNormAct2d(C, nn.SiLU()))).eval()
    x = torch.randn(2, 3, size, size)
    expected = model(x)
    assert len(bn.fold(model, x).layers) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_that_normalizes_its_weight_is_refused() -> None:
    model, x = nn.Sequential(ScaledStdConv2d(3, C, 3), filled(BatchNormAct2d(C))).eval(), images()
    expected = model(x)
    (skipped,) = bn.fold(model, x).skipped
    assert "its output would differ" in skipped.why
    assert torch.equal(model(x), expected)


def test_a_convolution_after_the_norm_that_may_pad_is_refused() -> None:
    model = nn.Sequential(filled(BatchNormAct2d(3)), Conv2dSame(3, C, 3, stride=2)).eval()
    (skipped,) = bn.fold(model, torch.randn(2, 3, 7, 7)).skipped
    assert "may pad its input" in skipped.why


def test_a_weight_that_other_code_reads_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = Conv2dSame(3, 3, 1), filled(BatchNormAct2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight)

    (skipped,) = bn.fold(Tied().eval(), images()).skipped
    assert "other code reads its parameters" in skipped.why


def test_rows_are_not_matched_by_similar_names() -> None:
    for module, name in (("mytimm.layers", "BatchNormAct2d"), ("timm.layers", "MyBatchNormAct2d")):
        assert kind_of(type(name, (nn.BatchNorm2d,), {"__module__": module})) is None
    assert libraries.BatchNormAct2d.__module__ == "timm.layers.norm_act"


@pytest.mark.parametrize("wrong", [nn.Conv2d, type("SameConv", (nn.Conv2d,), {}), int, "BatchNorm2d"])
@pytest.mark.parametrize("tool", [bn.convert, bn.fold, bn.freeze, bn.to_group_norm])
def test_also_takes_classes_of_batch_norms_only(tool: Any, wrong: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(TypeError, match=r"also takes classes of batch norm layers, and .* is not one"):
        tool(model, also=(wrong,))
    assert type(model[1]) is nn.BatchNorm2d
