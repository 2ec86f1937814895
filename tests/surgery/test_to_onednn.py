"""to_onednn(): which convolutions run as one primitive, that nothing else changes, and when ordinary operators run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from folds import moved, perturbed
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import batchnorm as bn
from batchnorm.surgery._folding import primitives
from batchnorm.surgery._shared.activations import Activation, module_of
from batchnorm.surgery.to_onednn import Packing, to_onednn
from randomness import SEED

pytestmark = pytest.mark.skipif(
    primitives.why_unavailable(None, torch.float32) is not None, reason="PyTorch has no such primitive here"
)
SHAPE = (2, 3, 9, 7)


class Net(nn.Module):
    """A convolution, an activation, and what a test does with them."""

    def __init__(self, forward: Callable[..., Any], act: nn.Module | None = None, **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU() if act is None else act
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def images(*shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(SEED))


def plain() -> nn.Sequential:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False)).eval()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activation of every primitive that ran."""
    ran: list[str] = []
    call = primitives._call

    def counted(x: Tensor, weight: Tensor, bias: Any, padding: Any, module: Any, activation: Any) -> Tensor:
        ran.append(activation.act or "none")
        return call(x, weight, bias, padding, module, activation)

    monkeypatch.setattr(primitives, "_call", counted)
    return ran


def only(record: Packing) -> Any:
    (layer,) = record.layers
    return layer


# --- what is changed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
def test_a_folded_network(inplace: bool, calls: list[str]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU6(inplace),
    )
    perturbed(model)
    x = images()
    before = model(x)
    bn.fold(model, x)
    keys = list(model.state_dict())
    record = to_onednn(model, x)
    assert [(layer.name, layer.act, layer.activation) for layer in record.layers] == [
        ("0", "relu", "2"),
        ("3", "relu6", "4"),
    ]
    assert type(model[2]) is type(model[4]) is nn.Identity
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], nn.Conv2d)
    calls.clear()
    assert moved(before, model(x)) < 1e-5
    assert calls == ["relu", "relu6"]
    assert "2 of 2 layers run as one oneDNN primitive, 2 with an activation" in str(record)
    assert "oneDNN, act=relu" in repr(model)


@pytest.mark.parametrize("act", sorted(primitives.FUSED))
def test_every_activation(act: str, calls: list[str]) -> None:
    model = Net(lambda self, x: self.act(self.conv(x)), module_of(Activation(act, 0.2))).eval()
    x = 4 * images()
    before = model(x)
    assert only(to_onednn(model, x)).act == act
    calls.clear()
    assert moved(before, model(x)) < 1e-5
    assert calls == [act]


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": (1, 2)},
        {"dilation": 2, "padding": 2, "bias": False},
        {"padding": "same"},
        {"padding": "valid", "stride": (1, 2)},
        {"groups": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_geometry(settings: dict[str, Any], layout: torch.memory_format, calls: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, **settings), nn.SiLU()).eval().to(memory_format=layout)
    x = images().to(memory_format=layout)
    before = model(x)
    to_onednn(model, x)
    for other in (x, images(3, 3, 12, 5), images(2, 3, 9, 14)[..., ::2], images(1, 3, 9, 7).expand(2, -1, -1, -1)):
        expected = primitives.activate(nn.Conv2d.forward(model[0], other), "silu", 0.0)
        calls.clear()
        assert moved(expected, model(other)) < 1e-5
        assert calls == ["silu"]
    assert moved(before, model(x)) < 1e-5


def test_another_use_of_the_result_leaves_the_activation() -> None:
    model = Net(lambda self, x: (y := self.conv(x), self.act(y) + y)[1]).eval()
    x = images()
    before = model(x)
    layer = only(to_onednn(model, x))
    assert layer.act is None
    assert layer.alone == "the tensor before the ReLU has another use (aten.add.Tensor)"
    assert moved(before, model(x)) < 1e-5


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (
            lambda self, x: self.act(self.conv(x).add_(1)),
            "the tensor before the ReLU has another use (aten.add_.Tensor)",
        ),
        (lambda self, x: self.act(self.conv(x)) + self.act(x).sum(), "the ReLU after it is called 2 times"),
        (lambda self, x: self.act(self.conv(x)) + self.conv(x), "it is called 2 times"),
        (lambda self, x: torch.relu(self.conv(x)), "no activation module comes directly after it"),
        (lambda self, x: self.act(self.conv(x)[:, :2]), "no activation module comes directly after it"),
        (lambda self, x: (y := self.conv(x), self.act(y))[::-1], "the tensor before the ReLU has another use"),
    ],
)
def test_why_a_convolution_runs_alone(forward: Callable[..., Any], why: str) -> None:
    model = Net(forward).eval()
    x = images()
    before = model(x)
    layer = only(to_onednn(model, x))
    assert layer.act is None
    assert layer.alone.startswith(why)
    after = model(x)
    for old, new in zip(*(y if isinstance(y, tuple) else (y,) for y in (before, after)), strict=True):
        assert moved(old, new) < 1e-5


