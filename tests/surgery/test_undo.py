"""gamma and beta that give back what the normalization took: the network without its batch norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_recalibrate import Own, Raising, Shared, images, network, running, same, state
from torch import Tensor, nn
from zoo import WITHOUT_NORMS, ZOO, Kind

import batchnorm as bn
from batchnorm.surgery._shared.layers import STOCK
from batchnorm.surgery.freeze import freeze
from batchnorm.surgery.undo import undo


def without_norms(model: nn.Module) -> nn.Module:
    """The model with torch.nn.Identity in place of the norms that can be undone."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in STOCK and child.affine and child.track_running_stats:
                setattr(parent, name, nn.Identity())
    return model


@WITHOUT_NORMS
@pytest.mark.parametrize("kind", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_in_eval_it_is_the_network_without_norms(kind: Kind, converted: bool, training: bool) -> None:
    torch.manual_seed(2)
    model = kind.make()
    x = torch.randn(6, *kind.shape[1:])
    model(x)
    expected = without_norms(model).eval()(x).detach()
    model.train(training)
    if converted:
        bn.convert(model)
    record = undo(model, iter(x.split(3)))
    assert [m.training for m in model.modules()] == [training] * len(list(model.modules()))
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert all(layer.index_after == pytest.approx(1, abs=1e-4) for layer in record.layers)
    if converted:
        bn.revert(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("seed", range(3))
def test_gamma_and_beta_are_the_deviation_and_mean_of_the_data(seed: int) -> None:
    model, x = network(seed), images()
    model[1].eps = 0.5
    plain = without_norms(model).eval()
    before = copy.deepcopy(model)
    record = undo(model, x.split([5, 19]))
    for name, cut in (("1", 1), ("5", 5), ("9", 9)):
        layer = model.get_submodule(name)
        values = plain[:cut](x).transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.bias, values.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.weight, (values.var(1) + layer.eps).sqrt(), rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.bias.detach(), layer.running_mean)
        assert int(layer.num_batches_tracked) == 2
        assert layer.weight.requires_grad
    assert [layer.names for layer in record.layers] == [("1",), ("5",), ("9",)]
    assert all(torch.equal(a, b) for a, b in zip(model[8].parameters(), before[8].parameters(), strict=True))
    assert record.batches == 2
    text = str(record).splitlines()
    assert text[0] == "3 batch norm layers undone on 2 batches"
    assert text[1].startswith("   2  BatchNorm2d  undo index ")
    assert text[1].endswith("→ 1.00 in the median")


def test_the_optimizer_from_before_trains_on() -> None:
    model, x = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    undo(model, [x])
    undone = model[1].weight.clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, undone)


@pytest.mark.parametrize("act", ["relu", "tanh", "silu"])
def test_act_and_residual_of_a_layer_stay(act: str) -> None:
    layer = bn.BatchNorm1d(4, act=act)
    x, residual = torch.randn(2, 10, 4).unbind()
    undo(layer, [(x, residual)], lambda m, batch: m(batch[0], batch[1]))
    expected = getattr(torch, act, nn.functional.silu)(x + residual)
    torch.testing.assert_close(layer.eval()(x, residual), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_called_twice() -> None:
    model, x = Shared(), torch.randn(20, 3) * 3 + 2
    undo(model, x.split(10))
    torch.testing.assert_close(model.eval()(x), model.linear(x), rtol=1e-4, atol=1e-5)


def test_skipped_layers_are_named() -> None:
    layers = {
        "plain": nn.BatchNorm1d(3, affine=False),
        "no_beta": bn.BatchNorm1d(3, bias=False),
        "no_statistics": nn.BatchNorm1d(3, track_running_stats=False),
        "own": Own(3),
        "frozen": nn.BatchNorm1d(3),
        "frozen_gamma": nn.BatchNorm1d(3),
        "asleep": nn.BatchNorm1d(3).eval(),
        "one": nn.BatchNorm1d(3),
        "other": nn.BatchNorm1d(3),
        "good": nn.BatchNorm1d(3),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    layers["asleep"].eval()
    layers["other"].weight = layers["one"].weight
    freeze(layers["frozen"], gamma=False, beta=False)
    freeze(layers["frozen_gamma"], statistics=False, beta=False)
    model.add_module("unused", nn.BatchNorm1d(3))
    x = torch.randn(20, 3)
    before = state(nn.ModuleList([layer for name, layer in layers.items() if name != "good"]))
    record = undo(model, [x], lambda m, batch: m[:-1](batch))
    assert same(state(nn.ModuleList([layer for name, layer in layers.items() if name != "good"]))[1:], before[1:])
    assert [layer.names for layer in record.layers] == [("good",)]
    reasons = {skipped.name: skipped.why.split(":")[0] for skipped in record.skipped}
    assert reasons == {
        "plain": "it has no gamma",
        "no_beta": "it has no beta",
        "no_statistics": "it has no running statistics",
        "own": "a subclass of BatchNorm1d, whose forward equals batch norm's on random input",
        "frozen": "frozen",
        "frozen_gamma": "its gamma is frozen",
        "asleep": "in eval mode while the model trains, so frozen by its user",
        "one": "its gamma is shared with another module",
        "other": "its gamma is shared with another module",
        "unused": "never called",
    }
    assert "left alone (its gamma is shared with another module): one, other" in str(record)
    assert ("own",) in [layer.names for layer in undo(model, [x], also=[Own]).layers]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("converted", [False, True])
def test_a_raising_loader_changes_nothing(error: type[BaseException], converted: bool) -> None:
    model = network()
    model(images())
    if converted:
        bn.convert(model)
    before = state(model)
    with pytest.raises(error, match="from the loader"):
        undo(model, Raising(error, 0, 2))
    assert same(state(model), before)


def test_an_interrupted_write_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.surgery import undo as module

    model = network()
    set_gamma_beta = module._set_gamma_beta

    def interrupted(norm: Any) -> None:
        if norm.layer is model[5]:
            raise KeyboardInterrupt
        set_gamma_beta(norm)

    monkeypatch.setattr(module, "_set_gamma_beta", interrupted)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        undo(model, [images()])
    assert same(state(model), before)


def test_values_that_are_not_finite_are_refused() -> None:
    """A deep network without normalization may overflow."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[0].weight.fill_(1e30)
        model[2].weight.fill_(1e30)
    before = state(model)
    with pytest.raises(ValueError, match="undo: batch 0 gives layer '3' values that are not finite"):
        undo(model, [torch.rand(5, 3)])
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Tensor(), []), TypeError, "undo takes a torch.nn.Module, got Tensor"),
        ((nn.BatchNorm1d(3), []), ValueError, "undo: there are no batches"),
        ((nn.BatchNorm1d(3), torch.ones(4, 3)), TypeError, r"for a single batch pass \[batch\]"),
        ((nn.BatchNorm1d(3), [torch.ones(1, 3)]), ValueError, "the layer received one value per channel in all"),
    ],
)
def test_mistakes(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        undo(*arguments)


def test_nothing_to_undo() -> None:
    with pytest.warns(UserWarning, match="undo found no batch norm layer in it"):
        assert str(undo(nn.Linear(3, 3), [torch.ones(4, 3)])) == "0 batch norm layers undone"


def test_a_poisoned_checkpoint_heals() -> None:
    model = network()
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.fill_(torch.nan)
    record = undo(model, [images()])
    assert all(tensor.isfinite().all() for tensor in running(model).values())
    assert all(layer.index_before != layer.index_before for layer in record.layers)
    assert "undo index unknown → 1.00" in str(record)
