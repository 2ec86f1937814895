"""What must not be fused is not, and what changes after the conversion counts when the model runs."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
from hazards import HAZARDS, Base, Residual, Switched
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm as bn
from batchnorm.surgery._fusing import runtime


def outcome(model: nn.Module, x: Tensor) -> list[object]:
    """Outputs, gradients and state over three calls, the last in eval mode."""
    found: list[object] = []
    for step in range(3):
        torch.manual_seed(step)
        model.train(step < 2).zero_grad()
        leaf = (x + step).requires_grad_(model.differentiable)
        with torch.set_grad_enabled(model.differentiable):
            y = model(leaf)
        if y is not None and y.requires_grad:
            y.square().sum().backward()
        found += [0 if y is None else y, leaf.grad if leaf.grad is not None else 0]
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    return found


def assert_unchanged(model: nn.Module, stock: nn.Module) -> None:
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(outcome(model, x), outcome(stock, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HAZARDS)
def test_it_does_what_it_did(name: str) -> None:
    stock = HAZARDS[name]()
    model = copy.deepcopy(stock)
    bn.convert(model)
    assert_unchanged(model, stock)


# --- what changes after the conversion --------------------------------------------------------------------------------


def replace_activation(model: nn.Module) -> None:
    model.relu = nn.SiLU()


def replace_norm(model: nn.Module) -> None:
    model.bn = nn.Identity()


def replace_norm_by_a_group_norm(model: nn.Module) -> None:
    model.bn = nn.GroupNorm(3, 3)


class Aliasing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3.0)


def replace_what_makes_the_input(model: nn.Module) -> None:
    model.conv, model.extra = nn.Sequential(), Aliasing()


def hook_what_makes_the_input(model: nn.Module) -> None:
    model.conv.register_forward_hook(lambda m, a, y: a[0].mul_(1.5))
    model.extra = Aliasing()


def hook_the_activation(model: nn.Module) -> None:
    model.relu.register_forward_hook(lambda m, a, y: y + a[0])


def hook_the_norm(model: nn.Module) -> None:
    model.bn.register_forward_hook(lambda m, a, y: y * 2)


def replace_the_norms_forward(model: nn.Module) -> None:
    model.bn.forward = lambda x: x * 2


LATER: dict[str, Callable[[nn.Module], None]] = {
    f.__name__: f
    for f in (
        replace_activation,
        replace_norm,
        replace_norm_by_a_group_norm,
        replace_what_makes_the_input,
        hook_what_makes_the_input,
        hook_the_activation,
        hook_the_norm,
        replace_the_norms_forward,
    )
}


@pytest.mark.parametrize("name", LATER)
def test_what_is_changed_after_the_conversion_counts(name: str) -> None:
    stock = Residual()
    model = copy.deepcopy(stock)
    assert bn.convert(model).fused == 1
    for one in (model, stock):
        torch.manual_seed(1)
        LATER[name](one)
    x = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x.clone()), stock(x.clone()), rtol=1e-4, atol=1e-4)
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-4)


class Setting(Base):
    def forward(self, x):
        y = F.leaky_relu(self.bn(self.conv(x)), self.slope)
        return y if self.flag else y + x


def test_settings_are_read_when_it_runs() -> None:
    stock = Setting()
    model = copy.deepcopy(stock)
    assert [layer.act for layer in bn.convert(model).layers if layer.name == "bn"] == ["leaky_relu"]
    for flag, slope in ((True, 0.3), (False, 0.9), (False, -0.2)):
        for one in (model, stock):
            one.flag, one.slope = flag, slope
        assert_unchanged(model, stock)


def test_conditions_are_tested_when_it_runs() -> None:
    stock = Switched()
    model = copy.deepcopy(stock)
    assert bn.convert(model).fused == 1
    for flag in (True, False):
        stock.flag = model.flag = flag
        assert_unchanged(model, stock)


class Calling(nn.Sequential):
    """Its calls do more than its forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def test_a_modules_own_call_runs() -> None:
    stock = TailOf()
    stock.body.__class__ = Calling
    model = copy.deepcopy(stock)
    bn.convert(model)
    x = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(model(x), stock(x))


def test_layers_called_from_elsewhere_are_plain_batch_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU(), nn.BatchNorm2d(3), nn.Sigmoid())
    stock = copy.deepcopy(model)
    bn.convert(model)
    x = torch.randn(4, 3, 5, 5)
    y = x
    for layer in model:
        y = layer(y)
    torch.testing.assert_close(y, stock(x))
    torch.testing.assert_close(model[:2](x), stock[:2](x))
    torch.testing.assert_close(model[1:4](x), stock[1:4](x))


