"""Squeeze-and-excite gates: what `convert` rewrites returns the values of what was written, and the gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm as bn
from batchnorm import kernels
from batchnorm.autograd import gate
from batchnorm.kernels.contract import UnavailableError
from batchnorm.kernels.cpu import products
from batchnorm.surgery._fusing import gates
from randomness import SEED

CHANNELS = 12


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def scale(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.squeeze(x))


class ByPool(Gated):
    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(x))
        return x * self.scale(self.pool(x))


class ByMean(Gated):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(x))
        scale = self.scale(x.mean((2, 3), keepdim=True))
        return torch.mul(scale, x)


class InTwoMethods(Gated):
    def pooled(self, x: Tensor) -> Tensor:
        return self.scale(self.pool(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.pooled(x) * x


class BySequential(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), self.squeeze, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.gate(x) * x + x


class ThatEndsInANorm(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * self.scale(self.pool(x)))


GATED: list[type[Gated]] = [ByPool, ByMean, InTwoMethods, BySequential, ThatEndsInANorm]


def converted(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module, bn.Conversion]:
    torch.manual_seed(SEED)
    stock = cls().double()
    model = copy.deepcopy(stock)
    return stock, model, bn.convert(model)


def images(channels_last: bool = False) -> Tensor:
    x = torch.randn(8, CHANNELS, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    return x.to(memory_format=torch.channels_last) if channels_last else x


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(one.grad for one in (leaf, *model.parameters()) if one.grad is not None)]


def operations(y: Tensor) -> set[str]:
    todo, found = [y.grad_fn], set()
    while todo:
        one = todo.pop()
        if one is not None and one not in found:
            found.add(one)
            todo += [before for before, _ in one.next_functions]
    return {type(one).__name__ for one in found}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("cls", GATED)
def test_gradients_agree(cls: type[Gated], channels_last: bool) -> None:
    stock, model, record = converted(cls)
    assert len(record.gates) == 1
    x = images(channels_last)
    torch.testing.assert_close(gradients(model, x), gradients(stock, x), rtol=1e-9, atol=1e-11)
    found = operations(model(x.requires_grad_()))
    assert "_GateBackward" in found
    assert ("_AverageBackward" in found) == (cls is not BySequential)


@pytest.mark.parametrize("cls", GATED)
def test_second_gradients_agree(cls: type[Gated]) -> None:
    stock, model, _ = converted(cls)

    def second(model: nn.Module) -> Tensor:
        leaf = images().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(second(model), second(stock), rtol=1e-9, atol=1e-11)


def hooked(model: Gated) -> None:
    model.pool.register_forward_hook(lambda module, args, y: y * 2)


def frozen_gate(model: Gated) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def larger_pool(model: Gated) -> None:
    model.pool = nn.AdaptiveAvgPool2d((1, 2))
    model.squeeze = nn.Conv2d(CHANNELS, CHANNELS, (1, 2)).double()


@pytest.mark.parametrize("change", [hooked, frozen_gate, larger_pool])
def test_what_changes_after_the_conversion_counts(change: Callable[[Gated], None]) -> None:
    stock, model, _ = converted(ByPool)
    torch.manual_seed(SEED)
    change(stock)  # type: ignore[arg-type]
    torch.manual_seed(SEED)
    change(model)  # type: ignore[arg-type]
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(gradients(model, images()), gradients(stock, images()), rtol=1e-9, atol=1e-11)


def test_no_gradient_no_gate() -> None:
    stock, model, _ = converted(ByPool)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), stock(images()))
    assert model.requires_grad_(False)(images()).grad_fn is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_torch_func_and_forward_mode() -> None:
    stock, model, _ = converted(ByPool)

    def tangents(model: nn.Module) -> tuple[Tensor, ...]:
        state = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
        call = lambda x: torch.func.functional_call(model.eval(), state, (x,))  # noqa: E731
        x = images()
        batched = torch.func.vmap(lambda one: call(one[None])[0])(x)
        return (*torch.func.jvp(call, (x,), (x.flip(0),)), torch.func.grad(lambda x: call(x).sum())(x), batched)

    torch.testing.assert_close(tangents(model), tangents(stock), rtol=1e-9, atol=1e-11)


def test_torch_function_modes_see_the_gate() -> None:
    """As of lean, and of `with torch.device(...)`."""
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: object, types: object, args: tuple = (), kwargs: object = None
        ) -> object:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    stock, model, _ = converted(ByPool)
    with Mode(), torch.device("cpu"):
        found = gradients(model, images())
    torch.testing.assert_close(found, gradients(stock, images()), rtol=1e-9, atol=1e-11)
    assert gate in seen


def test_copies_pickles_and_revert() -> None:
    stock, model, _ = converted(ByPool)
    expected = gradients(stock, images())
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "_GateBackward" in operations(one(images().requires_grad_()))
        torch.testing.assert_close(gradients(one, images()), expected, rtol=1e-9, atol=1e-11)
    bn.revert(model)
    assert type(model) is ByPool
    assert "_GateBackward" not in operations(model(images().requires_grad_()))


def test_without_fuse_nothing_is_rewritten() -> None:
    model = ByPool()
    assert bn.convert(model, fuse=False).gates == ()
    assert type(model) is ByPool


def test_a_kernel_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise UnavailableError("no compiler")

    stock, model, _ = converted(ByPool)
    monkeypatch.setattr(products, "sums_of_products", fail)
    monkeypatch.setattr(kernels, "disabled", {})
    with pytest.warns(RuntimeWarning, match="no compiler"):
        found = gradients(model, images())
    assert "cpu" in kernels.disabled
    torch.testing.assert_close(found, gradients(stock, images()), rtol=1e-9, atol=1e-11)


class Other(nn.Module):
    """Products and averages that are no gates."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.factor = nn.Parameter(torch.ones(CHANNELS, 1, 1))

    def mean(self, x: Tensor) -> Tensor:
        return x.mean()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * self.factor
        y = [x * x * 2 for _ in range(2)][1]
        return (
            (lambda z: z * y)(x)
            * torch.mean(x, 0)
            * self.mean(x)
            * x.mean(3, keepdim=True)
            * x.mean((-2, -1))[..., None, None]
        )


def test_other_products_stay() -> None:
    stock, model, _ = converted(Other)
    torch.testing.assert_close(gradients(model, images()), gradients(stock, images()), rtol=1e-9, atol=1e-11)
    assert "_GateBackward" in operations(model(images().requires_grad_()))


@pytest.mark.parametrize(
    ("left", "right"), [(2, 3), (torch.ones(4, 3, 1, 1), 2.0), ("a", 3), (torch.ones(3), torch.ones(3)), ([1], 2)]
)
def test_any_values_may_be_multiplied(left: object, right: object) -> None:
    import operator

    expected = left * right  # type: ignore[operator]
    found = gates.multiply(operator.mul, left, right)
    assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def test_under_a_disabled_kernel_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = converted(ByPool)
    monkeypatch.setitem(kernels.disabled, "cpu", "for this test")
    assert "_GateBackward" not in operations(model(images().requires_grad_()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_compiled_steps_agree() -> None:
    stock, model, _ = converted(ByPool)
    torch.testing.assert_close(
        gradients(torch.compile(model, backend="aot_eager"), images()),
        gradients(stock, images()),
        rtol=1e-9,
        atol=1e-11,
    )
