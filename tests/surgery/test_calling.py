"""The one rule by which every tool calls a model with batches or with an example."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn

Tool = Callable[..., object]


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


BATCHES: dict[str, Tool] = {
    "average": lambda model, batch, **options: bn.average(model, [model.state_dict()], [batch], **options),
    "compare": bn.compare,
    "recalibrate": lambda model, batch, **options: bn.recalibrate(model, [batch], **options),
    "repair": lambda model, batch, **options: bn.repair(model, [copied(model)], [batch], **options),
    "undo": lambda model, batch, **options: bn.undo(model, [batch], **options),
}
EXAMPLE: dict[str, Tool] = {"fold": bn.fold}


class Net(nn.Module):
    """Notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: Any = None, *, shift: Any = None) -> Tensor:
        CALLS.append((x, scale, shift))
        return self.norm(self.conv(x))


CALLS: list[tuple[Any, ...]] = []
X = torch.arange(96.0).reshape(2, 3, 4, 4)
ONE = torch.ones(1)

# What is given, forward_fn, and (x, scale, shift) as the model is to receive them.
BOTH: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "a tensor": (X, None, (X, None, None)),
    "a mapping": ({"x": X, "shift": ONE}, None, (X, None, ONE)),
    "an ordered mapping": (OrderedDict(shift=ONE, x=X), None, (X, None, ONE)),
    "forward_fn": ([ONE, {"image": X}], lambda model, given: model(given[1]["image"], given[0]), (X, ONE, None)),
    "forward_fn and a mapping": ({"x": X}, lambda model, given: model(given["x"], 2), (X, 2, None)),
}
OF_BATCHES = {
    "a tuple": ((X, ONE), None, (X, None, None)),
    "a list": ([X, ONE], None, (X, None, None)),
}
OF_AN_EXAMPLE = {"a tuple": ((X, ONE), None, (X, ONE, None)), "a tuple of one": ((X,), None, (X, None, None))}

CASES = [
    *((tool, run, *case) for tool, run in BATCHES.items() for case in (BOTH | OF_BATCHES).items()),
    *((tool, run, *case) for tool, run in EXAMPLE.items() for case in (BOTH | OF_AN_EXAMPLE).items()),
]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other


@pytest.mark.parametrize(("tool", "run", "form", "case"), CASES, ids=lambda value: value if type(value) is str else "")
def test_the_model_is_called_as_the_rule_says(tool: str, run: Tool, form: str, case: tuple[Any, Any, Any]) -> None:
    given, forward_fn, expected = case
    model = Net().eval() if tool == "fold" else Net()
    CALLS.clear()
    run(model, given, **({} if forward_fn is None else {"forward_fn": forward_fn}))
    assert CALLS
    for call in CALLS:
        assert all(same(*pair) for pair in zip(call, expected, strict=True))
    assert all(call[0] is not X for call in CALLS), "a copy: the model may write to its input"


@pytest.mark.parametrize("tool", [*BATCHES, *EXAMPLE])
def test_other_batches_need_forward_fn(tool: str) -> None:
    run = (BATCHES | EXAMPLE)[tool]
    which = "example" if tool in EXAMPLE else "batch"
    with pytest.raises(TypeError, match=rf"pass forward_fn\(model, {which}\) for any other"):
        run(Net().eval(), "text")
    with pytest.raises(TypeError, match=rf"forward_fn must be a function of \(model, {which}\), got int"):
        run(Net().eval(), X, forward_fn=3)
