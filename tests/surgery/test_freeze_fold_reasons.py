"""freeze(fold=True): which layers are left alone, with the reason; disagreement, mistakes and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from folds import perturbed
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from torch.nn.utils import parametrizations, prune

import batchnorm as bn
from batchnorm.surgery._folding import frozen, on_the_fly
from batchnorm.surgery._folding.on_the_fly import is_folded
from randomness import SEED


class Net(nn.Module):
    """A convolution, a norm and a ReLU, and what a test does with them."""

    def __init__(self, forward: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.act(self.norm(self.conv(x))) if self.run is None else self.run(self, x)


class Vouched(nn.BatchNorm2d):
    """Does more than a batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 6, 6), generator=torch.Generator().manual_seed(SEED))


def why(model: nn.Module, example: Any = None, **how: Any) -> str:
    """The only reason why the only norm is not folded; nothing else changes."""
    classes = [type(module) for module in model.modules() if not isinstance(module, nn.BatchNorm2d)]
    record = bn.freeze(model, fold=True, example=images() if example is None else example, **how).folding
    assert record is not None
    assert record.layers == ()
    assert [type(module) for module in model.modules() if not isinstance(module, nn.BatchNorm2d)] == classes
    (skipped,) = record.skipped
    assert f"not folded ({skipped.why})" in str(record)
    return skipped.why


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (
            lambda m, x: (y := m.conv(x), m.norm(y) + y)[1],
            "the Conv2d before it cannot absorb it: the tensor between them has another use (aten.add.Tensor)",
        ),
        (
            lambda m, x: (y := m.conv(x), m.norm(y))[::-1],
            "the Conv2d before it cannot absorb it: the tensor between them has another use (returned by the model)",
        ),
        (
            lambda m, x: m.norm(m.conv(x)) + m.conv(2 * x),
            "the Conv2d before it cannot absorb it: it is called 2 times",
        ),
        (lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x)), "it is called 2 times"),
        (lambda m, x: m.norm(F.relu(m.conv(x))), "no convolution or linear layer comes directly before it"),
        (lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(), "the Conv2d before it cannot absorb it: other code"),
        (lambda m, x: m.norm(m.conv(x)) + m.norm.weight.sum(), "other code reads its parameters or statistics too"),
        (lambda m, x: m.conv(x), "it is never called"),
        (
            lambda m, x: m.norm(m.conv(x)) if m.training else m.norm(F.relu(m.conv(x))),
            "no convolution or linear layer comes directly before it in eval mode",
        ),
    ],
)
def test_another_use(forward: Callable[..., Any], reason: str) -> None:
    assert why(Net(forward)).startswith(reason)


def test_what_still_learns() -> None:
    assert why(Net(), gamma=False, beta=False) == "its gamma and beta still learn"
    assert why(Net(), beta=False) == "its beta still learns"
    assert why(Net(), statistics=False) == "its statistics are not frozen"
    model = Net()
    model.norm.requires_grad_(False)
    assert len(bn.freeze(model, gamma=False, beta=False, fold=True, example=images()).folding.layers) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda conv: conv.register_forward_hook(lambda *_: None), "it has hooks, or a replaced forward or call"),
        (lambda conv: setattr(conv, "forward", conv.forward), "it has hooks, or a replaced forward or call"),
        (parametrizations.weight_norm, "cannot absorb it: its weight is not a parameter"),
        (parametrizations.spectral_norm, "cannot absorb it: its weight is not a parameter"),
        (lambda conv: prune.identity(conv, "weight"), "it has hooks"),
    ],
)
def test_a_map_that_computes_its_weight(change: Callable[[nn.Module], object], reason: str) -> None:
    model = Net()
    change(model.conv)
    assert reason in why(model)


def test_a_weight_that_two_maps_share() -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)) + m.other(x))
    model.other = nn.Conv2d(3, 4, 3)
    model.other.weight = model.conv.weight
    assert why(model) == "the Conv2d before it cannot absorb it: its weight is shared with another module"


def test_hooks_on_the_norm() -> None:
    model = Net()
    model.norm.register_forward_hook(lambda *_: None)
    assert why(model) == "it has hooks, or a replaced forward or call"


def test_a_subclass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Vouched(4))
    assert why(model, also=[Vouched]) == "a subclass of BatchNorm2d, which may compute something else"
    assert why(nn.Sequential(nn.Conv2d(3, 4, 1), Vouched(4))).startswith("a subclass of BatchNorm2d")


def test_layers_without_statistics_or_lazy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert why(model).startswith("it has no running statistics")


