"""Which pairs a run of the example shows, and why the others are not folded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from folds import moved, norms, perturbed
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.surgery.fold import Folding, fold
from batchnorm.surgery.freeze import freeze

SHAPE = (2, 3, 6, 6)


class Net(nn.Module):
    """Two convolutions, the second with a norm, around what a test puts between."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def folded(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Folding:
    """In float64; whatever is folded, the outputs stay."""
    model = perturbed(model.double())
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        record = fold(model, x)
        after = model(x)
    for old, new in zip(*(y if isinstance(y, tuple) else (y,) for y in (before, after)), strict=True):
        assert moved(old, new) < 1e-12
    return record


def only_reason(record: Folding) -> str:
    assert record.layers == ()
    (skipped,) = record.skipped
    return skipped.why


def branches(net: Net, x: Tensor) -> Tensor:
    y = net.bn(net.conv(x))
    return F.relu(y) + y


def keyword(net: Net, x: Tensor) -> Tensor:
    return net.bn(input=net.conv(input=x))


def nothing_between(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.dropout(net.identity(net.conv(x))))


def cycle(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    box = [z]
    box.append(box)
    return net.bn(z)


WHOLE = {
    "garbage that refers to itself": Net(cycle),
    "branches after": Net(branches),
    "keywords": Net(keyword),
    "nothing between": Net(nothing_between, identity=nn.Identity(), dropout=nn.Dropout2d(0.4, inplace=True)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_found(name: str) -> None:
    model = copy.deepcopy(WHOLE[name])
    assert [(layer.name, layer.into) for layer in folded(model).layers] == [("bn", "conv")]
    assert norms(model) == []


def used_after(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.bn(z) + z


def used_before(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    y = z.mean()
    return net.bn(z) + y


def view_written(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    z[:, :1].mul_(2)
    return net.bn(z)


def activation_in_place(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    net.relu(z)
    return net.bn(z)


def returned(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net.conv(x)
    return net.bn(z), z


def view_returned(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net.conv(x)
    return net.bn(z), z[:1]


def kept(net: Net, x: Tensor) -> Tensor:
    net.feature = net.conv(x)
    return net.bn(net.feature)


def kept_in_a_list(net: Net, x: Tensor) -> Tensor:
    net.features.append(net.conv(x))
    return net.bn(net.features[-1])


def other_layout(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x).transpose(2, 3))


def nested_call(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.bn(z) + net.other(z)


def as_residual(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.bn(z, z)


def with_lists() -> Net:
    net = Net(kept_in_a_list)
    net.features = []
    return net


def ours(forward: Callable[..., Any]) -> Net:
    net = Net(forward)
    net.bn = bn.BatchNorm2d(4)
    return net


ELSEWHERE = {
    "used after": Net(used_after),
    "used before": Net(used_before),
    "a view is written": Net(view_written),
    "an activation in place": Net(activation_in_place, relu=nn.ReLU(inplace=True)),
    "returned": Net(returned),
    "a view is returned": Net(view_returned),
    "kept": Net(kept),
    "kept in a list": with_lists(),
    "nested": Net(nested_call, other=nn.Sequential(nn.Sequential(nn.ReLU()))),
    "its own residual": ours(as_residual),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_tensor_between_has_another_use(name: str) -> None:
    why = only_reason(folded(copy.deepcopy(ELSEWHERE[name])))
    assert why.startswith("the Conv2d before it cannot absorb it: the tensor between them has another use"), why


def test_side_effects_of_forward_are_undone() -> None:
    model = with_lists()
    folded(model)
    kept = list(model.features)
    fold(model, torch.randn(SHAPE, dtype=torch.float64))
    assert len(model.features) == len(kept)
    assert all(a is b for a, b in zip(model.features, kept, strict=True))


def test_another_layout_between_is_no_pair() -> None:
    why = only_reason(folded(Net(other_layout), (2, 3, 6, 6)))
    assert why == "no convolution or linear layer comes directly before or after it"


def weight_read(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) * net.conv.weight.sum()


def statistics_read(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) - net.bn.running_mean.sum()


def called_twice(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.bn(net.other(x))


def map_called_twice(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.conv(x)


def never_called(net: Net, x: Tensor) -> Tensor:
    return net.conv(x)


def only_described(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x.to(net.conv.weight.dtype)))


def with_hook(which: str) -> Net:
    net = Net(lambda net, x: net.bn(net.conv(x)))
    getattr(net, which).register_forward_hook(lambda *_: None)
    return net


def with_shared(what: str) -> Net:
    net = Net(lambda net, x: net.bn(net.conv(x)) + net.other(x)).double()
    net.other = net.conv if what == "module" else nn.Conv2d(3, 4, 3, bias=False).double()
    if what == "weight":
        net.other.weight = net.conv.weight
    if what == "memory":
        net.other.weight = nn.Parameter(net.conv.weight.data)
    return net


def with_norm(norm: nn.Module) -> Net:
    net = Net(lambda net, x: net.bn(net.conv(x)))
    net.bn = norm
    return net


def with_map(convolution: nn.Module) -> Net:
    net = Net(lambda net, x: net.bn(net.conv(x)))
    net.conv = convolution
    return net


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class OnlyMade(nn.Conv2d):
    """transformers' depthwise convolution: a subclass for the sake of its constructor."""

    def __init__(self, channels: int) -> None:
        super().__init__(3, channels, 3)


def parametrized() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", nn.Identity())
    return conv


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)


def replaced() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    conv.forward = lambda x: F.conv2d(x, conv.weight, conv.bias) + 1
    return conv


def with_buffer() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    weight = conv.weight.detach()
    del conv.weight
    conv.register_buffer("weight", weight)
    return conv


class OfAnotherKind(Tensor):
    """A tensor of somebody's own, such as a quantized one."""


def with_tensor_of_another_kind() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3).double()
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(OfAnotherKind))
    return conv


class Peek(nn.Module):
    """Reads its input where no operation of PyTorch's shows it."""

    def forward(self, x: Tensor) -> float:
        return float(x.detach().numpy().std())


TWICE = "it is called 2 times"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight read": (lambda: Net(weight_read), "other code reads its parameters or statistics too"),
    "statistics read": (lambda: Net(statistics_read), "other code reads its parameters or statistics too"),
    "norm called twice": (lambda: Net(called_twice, other=nn.Conv2d(3, 4, 3)), TWICE),
    "map called twice": (lambda: Net(map_called_twice), TWICE),
    "never called": (lambda: Net(never_called), "it is never called"),
    "hook on the norm": (lambda: with_hook("bn"), "it has hooks"),
    "hook on the map": (lambda: with_hook("conv"), "it has hooks"),
    "shared map": (lambda: with_shared("module"), "it is called 2 times"),
    "tied weight": (lambda: with_shared("weight"), "its weight is shared with another module"),
    "shared memory": (lambda: with_shared("memory"), "its weight is shared with another module"),
    "no statistics": (lambda: with_norm(nn.BatchNorm2d(4, track_running_stats=False)), "it has no running statistics"),
    "subclass": (lambda: with_map(Standardized(3, 4, 3)), "its output would differ"),
    "parametrized": (lambda: with_map(parametrized()), "its weight is not a parameter"),
    "pruned": (lambda: with_map(pruned()), "it has hooks"),
    "weight in a buffer": (lambda: with_map(with_buffer()), "its weight is not a parameter"),
    "tensor subclass": (
        lambda: with_map(with_tensor_of_another_kind()),
        "its weight is not a plain floating-point tensor",
    ),
    "replaced": (lambda: with_map(replaced()), "it has hooks, or a replaced forward or call"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, expected = REFUSED[name]
    assert expected in only_reason(folded(make()))


@pytest.mark.parametrize(
    "make", [lambda: with_map(OnlyMade(4)), lambda: Net(only_described)], ids=["made", "described"]
)
def test_not_refused(make: Callable[[], nn.Module]) -> None:
    assert len(folded(make()).layers) == 1


def test_a_norm_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].train()
    mean = model[1].running_mean.clone()
    record = fold(model, torch.randn(SHAPE))
    assert only_reason(record) == "it is in training mode: call model.eval()"
    assert torch.equal(model[1].running_mean, mean), "the example has not moved its statistics"
    assert model[1].num_batches_tracked == 0


def test_a_dropout_in_training_mode_is_something_between() -> None:
    model = perturbed(copy.deepcopy(WHOLE["nothing between"]))
    model.dropout.train()
    x = torch.randn(SHAPE)
    why = only_reason(fold(model, x))
    assert why.startswith("no convolution") or "has another use" in why


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_statistics_that_cannot_be_folded(value: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)).eval()
    model[1].running_var[1] = value
    if value != float("inf"):
        with pytest.raises(ValueError, match="no finite floating-point number on the example"):
            fold(model, torch.randn(SHAPE))
        return
    record = fold(model, torch.randn(SHAPE))
    assert [layer.name for layer in record.layers] == ["3"]
    assert "recalibrate it first" in record.skipped[0].why


def test_weights_that_overflow_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.fill_(0)
        model[1].weight.fill_(6e4)
        model[1].running_var.fill_(1e-2)
    x = torch.zeros(1, 3, 2, 2, dtype=torch.float16)
    assert "the folded weights are not finite in float16" in only_reason(fold(model, x))


def test_a_pair_that_is_seen_without_a_finite_number_is_left() -> None:
    model = perturbed(Net(lambda net, x: net.bn(net.conv(x / 0)).nan_to_num()))
    assert (
        only_reason(fold(model, torch.randn(SHAPE)))
        == "into the Conv2d before it: its output has no finite values to compare"
    )


def test_meta_tensors_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval().to("meta")
    with pytest.raises(ValueError, match="fold: the model is on the meta device, without values"):
        fold(model, torch.randn(SHAPE))


def test_numbers_of_channels_that_do_not_match() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)).eval()
    with pytest.raises(ValueError, match="fold: the model does not run on the example: "):
        fold(model, torch.randn(SHAPE))


def test_frozen_layers_are_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    freeze(model)
    assert len(folded(model).layers) == 1


def test_synchronized_layers_are_folded() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert [layer.kind for layer in folded(model).layers] == ["SyncBatchNorm"]


def test_a_layer_inside_one_of_pytorchs_own_blocks_counts_as_called() -> None:
    class Block(nn.Module):
        __module__ = "torch.nn.modules.mine"

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = Net(lambda net, x: net.bn(net.block.conv(x)) + net.block(x).mean(), block=Block())
    assert "it is called 2 times" in only_reason(folded(model))


def test_a_module_that_reads_what_lies_between_by_itself_is_seen() -> None:
    def peeked(net: Net, x: Tensor) -> Tensor:
        z = net.conv(x)
        return net.bn(z) * net.peek(z)

    assert "has another use (Peek)" in only_reason(folded(Net(peeked, peek=Peek())))


def test_an_activation_inside_the_norm_before_a_map() -> None:
    model = nn.Sequential(bn.BatchNorm2d(3, act="relu"), nn.Conv2d(3, 4, 3))
    why = only_reason(folded(model))
    assert why == "the Conv2d after it cannot absorb it: the norm applies an activation or adds a residual"


def test_subclasses_are_skipped_unless_listed() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Mine(4))
    assert "list it in `also`" in only_reason(folded(copy.deepcopy(model)))
    model = perturbed(model)
    assert [layer.kind for layer in fold(model, torch.randn(SHAPE), also=(Mine,)).layers] == ["Mine"]


def test_a_wrongly_listed_subclass_is_detected() -> None:
    class Louder(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), Louder(4)))
    record = fold(model, torch.randn(SHAPE), also=(Louder,))
    assert "its output would differ by 5.0e-01, over the bound of 1e-05" in only_reason(record)
    assert type(model[1]) is Louder


class Optional(nn.Module):
    """Its second argument changes where the convolution's output goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None, raw: bool = False) -> Tensor:
        z = self.conv(x)
        if mask is not None:
            z = z * mask
        return self.bn(z) + (z if raw else 0)


def test_the_example_says_how_the_model_is_called() -> None:
    x, mask = torch.randn(SHAPE), torch.ones(4, 4)
    assert len(fold(perturbed(Optional()), (x,)).layers) == 1
    assert len(fold(perturbed(Optional()), {"x": x, "raw": False}).layers) == 1
    for example in ((x, mask), {"x": x, "mask": mask}, (x, None, True), {"x": x, "raw": True}):
        assert fold(perturbed(Optional()), example).layers == ()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.bn(z) if x.shape[0] > 1 else z.relu()


def test_a_model_that_branches_is_folded_as_the_example_calls_it() -> None:
    model = perturbed(Branching())
    assert fold(model, torch.randn(1, 3, 6, 6)).skipped[0].why == "it is never called"
    assert len(fold(model, torch.randn(SHAPE)).layers) == 1


def test_a_residual_that_is_another_layers_output_is_no_pair() -> None:
    """The residual branch's norm is folded, and its sum is still made."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), bn.BatchNorm2d(4, act="leaky_relu", negative_slope=0.3)
            self.short, self.bn_short = nn.Conv2d(3, 4, 1), bn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x), self.bn_short(self.short(x)))

    model = Block()
    assert {(layer.name, layer.into) for layer in folded(model).layers} == {("bn", "conv"), ("bn_short", "short")}
    assert repr(model.bn) == "Epilogue(act=leaky_relu, negative_slope=0.3)"
