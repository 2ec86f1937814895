"""Every tool that changes a model changes all of it, or nothing where an error is raised."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.restoring import all_or_nothing


def stock() -> nn.Module:
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*(module for block in blocks for module in block))
    model(torch.randn(4, 3, 4, 4)).mean().backward()
    return model.eval()


def domains() -> nn.Module:
    return nn.Sequential(*(bn.DomainBatchNorm2d(3, domains=2) for _ in range(3)))


def built(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = stock()
        change(model)
        return model

    return make


X = torch.randn(4, 3, 4, 4)
# The model, the tool, and the function whose second call fails: all of them change a layer.
TOOLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str, str]] = {
    "average": (stock, lambda model: bn.average(model, [model.state_dict()], [X]), "merging.average", "write"),
    "convert": (stock, bn.convert, "surgery.convert", "set_class"),
    "fold": (stock, lambda model: bn.fold(model, X), "surgery.fold", "set_class"),
    "freeze": (stock, bn.freeze, "surgery.freeze", "set_class"),
    "keep_domain": (domains, lambda model: bn.keep_domain(model, 1), "surgery.keep_domain", "set_class"),
    "recalibrate": (stock, lambda model: bn.recalibrate(model, [X]), "surgery.recalibrate", "store"),
    "repair": (stock, lambda model: bn.repair(model, [copy.deepcopy(model)], [X]), "merging.repair", "_apply"),
    "revert": (built(bn.convert), bn.revert, "surgery.convert", "set_class"),
    "sync": (stock, bn.sync, "surgery.sync", "set_class"),
    "to_group_norm": (stock, bn.to_group_norm, "surgery.to_group_norm", "set_class"),
    "to_torch": (
        lambda: nn.Sequential(*(bn.BatchNorm2d(3) for _ in range(3))),
        bn.to_torch,
        "surgery.to_group_norm",
        "set_class",
    ),
    "undo": (stock, lambda model: bn.undo(model, [X]), "surgery.undo", "write"),
    "unfreeze": (built(bn.freeze), bn.unfreeze, "surgery.freeze", "set_class"),
}


def picture(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for name, module in model.named_modules():
        found += [(name, id(module), type(module), id(vars(module)), sorted(vars(module)), vars(module)["training"])]
        found += [
            (key, id(tensor), tensor.requires_grad, id(tensor.grad), tensor.tolist())
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
    return found


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_middle(tool: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    make, change, module, function = TOOLS[tool]
    model = make()
    found = importlib.import_module(f"batchnorm.{module}")
    real, calls = getattr(found, function), []

    def failing(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise error
        real(*given)

    before = picture(model)
    monkeypatch.setattr(found, function, failing)
    with pytest.raises(error):
        change(model)
    assert picture(model) == before
    monkeypatch.undo()
    change(model)
    assert picture(model) != before


def test_the_context_restores_all_but_values_that_are_not_listed() -> None:
    model = stock()
    one, other = model[1].running_mean, model[4].running_mean
    one.fill_(-0.0)
    before = picture(model)
    values = other.clone()

    def fail() -> None:
        with all_or_nothing(model, [one]):
            one.zero_()
            model[0].weight.requires_grad_(False)
            model[0].weight.grad = None
            model[1].mark = 1
            model[2] = nn.Tanh()
            model.register_forward_hook(lambda *_: None)
            model.train()
            model[4].running_mean += 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(other, values + 1)
    other.copy_(values)
    assert picture(model) == before
    assert bool(torch.signbit(one).all()), "to the bit"
    assert not model._forward_hooks


def test_only_listed_tensors_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock()
    clone, copied = torch.Tensor.clone, []
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copied.append(tensor) or clone(tensor))
    with all_or_nothing(model, [model[1].running_mean]):
        pass
    bn.convert(model)
    assert len(copied) == 1
