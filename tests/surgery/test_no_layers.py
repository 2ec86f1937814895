"""A tool that finds no batch norm layer says so, once and at the caller's line; records count in the right number."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn


def entered(context: Any) -> None:
    with context:
        pass


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.ReLU()).eval()


X = torch.ones(4, 3)
TOOLS: dict[str, Callable[[nn.Module], object]] = {
    "adapt": lambda model: entered(bn.adapt(model)),
    "average": lambda model: bn.average(model, [model.state_dict()], [X]),
    "compare": lambda model: bn.compare(model, X),
    "convert": bn.convert,
    "fold": lambda model: bn.fold(model, X),
    "freeze": bn.freeze,
    "keep_domain": lambda model: bn.keep_domain(model, 0),
    "pool_statistics": bn.pool_statistics,
    "recalibrate": lambda model: bn.recalibrate(model, [X]),
    "sync": bn.sync,
    "to_group_norm": bn.to_group_norm,
    "to_torch": bn.to_torch,
    "undo": lambda model: bn.undo(model, [X]),
    "unfreeze": bn.unfreeze,
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("make", [plain, lambda: nn.Identity().eval()], ids=["layer norm", "no layer at all"])
def test_a_tool_that_finds_no_layer_warns_once(tool: str, make: Callable[[], nn.Module]) -> None:
    with pytest.warns(UserWarning, match="found no") as caught:
        TOOLS[tool](make())
    assert len(caught) == 1
    what, found, which = str(caught[0].message).partition(" found no ")
    assert (found, which in ("batch norm layer in it", "DomainBatchNorm layer in it")) == (" found no ", True)
    assert caught[0].filename == __file__
    where = entered if tool == "adapt" else TOOLS[tool]
    if inspect.isfunction(where) and where.__module__ == __name__:
        lines, first = inspect.getsourcelines(where)
        assert first <= caught[0].lineno < first + len(lines)
    assert tool.startswith(what)


def test_param_groups_of_a_network_without_any_norm_warns_and_layer_norms_are_norms() -> None:
    with pytest.warns(UserWarning, match="param_groups found no normalization layer in it"):
        bn.param_groups(nn.Linear(3, 3), 0.1)
    bn.param_groups(plain(), 0.1)


def test_skipped_layers_are_layers() -> None:
    """What is named in `skipped` was found: no warning."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d()).eval()
    assert len(bn.freeze(model).skipped) == 1
    assert len(bn.to_group_norm(model).skipped) == 1
    bn.to_torch(nn.Sequential(nn.BatchNorm1d(3)))
    groups = nn.Sequential(bn.BatchNorm2d(4, act="relu"))
    bn.to_group_norm(groups)
    bn.to_torch(groups)


def test_one_layer_is_called_one_layer() -> None:
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))  # noqa: E731
    images = [torch.randn(8, 3, 4, 4)]
    heads = {
        "converted": str(bn.convert(make())),
        "folded": str(bn.fold(make().eval(), images[0])),
        "frozen": str(bn.freeze(make())),
        "recalibrated": str(bn.recalibrate(make(), images)),
        "undone": str(bn.undo(make(), images)),
        "replaced": str(bn.to_group_norm(make())),
        "compared": str(bn.compare(make(), images[0])),
        "averaged": str(bn.average(make(), [make().state_dict()], images)),
    }
    expected = {
        "converted": "1 of 1 batch norm layer converted, 0 fused",
        "folded": "1 of 1 batch norm layer folded; outputs differ by ",
        "frozen": "1 batch norm layer frozen",
        "recalibrated": "1 batch norm layer recalibrated on 1 batch in 1 pass",
        "undone": "1 batch norm layer undone on 1 batch",
        "replaced": "1 layer replaced",
        "compared": "1 of 1 batch norm layer differs between training and eval; ",
    }
    for tool, head in expected.items():
        assert heads[tool].startswith(head), (tool, heads[tool])
    assert "averaged over 1 state\n1 batch norm layer recalibrated on 1 batch" in heads["averaged"]