def test_an_addition_in_place_after_an_activation_in_place() -> None:
    model = Net(lambda self, x: self.act(self.conv(x)).add_(1), nn.ReLU(inplace=True)).eval()
    x = images()
    before = model(x)
    assert only(to_onednn(model, x)).act == "relu"
    assert moved(before, model(x)) < 1e-5


def test_elu_has_no_primitive() -> None:
    layer = only(to_onednn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU()).eval(), images()))
    assert (layer.act, layer.alone) == (None, "no primitive applies ELU")


class Odd(nn.Conv2d):
    """Of another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def hooked() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Odd(3, 4, 3), "it is of a subclass"),
        (hooked, "it has hooks"),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "its padding is not"),
        (lambda: nn.Conv2d(3, 4, (1, 2), padding="same"), "its padding is not"),
        (lambda: nn.ConvTranspose2d(3, 4, 3), "only a Conv2d is packed"),
        (lambda: nn.Conv2d(3, 4, 3).double(), "oneDNN packs float32 and bfloat16, not float64"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "it is of a subclass"),
    ],
)
def test_why_a_layer_is_skipped(make: Callable[[], nn.Module], why: str) -> None:
    model = nn.Sequential(make(), nn.ReLU()).eval()
    x = images().to(next(model.parameters()).dtype)
    cls, before = type(model[0]), model(x)
    record = to_onednn(model, x)
    assert not record.layers
    assert record.skipped[0].why.startswith(why)
    assert type(model[0]) is cls
    assert type(model[1]) is nn.ReLU
    assert torch.equal(model(x), before)
    assert "0 of 1 layer" in str(record)


def test_a_second_time_nothing_changes() -> None:
    model, x = plain(), images()
    to_onednn(model, x)
    record = to_onednn(model, x)
    assert [layer.why for layer in record.skipped] == ["it is packed already"] * 2


# --- proof ------------------------------------------------------------------------------------------------------------


def test_restored_if_the_outputs_change(monkeypatch: pytest.MonkeyPatch) -> None:
    call = primitives._call
    for act in (None, "relu"):
        assert primitives.why_unavailable(act, torch.float32) is None
    monkeypatch.setattr(primitives, "_call", lambda *args: call(*args) * 1.5)
    model, x = plain(), images()
    before = model(x)
    record = to_onednn(model, x)
    assert record.taken_back
    assert not record.layers
    assert "restored: the model's outputs differ by" in record.skipped[0].why
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert torch.equal(model(x), before)


def test_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("view size is not compatible")

    for act in (None, "relu"):
        assert primitives.why_unavailable(act, torch.float32) is None
    monkeypatch.setattr(primitives, "_call", fail)
    model = plain()
    with pytest.raises(ValueError, match="to_onednn: the model does not run on the example: view size"):
        to_onednn(model, images())
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_an_operator_that_is_missing_or_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = primitives._call

    def faulty(*args: Any) -> Tensor:
        if fault == "missing":
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_convolution_pointwise'")
        return call(*args) + 1

    primitives.why_unavailable.cache_clear()
    monkeypatch.setattr(primitives, "_call", faulty)
    try:
        model, x = plain(), images()
        before = model(x)
        record = to_onednn(model, x)
        expected = "has no such operator" if fault == "missing" else "PyTorch's operator is off by"
        assert all(expected in layer.why for layer in record.skipped)
        assert not record.layers
        assert torch.equal(model(x), before)
    finally:
        primitives.why_unavailable.cache_clear()


def test_unpickled_where_the_operator_is_missing(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    model, x = plain(), images()
    before = model(x)
    to_onednn(model, x)
    loaded = pickle.loads(pickle.dumps(model))
    monkeypatch.setattr(primitives, "why_unavailable", lambda *_: "missing")
    calls.clear()
    assert torch.equal(loaded(x), before)
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda: 3,), TypeError, "to_onednn takes a torch.nn.Module, got int"),
        ((lambda: plain().train(), images()), ValueError, "to_onednn: the model is in training mode"),
        ((lambda: nn.LazyConv2d(3, 3).eval(), images()), ValueError, "to_onednn: the model has lazy layers"),
        ((plain, [images()]), TypeError, "to_onednn: the example must be"),
        ((plain, images(2, 4, 9, 7)), ValueError, "to_onednn: the model does not run on the example"),
        ((plain, images() * torch.nan), ValueError, "to_onednn: the model returns no finite"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    make, *rest = arguments
    with pytest.raises(error, match=message):
        to_onednn(make(), *rest)


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), True, "1e-5"])
def test_a_bad_bound(bound: Any) -> None:
    with pytest.raises(ValueError, match="to_onednn: the bound must be a positive number"):
        to_onednn(plain(), images(), bound=bound)


def test_no_convolution_at_all() -> None:
    with pytest.warns(UserWarning, match="to_onednn found no convolution in it"):
        assert str(to_onednn(nn.Sequential(nn.ReLU()).eval(), images())) == "no convolutions"


def test_without_an_example() -> None:
    record = to_onednn(plain())
    assert record.made is not None
    assert len(record.layers) == 2


# --- weights that change ----------------------------------------------------------------------------------------------


def scaled(weight: Tensor) -> None:
    weight.mul_(2)


def by_data(weight: Tensor) -> None:
    weight.data.mul_(2)


def other_data(weight: Tensor) -> None:
    weight.data = weight.data * 2


def by_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[...] *= 2


@pytest.mark.parametrize("change", [scaled, by_data, other_data, by_numpy], ids=lambda change: change.__name__)
def test_no_stale_weights(change: Callable[[Tensor], None], calls: list[str]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()).eval(), images()
    to_onednn(model, x)
    before = model(x).clone()
    change(model[0].weight)
    calls.clear()
    assert moved(2 * before, model(x)) < 1e-5
    assert calls == ["relu"]


def test_one_changed_value() -> None:
    model, x, other = plain(), images(), plain()
    to_onednn(model, x)
    model(x)
    for one in (model, other):
        one[0].weight[-1, -1, -1, -1] = 5.0
    assert moved(other(x), model(x)) < 1e-5


def test_loaded_and_replaced_weights() -> None:
    model, x, other = plain(), images(), plain()
    to_onednn(model, x)
    for parameter in other.parameters():
        parameter.add_(1)
    model.load_state_dict(other.state_dict())
    assert moved(other(x), model(x)) < 1e-5
    other[0].weight.mul_(-1)
    model[0].weight = nn.Parameter(other[0].weight.clone())
    assert moved(other(x), model(x)) < 1e-5
    other[0].bias = model[0].bias = None
    assert moved(other(x), model(x)) < 1e-5


def test_a_changed_setting() -> None:
    model, x = plain(), images()
    to_onednn(model, x)
    model(x)
    other = plain()
    model[0].stride = other[0].stride = (2, 2)
    model[0].padding = other[0].padding = (1, 1)
    assert moved(other(x), model(x)) < 1e-5


def test_the_packed_weight_goes_with_the_module() -> None:
    count = len(primitives._PACKED)
    model = plain()
    to_onednn(model, images())
    assert len(primitives._PACKED) == count + 2
    del model
    assert len(primitives._PACKED) == count


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies(how: Callable[[nn.Module], nn.Module], calls: list[str]) -> None:
    model, x = plain(), images()
    to_onednn(model, x)
    before = model(x)
    copied = how(model)
    assert [type(module) for module in copied] == [type(module) for module in model]  # type: ignore[attr-defined]
    calls.clear()
    assert torch.equal(copied(x), before)
    assert calls == ["relu", "none"]
    next(copied.parameters()).mul_(2)
    assert torch.equal(model(x), before)


# --- when ordinary operators run --------------------------------------------------------------------------------------


def test_gradients(calls: list[str]) -> None:
    model, x, other = plain(), images(), plain()
    to_onednn(model, x)
    calls.clear()
    with torch.enable_grad():
        model(x).sum().backward()
        other(x).sum().backward()
    assert calls == []
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_type(dtype: torch.dtype) -> None:
    model, x, other = plain(), images(), plain().to(dtype)
    to_onednn(model, x)
    model.to(dtype)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    assert moved(other(x.to(dtype)), y) < {torch.float64: 1e-12}.get(dtype, 6e-2)
    assert moved(plain()(x), model.float()(x)) < 6e-2


def test_meta_tensors() -> None:
    model = plain()
    to_onednn(model, images())
    assert model.to("meta")(images().to("meta")).shape == (2, 5, 5, 3)


def test_autocast(calls: list[str]) -> None:
    model, x, other = plain(), images(), plain()
    to_onednn(model, x)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.equal(y, other(x))
    assert y.dtype == torch.bfloat16
    assert calls == []


def disabled(model: nn.Module, x: Tensor) -> Tensor:
    torch._C._set_mkldnn_enabled(False)
    try:
        return model(x)  # type: ignore[no-any-return]
    finally:
        torch._C._set_mkldnn_enabled(True)


def traced(model: nn.Module, x: Tensor) -> Tensor:
    graph = torch.jit.trace(model, x, check_trace=False)  # type: ignore[no-untyped-call]
    assert "mkldnn" not in str(graph.inlined_graph)
    return graph(x)  # type: ignore[no-any-return]


def exported(model: nn.Module, x: Tensor) -> Tensor:
    program = torch.export.export(model, (x,))
    assert "relu" in str(program.graph)
    assert "mkldnn" not in str(program.graph)
    return program.module()(x)  # type: ignore[no-any-return]


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    return torch.compile(model, backend="eager", fullgraph=True)(x)  # type: ignore[no-any-return]


def symbolic(model: nn.Module, x: Tensor) -> Tensor:
    return torch.fx.symbolic_trace(model)(x)  # type: ignore[no-any-return]


def mapped(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(model)(torch.stack((x, x)))[0]


def made_graph(model: nn.Module, x: Tensor) -> Tensor:
    graph = make_fx(model)(x)
    assert "mkldnn" not in str(graph.graph)
    return graph(x)  # type: ignore[no-any-return]


def unbatched(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([model(one) for one in x])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "way", [disabled, traced, exported, compiled, symbolic, mapped, made_graph, unbatched], ids=lambda way: way.__name__
)
def test_transformations(way: Callable[[nn.Module, Tensor], Tensor], calls: list[str]) -> None:
    model, x = plain(), images()
    before = model(x)
    to_onednn(model, x)
    calls.clear()
    assert moved(before, way(model, x)) < 1e-5
    assert calls == [] or way is symbolic  # whose leaves are the modules


@pytest.mark.parametrize("shape", [(2, 4, 9, 7), (2, 3, 1, 1), (2, 3, 9)], ids=str)
def test_errors_are_those_of_the_convolution(shape: tuple[int, ...]) -> None:
    model = plain()
    to_onednn(model, images())
    with pytest.raises(RuntimeError) as ours:
        model(images(*shape))
    with pytest.raises(RuntimeError) as theirs:
        plain()(images(*shape))
    assert str(ours.value) == str(theirs.value)


def test_one_small_image_runs_ordinary_operators(calls: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).eval()
    to_onednn(model, images(1, 64, 8, 8))
    for shape, expected in (((1, 64, 8, 8), ["relu"]), ((1, 64, 2, 2), []), ((2, 64, 2, 2), ["relu"])):
        calls.clear()
        x = images(*shape)
        assert moved(torch.relu(nn.Conv2d.forward(model[0], x)), model(x)) < 1e-5
        assert calls == expected


def test_an_empty_batch() -> None:
    model = plain()
    to_onednn(model, images())
    assert model(torch.empty(0, 3, 9, 7)).shape == plain()(torch.empty(0, 3, 9, 7)).shape


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_inference_mode(order: str) -> None:
    """A weight packed inside is used outside, and the other way round."""
    model, x = plain(), images()
    before = model(x)
    to_onednn(model, x)
    for one in range(2):
        primitives._PACKED.clear() if one == 0 else None
        with torch.inference_mode() if (one == 0) == (order == "inside") else nullcontext():
            assert moved(before.clone(), model(x).clone()) < 1e-5


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = plain()
    record = to_onednn(model, images())
    assert [layer.why for layer in record.skipped] == ["its weight is not a plain tensor"] * 2