def test_a_linear_layer_on_sequences() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    record = bn.freeze(model, fold=True, example=images(2, 3, 6)).folding
    assert (
        record.skipped[0].why == "the Linear before it has 3-d output, in which its units are not the norm's channels"
    )
    assert len(bn.freeze(model, fold=True, example=images(2, 6)).folding.layers) == 1
    with pytest.raises(ValueError, match=r"takes \(N, 6\) then, got \(2, 3, 6\): batchnorm.unfreeze the model first"):
        model(images(2, 3, 6))


def test_masks() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), bn.BatchNorm1d(4))

    def masked(model: Any, x: Tensor) -> Tensor:
        return model[1](model[0](x), lengths=[2, 3])

    record = bn.freeze(model, fold=True, example=images(2, 3, 5), forward_fn=masked).folding
    assert "it is called with a mask or lengths" in record.skipped[0].why
    assert len(bn.freeze(model, fold=True, example=images(2, 3, 5)).folding.layers) == 1
    with pytest.raises(RuntimeError, match="takes no mask and no lengths"):
        masked(model, images(2, 3, 5))


def test_statistics_that_are_not_finite() -> None:
    model = Net(lambda m, x: (m.norm(m.conv(x)), x))
    model.norm.running_mean[0] = torch.nan
    assert "its running statistics are not finite" in why(model)
    model = Net()
    model.norm.running_var[0] = -1.0
    assert "running_var + eps is not positive" in why(model)


def test_the_example_is_run_in_the_mode_of_the_model() -> None:
    """A path of training mode only, which reads the tensor between: seen in training mode."""
    model = Net(lambda m, x: (y := m.conv(x), m.norm(y) + (y if m.training else 0))[1])
    assert "has another use" in why(model.train())
    assert len(bn.freeze(model.eval(), fold=True, example=images()).folding.layers) == 1


# --- disagreement -----------------------------------------------------------------------------------------------------


def wrong(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    scaled = on_the_fly._scaled
    monkeypatch.setattr(on_the_fly, "_scaled", lambda *a: tuple(t * (1 + error) for t in scaled(*a)))


def test_a_layer_that_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, 1e-3)
    assert why(Net()).startswith("its output would differ by 1.")
    model = Net()
    assert len(bn.freeze(model, fold=True, example=images(), bound=0.1).folding.layers) == 1


def test_gradients_that_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = on_the_fly._scaled

    def detached(*arguments: Any) -> tuple[Tensor, Tensor]:
        weight, bias = scaled(*arguments)
        return weight.detach() + 0 * arguments[0].weight.sum(), bias

    monkeypatch.setattr(on_the_fly, "_scaled", detached)
    assert why(Net()).startswith("its gradients would differ by 1.0e+00, over the bound of 0.0001")