class TailOf(nn.Module):
    """Its parent joins the addition to the batch norm inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.relu = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


def test_hooks_on_a_module_around_the_layer_see_its_output() -> None:
    stock = TailOf()
    model = copy.deepcopy(stock)
    assert bn.convert(model).fused == 1
    seen: list[Tensor] = []
    for one in (model, stock):
        one.body.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
        one(torch.ones(2, 3, 4, 4).cumsum(3))
    torch.testing.assert_close(seen[0], seen[1])
    assert (seen[0] < 0).any(), "before the activation"


class Outer(nn.Module):
    """Adds to a module whose output is a sum already."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        r = x.mul_(2.0)
        y += r
        return F.relu(y)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


def test_a_sum_is_computed_before_it_is_returned() -> None:
    stock = Outer()
    model = copy.deepcopy(stock)
    bn.convert(model)
    x = torch.randn(4, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(x.clone()), stock(x.clone()))


def test_a_deferred_value_takes_one_residual() -> None:
    x = torch.randn(4, 3)
    layer = bn.BatchNorm1d(3)
    held = runtime.defer(None, layer, x)
    assert held.takes(x)
    assert not held.takes(x[:1])
    assert not held.takes(x.double())
    assert not held.takes(1.0)
    assert not held.takes(x.to_sparse())
    held = runtime.add(operator.add, held, x)
    assert not held.takes(x)
    torch.testing.assert_close(runtime.settle(held), nn.BatchNorm1d(3)(x) + x)


class Sums(nn.Module):
    """An activation after an addition: in one expression, and over several statements."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.BatchNorm1d(8), nn.BatchNorm1d(8), act

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.act(self.one(x) + residual)
        z = self.two(y * 1)
        z += residual
        z = self.act(z)
        residual += 1
        return z


@pytest.mark.parametrize("length", [16, 20000])
@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Hardswish()],
)
def test_a_residual_may_change_before_backward(act: nn.Module, length: int) -> None:
    stock = Sums(act)
    model = copy.deepcopy(stock)
    record = bn.convert(model)
    joined = type(act) in (nn.ReLU, nn.Sigmoid, nn.Tanh)
    assert [(layer.residual, layer.act is not None) for layer in record.layers] == [(True, joined)] * 2
    x, residual, grad_y = torch.randn(3, 4, 8, length)
    found = []
    for one in (model, stock):
        leaf = x.clone().requires_grad_()
        y = one(leaf, residual.clone())
        y.backward(grad_y)
        found.append([y.detach(), leaf.grad, *(p.grad for p in one.parameters())])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4 * float(its.abs().max()))


class Annotated(nn.Module):
    """Local variables with annotations, which Python does not evaluate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        z: NotDefined = self.norm(x)  # type: ignore[name-defined]  # noqa: F821
        z = torch.relu(z)
        y: Tensor = z + 1
        return y


def test_a_variable_with_an_annotation_is_a_variable() -> None:
    stock = Annotated()
    model = copy.deepcopy(stock)
    (layer,) = bn.convert(model).layers
    assert layer.act == "relu"
    x = torch.randn(4, 8, 5)
    torch.testing.assert_close(model(x), stock(x))


class Readers(nn.Module):
    """Batch norms with which nothing fuses, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped, self.added, self.shortcut = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.nested, self.returned = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.dropout, self.convolution = nn.Dropout(), nn.Conv1d(8, 8, 1)
        self.sequence = nn.Sequential(nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        z = self.dropped(x)
        z = self.dropout(z)
        z = self.added(z) + self.shortcut(x)
        z = self.convolution(self.nested(z))
        z = self.sequence(z)
        return self.returned(z)


def test_the_record_names_what_reads_the_output_of_a_layer_that_is_not_fused() -> None:
    found = {layer.name: layer.why_not for layer in bn.convert(Readers()).layers}
    assert found == {
        "dropped": "read by z = self.dropout(z)",
        "added": "read by z = self.added(z) + self.shortcut(x)",
        "shortcut": None,
        "nested": "read by z = self.convolution(self.nested(z))",
        "returned": "its module returns the output, and no caller adds to it or activates it",
        "sequence.0": "read by Conv1d",
    }
