"""Sources that cannot be trusted, classes that cannot be changed, and what the classes made from them show."""

from __future__ import annotations

import abc
import copy
import importlib
import inspect
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch
from hazards import Base, Residual
from torch import nn
from zoo import BasicBlock, ResNet

import batchnorm as bn

MODULE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
    def forward(self, x):
        return torch.relu(self.bn(x))
"""


@pytest.fixture
def written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], type[nn.Module]]]:
    """Writes the module above with some changes and imports its class."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "written_module.py"

    def write(text: str) -> type[nn.Module]:
        path.write_text(text)
        sys.modules.pop("written_module", None)
        importlib.invalidate_caches()
        return importlib.import_module("written_module").Net

    yield write
    sys.modules.pop("written_module", None)


def test_a_file_that_changed_since_it_was_imported(written, tmp_path) -> None:
    model = written(MODULE)()
    (tmp_path / "written_module.py").write_text(MODULE.replace("self.bn(x))", "-self.bn(x))"))
    (layer,) = bn.convert(model).layers
    assert (layer.converted, layer.why_not) == (True, "the source of Net.forward is not the code that runs")
    x = torch.randn(5, 3)
    torch.testing.assert_close(model(x), nn.BatchNorm1d(3)(x).relu())


@pytest.mark.parametrize("changed", [True, False])
def test_a_pickle_of_a_class_that_changed_since(written, changed: bool) -> None:
    model = written(MODULE)()
    assert bn.convert(model).fused == 1
    data = pickle.dumps(model)
    cls = written(MODULE.replace("torch.relu", "torch.tanh") if changed else MODULE)
    loaded = pickle.loads(data)
    assert (type(loaded) is cls) is changed
    x = torch.randn(5, 3)
    y = nn.BatchNorm1d(3)(x)
    torch.testing.assert_close(loaded(x), y.tanh() if changed else y.relu())
    bn.revert(loaded)
    assert type(loaded.bn) is nn.BatchNorm1d
    assert type(loaded) is cls


def test_source_that_is_not_there() -> None:
    namespace = {"nn": nn, "torch": torch, "__name__": "nowhere"}
    exec(compile(MODULE, "<nowhere>", "exec"), namespace)
    (layer,) = bn.convert(namespace["Net"]()).layers
    assert (layer.converted, layer.fused) == (True, False)
    assert layer.why_not == "the source of Net.forward is not available"


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.relu(self.bn(x))


class Registered(Base):
    known: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: object) -> None:
        cls.known.append(cls)
        super().__init_subclass__(**kwargs)

    def forward(self, x):
        return self.relu(self.bn(x))


class Abstract(Base, abc.ABC):
    def forward(self, x):
        return self.relu(self.bn(x))


class OnTheInstance(Base):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.other_forward

    def other_forward(self, x):
        return self.relu(self.bn(x))


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Decorated, "no_grad.<locals>.decorate_context is no plain function (a decorator or a lambda)"),
        (Registered, "Registered defines __init_subclass__"),
        (Abstract, "Abstract has a metaclass"),
        (OnTheInstance, "the forward of this OnTheInstance is replaced on the instance"),
    ],
)
def test_classes_that_are_not_rewritten(cls: type[nn.Module], why: str) -> None:
    model = cls()
    stock = cls()
    stock.load_state_dict(model.state_dict())
    record = bn.convert(model)
    assert type(model) is cls
    assert record.converted == 2
    (layer,) = (layer for layer in record.layers if layer.name == "bn")
    assert layer.fused is False
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(model(x), stock(x))
    assert Registered.known == []


class Slotted(Base):
    __slots__ = ("place",)

    def __setattr__(self, name, value):
        if getattr(self, "closed", False):
            raise AttributeError("closed")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.relu(self.bn(x))


def test_slots_and_a_custom_setattr() -> None:
    model = Slotted()
    stock = copy.deepcopy(model)
    model.closed = True
    assert bn.convert(model).fused == 1
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(model(x), stock(x))
    bn.revert(model)
    assert type(model) is Slotted


def test_a_module_inside_itself() -> None:
    model = ResNet(BasicBlock(8, 8), out=8)
    model.layer1[0].above = model
    model.every = nn.ModuleList([model.layer1, model.bn1])
    record = bn.convert(model)
    assert (record.converted, record.fused) == (3, 3)
    bn.revert(model)
    assert type(model.bn1) is nn.BatchNorm2d


def test_the_fused_source_can_be_read_and_stands_in_tracebacks() -> None:
    model = Residual()
    bn.convert(model)
    text = inspect.getsource(type(model).forward)
    assert "__batchnorm__.add(__batchnorm__.operator.iadd, y, r)" in text
    model.extra = None
    with pytest.raises(TypeError) as caught:
        model(torch.randn(2, 3, 4, 4))
    assert "r = self.extra(x)" in "".join(traceback.format_exception(caught.value))