@pytest.mark.parametrize(("what", "error"), [("outputs", 1e-3), ("gradients", None)])
def test_a_model_that_would_differ_is_restored(what: str, error: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison layer by layer cannot see: here it is left out."""
    monkeypatch.setattr(frozen, "_tried", lambda folds, *_: folds)
    model = Net()
    vars_before = [dict(vars(module)) for module in model.modules()]
    if error is None:
        scaled = on_the_fly._scaled
        monkeypatch.setattr(on_the_fly, "_scaled", lambda *a: tuple(t.detach() for t in scaled(*a)))
        model = nn.Sequential(nn.Conv2d(3, 3, 1), model)
    else:
        wrong(monkeypatch, error)
    assert f"restored: the {'model' if error else 'gradients'}" in why(model)
    assert not any(map(is_folded, model.modules()))
    net = model[1] if error is None else model
    for module, before in zip(net.modules(), vars_before, strict=True):
        assert vars(module).keys() - {"_batchnorm_required_grad"} == before.keys()
    assert not net.norm.weight.requires_grad, "it is frozen all the same"


def test_the_record_knows_that_folds_were_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_tried", lambda folds, *_: folds)
    wrong(monkeypatch, 1e-3)
    record = bn.freeze(Net(), fold=True, example=images()).folding
    assert record.taken_back
    assert record.max_error > 1e-4
    assert "0 of 1 batch norm layer applied by the map before it; outputs differ by 1." in str(record)


# --- mistakes and errors ----------------------------------------------------------------------------------------------


def state(model: nn.Module) -> list[Any]:
    return [(type(module), dict(vars(module))) for module in model.modules()] + [
        (p.requires_grad, p.grad) for p in model.parameters()
    ]


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"example": images()}, ValueError, "freeze: example, forward_fn and bound need fold=True"),
        ({"bound": 0.1}, ValueError, "freeze: example, forward_fn and bound need fold=True"),
        ({"fold": "yes"}, TypeError, "freeze: fold must be True or False, got str"),
        ({"fold": True, "bound": -1}, ValueError, "freeze: the bound must be a positive number, got -1"),
        ({"fold": True, "example": 3}, TypeError, "freeze: the example must be a tensor"),
        ({"fold": True, "example": images(), "forward_fn": 3}, TypeError, "freeze: forward_fn must be a function"),
        ({"fold": True, "example": images(2, 5, 6, 6)}, ValueError, "freeze: the model does not run on the example"),
        (
            {"fold": True, "example": torch.full((2, 3, 6, 6), torch.nan)},
            ValueError,
            "freeze: the model returns no finite floating-point number on the example",
        ),
    ],
)
def test_mistakes_change_nothing(how: dict[str, Any], error: type[Exception], words: str) -> None:
    model = Net()
    before = state(model)
    with pytest.raises(error, match=words):
        bn.freeze(model, **how)
    assert state(model) == before


def test_models_that_are_not_ready() -> None:
    with pytest.raises(ValueError, match="freeze: the model has lazy layers"):
        bn.freeze(nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3)), fold=True, example=images())
    with pytest.raises(ValueError, match="freeze: the model is on the meta device"):
        bn.freeze(Net().to("meta"), fold=True, example=images())
    compiled = Net()
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="freeze: the model is compiled"):
        bn.freeze(compiled, fold=True, example=images())
    with pytest.raises(ValueError, match="fold before DataParallel wraps the model"):
        bn.freeze(nn.DataParallel(Net()), fold=True, example=images())


class Forbidden(torch.autograd.Function):
    """Cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise RuntimeError("no backward here")


def test_a_model_that_does_not_run_backward() -> None:
    model = Net(lambda m, x: Forbidden.apply(m.norm(m.conv(x))))
    before = state(model)
    with pytest.raises(ValueError, match="freeze: the model does not run backward on the example: no backward here"):
        bn.freeze(model, fold=True, example=images())
    assert state(model) == before


def test_without_gradients() -> None:
    """Nothing learns, or forward turns gradients off: outputs alone are compared."""
    model = Net()
    model.requires_grad_(False)
    record = bn.freeze(model, fold=True, example=images()).folding
    assert (len(record.layers), record.gradient_rms_error) == (1, 0.0)
    model = Net(lambda m, x: torch.no_grad()(lambda: m.act(m.norm(m.conv(x))))())
    with torch.no_grad():
        assert len(bn.freeze(model, fold=True, example=images()).folding.layers) == 1
    model = Net()
    with torch.inference_mode():
        assert len(bn.freeze(model, fold=True, example=torch.ones(2, 3, 6, 6)).folding.layers) == 1


def test_gradients_from_before_stay() -> None:
    model = Net()
    model(images()).sum().backward()
    gradient = model.conv.weight.grad
    before = gradient.clone()
    bn.freeze(model, fold=True, example=images())
    assert model.conv.weight.grad is gradient
    assert torch.equal(gradient, before)


def test_without_an_example_and_without_layers() -> None:
    model = perturbed(Net()).train()
    record = bn.freeze(model, fold=True).folding
    assert record.made == (2, 3, 32, 32)
    assert len(record.layers) == 1
    with pytest.warns(UserWarning, match="freeze found no batch norm layer in it"):
        record = bn.freeze(nn.Sequential(nn.Linear(2, 2)), fold=True)
    assert str(record.folding) == "0 of 0 batch norm layers applied by the map before it"


def test_an_interrupt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = state(model)
    make = on_the_fly.apply_through

    def interrupted(*arguments: Any) -> None:
        make(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(frozen, "apply_through", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bn.freeze(model, fold=True, example=images())
    assert state(model) == before


def test_an_activation_that_two_norms_share_and_one_in_place() -> None:
    model = Net(lambda m, x: m.act(m.second(m.other(m.act(m.norm(m.conv(x)))))))
    model.other, model.second, model.act = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.ReLU6(inplace=True)
    perturbed(model.double())
    plain, x = copy.deepcopy(model), images().double()
    bn.freeze(plain)
    record = bn.freeze(model, fold=True, example=x).folding
    assert len(record.layers) == 2
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)


def test_code_that_relies_on_an_activation_in_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        m.act(y)
        return y + 1

    model = perturbed(Net(forward))
    model.act = nn.ReLU6(inplace=True)
    plain = copy.deepcopy(model)
    bn.freeze(plain)
    record = bn.freeze(model, fold=True, example=images()).folding
    assert record.skipped[0].why.startswith("restored: the model's outputs differ by"), "it would be out of place"
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-5, atol=1e-5)
