"""gamma and beta that are computed from other parameters: pruned, weight-normalized or parametrized ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.surgery._shared.layers import made_of


class Doubled(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=3)


def pruned_both(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=3)
    prune.random_unstructured(layer, "bias", amount=2)


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)


KINDS = (pruned, pruned_both)


def network(change: Callable[[nn.Module], None] | None, converted: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    )
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
        if change is not None:
            change(layer)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 12, 12))
    if converted:
        bn.convert(model)
    return model


def test_the_parameters_that_a_tensor_is_made_of() -> None:
    layer = nn.BatchNorm2d(8)
    assert made_of(layer, "weight") == (layer.weight,)
    pruned_both(layer)
    assert made_of(layer, "weight") == (layer.weight_orig,)
    assert made_of(layer, "bias") == (layer.bias_orig,)
    other = nn.BatchNorm2d(8)
    parametrized(other)
    assert made_of(other, "weight") == (other.parametrizations.weight.original,)
    assert made_of(nn.BatchNorm2d(8, affine=False), "weight") == ()
    third = nn.BatchNorm2d(8, affine=False)
    third.register_parameter("weight_of_a_loss", nn.Parameter(torch.ones(1)))
    assert made_of(third, "weight") == (), "a parameter whose name begins alike is none of it"


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("change", KINDS)
def test_freeze_and_unfreeze(change: Callable[[nn.Module], None], converted: bool) -> None:
    model = network(change, converted)
    done = bn.freeze(model)
    assert done.skipped == ()
    assert [layer.parts for layer in done.layers] == [("statistics", "gamma", "beta")] * 2
    of_norms = [p for layer in (model[1], model[4]) for p in layer.parameters()]
    assert not any(p.requires_grad for p in of_norms)
    before = [p.detach().clone() for p in of_norms]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(4, 3, 12, 12)).square().mean().backward()
    optimizer.step()
    assert all(map(torch.equal, before, of_norms))
    bn.unfreeze(model)
    assert all(p.requires_grad for p in of_norms)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("change", [*KINDS, parametrized])
def test_param_groups(change: Callable[[nn.Module], None], converted: bool) -> None:
    model = network(change, converted)
    groups = {group["name"]: group["params"] for group in bn.param_groups(model, 0.1)}
    for role, name in (("gamma", "weight"), ("beta", "bias")):
        expected = [p for layer in (model[1], model[4]) for p in made_of(layer, name)]
        assert [id(p) for p in groups[role]] == [id(p) for p in expected]


@pytest.mark.parametrize("change", KINDS)
def test_undo_says_why_not(change: Callable[[nn.Module], None]) -> None:
    model = network(change)
    x = torch.randn(4, 3, 12, 12)
    before = model.eval()(x)
    done = bn.undo(model, [x])
    assert done.layers == ()
    assert all("computed from other parameters" in skipped.why for skipped in done.skipped)
    assert torch.equal(model.eval()(x), before)


SAME = {
    "convert": lambda model, x: bn.convert(model),
    "fold": lambda model, x: bn.fold(model.eval(), x),
    "sync": lambda model, x: bn.sync(model),
    "to_torch": lambda model, x: bn.to_torch(model),
    "compare": lambda model, x: bn.compare(model, x),
    "freeze": lambda model, x: bn.freeze(model),
}


@pytest.mark.parametrize("tool", SAME)
@pytest.mark.parametrize("change", KINDS)
def test_the_other_tools_compute_the_same(change: Callable[[nn.Module], None], tool: str) -> None:
    model, x = network(change), torch.randn(4, 3, 12, 12)
    expected = model.eval()(x)
    SAME[tool](model, x)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", KINDS)
def test_group_norm_keeps_the_mask(change: Callable[[nn.Module], None]) -> None:
    model = network(change)
    masks = {name: buffer for name, buffer in model.named_buffers() if name.endswith("_mask")}
    bn.to_group_norm(model, groups=2)
    assert {name: buffer for name, buffer in model.named_buffers() if name.endswith("_mask")}.keys() == masks.keys()
    y = model(torch.randn(4, 3, 12, 12))
    y.square().mean().backward()
    assert (model[1].weight_orig.grad[model[1].weight_mask == 0] == 0).all()
    assert (model[1].weight == model[1].weight_orig * model[1].weight_mask).all()
