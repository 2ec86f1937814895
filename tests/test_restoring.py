"""What a model's forward changes is taken back, all of it or nothing."""

from __future__ import annotations

import collections
import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.restoring import unchanged


@dataclasses.dataclass
class Meter:
    count: int = 0
    seen: list[float] = dataclasses.field(default_factory=list)


class Cache:
    def __init__(self) -> None:
        self.meter = Meter()
        self.by_name: dict[str, list[int]] = {"a": []}


class Busy(nn.Module):
    """Its forward changes whatever a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.embed = nn.Embedding(4, 2, max_norm=0.1)
        self.hidden = (nn.Linear(2, 2, bias=False),)  # not registered, as some libraries hide a module
        self.count = 1000
        self.log: list[Any] = []
        self.nested: dict[str, Any] = {"list": [], "tuple": ([],)}
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.default: Any = collections.defaultdict(list)
        self.queue: Any = collections.deque([1, 2], maxlen=3)
        self.names = {"x"}
        self.raw = bytearray(b"abc")
        self.array = np.zeros(3)
        self.plain = torch.zeros(2)
        self.cache = Cache()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.log.append(x.mean())
        self.nested["list"].append(1)
        self.nested["tuple"][0].append(1)
        self.ordered.move_to_end("a")
        self.default["new"].append(1)
        self.queue.append(3)
        self.queue.append(4)
        self.names.add("y")
        self.raw += b"d"
        self.array += 1
        self.plain += 1
        self.cache.meter.count += 1
        self.cache.meter.seen.append(1.0)
        self.cache.by_name["a"].append(1)
        self.cache.by_name["b"] = []
        self.hidden[0].weight.requires_grad_(False)
        self.hidden[0].mark = True
        self.added = "attribute"
        self.embed(torch.arange(4))
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre", "state_dict_post"):
            register = getattr(self.norm, f"register_{kind}_hook")
            register(lambda *_: None)
        self.norm.register_forward_hook(lambda *_, **__: None, with_kwargs=True, always_call=True)
        if self.norm.weight.requires_grad:
            self.norm.weight.register_hook(lambda gradient: gradient)
            self.norm.weight.register_post_accumulate_grad_hook(lambda parameter: None)
        self.norm.extra = nn.Identity()
        self.norm.register_buffer("late", torch.ones(1))
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        torch.rand(1, generator=self.generator)
        return self.norm(x)


def picture(model: Busy) -> dict[str, Any]:
    """Everything that can be compared, deeply; of hooks how many there are."""
    attributes = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    kept = {
        name: copy.deepcopy(value) for name, value in attributes.items() if name not in ("cache", "hidden", "generator")
    }
    cache = model.cache
    norm = model.norm
    kept |= {"meter": (cache.meter.count, [*cache.meter.seen]), "by_name": copy.deepcopy(cache.by_name)}
    kept["hooks"] = {name: len(value) for name, value in vars(norm).items() if name.endswith("_hooks")}
    kept["flags"] = {name: dict(value) for name, value in vars(norm).items() if "hooks_" in name}
    weight = norm.weight
    kept["of the weight"] = [len(getattr(weight, n) or ()) for n in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    kept["state"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept["children"] = [name for name, _ in model.named_modules()]
    kept["hidden"] = (model.hidden[0].weight.requires_grad, sorted(vars(model.hidden[0])))
    kept["numbers"] = (
        torch.get_rng_state(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
        model.generator.get_state(),
    )
    return kept


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in {*one, *other} if key not in one or key not in other or not same(one[key], other[key])]


def test_the_example_changes_all_that_it_is_meant_to() -> None:
    model = Busy()
    before = picture(model)
    model(torch.randn(4, 3, 2, 2))
    assert {*before} - {*differences(before, picture(model))} <= {"training", "flags"}


@pytest.mark.parametrize("fails", [False, True])
def test_all_state_is_restored(fails: bool) -> None:
    model = Busy()
    before, identities = picture(model), {name: id(value) for name, value in vars(model).items()}

    def run() -> None:
        with unchanged(model):
            model(torch.randn(4, 3, 2, 2))
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    assert differences(before, picture(model)) == []
    kept = {name: id(value) for name, value in vars(model).items()}
    assert kept == identities, "the same objects, with what they held"


TOOLS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "compare": lambda model, x: bn.compare(model, x),
    "recalibrate": lambda model, x: bn.recalibrate(model, [x]),
    "undo": lambda model, x: bn.undo(model, [x]),
    "average": lambda model, x: bn.average(model, [model.state_dict()], [x]),
    "fold": lambda model, x: bn.fold(model.eval(), x),
    "repair": lambda model, x: bn.repair(model, [{k: v.clone() for k, v in model.state_dict().items()}], [x]),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_changes_what_it_says_and_nothing_else(tool: str) -> None:
    model, x = Busy().eval(), torch.randn(4, 3, 2, 2)
    before = picture(model)
    TOOLS[tool](model, x)
    after = picture(model)
    assert set(differences(before, after)) <= ({"state"} if tool not in ("compare", "fold") else set())
    changed = {name for name in before["state"] if not same(before["state"][name], after["state"][name])}
    assert all(name.startswith("norm.") for name in changed)


class FirstForward(nn.Module):
    """Registers hooks in its first forward and notes it, as transformers 5 does: in part taken back, it breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
        self.caught: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not getattr(self, "_installed", False):
            for block in self.blocks:
                block.register_forward_hook(lambda module, args, output: self.caught.append(output))
            self._installed = True
        self.caught.clear()
        for block in self.blocks:
            x = block(x)
        return torch.stack([output.mean() for output in self.caught])


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_a_model_that_never_ran_can_run_afterwards(tool: str) -> None:
    torch.manual_seed(0)
    model, x = FirstForward().eval(), torch.randn(4, 3, 5, 5)
    reference = copy.deepcopy(model)
    TOOLS[tool](model, x)
    assert not any(block._forward_hooks for block in model.blocks)
    assert model.eval()(x).shape == reference(x).shape == (2,)
    assert [len(block._forward_hooks) for block in model.blocks] == [1, 1]
    if tool in ("compare", "fold"):
        torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize("tool", ["compare", "recalibrate"])
def test_a_lazy_model_stays_lazy(tool: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2), nn.LazyBatchNorm1d())
    model.eval()
    TOOLS[tool](model, torch.randn(4, 3, 5, 5))
    assert type(model[3]) is nn.LazyLinear
    assert type(model[4]) is nn.LazyBatchNorm1d
    assert model[3].has_uninitialized_params()
    assert model[4].has_uninitialized_params()
    assert model(torch.randn(4, 3, 6, 6)).shape == (4, 2), "of another size: it had not taken the first one's"


def test_random_number_generators_are_restored() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
    expected = torch.rand(3)
    torch.manual_seed(5)
    bn.recalibrate(model, [torch.ones(4, 3, 2, 2).normal_(generator=torch.Generator()) for _ in range(2)])
    bn.compare(model.eval(), torch.ones(4, 3, 2, 2).normal_(generator=torch.Generator()))
    torch.testing.assert_close(torch.rand(3), expected)


def test_recursive_containers_end() -> None:
    model: Any = nn.Sequential(nn.BatchNorm2d(3))
    model.mine = [model]
    model.mine.append(model.mine)
    with unchanged(model):
        model.mine.append(1)
    assert len(model.mine) == 2
