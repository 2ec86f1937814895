"""The layers in place of torch.nn's: signature, state, checkpoints, copies, types; and what act and residual add."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm as bn
from batchnorm.activations import ACTIVATIONS

NAMES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
SHAPES = {"BatchNorm1d": (6, 3, 4), "BatchNorm2d": (6, 3, 4, 2), "BatchNorm3d": (6, 3, 4, 2, 2)}
OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"eps": 1e-3, "momentum": 0.7},
    {"affine": False, "track_running_stats": False, "bias": False},
]
EVERY = pytest.mark.parametrize("name", NAMES)
OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)


def pair(name: str, **options) -> tuple[nn.Module, nn.Module]:
    return getattr(bn, name)(3, **options), getattr(nn, name)(3, **options)


def input_for(name: str, **how) -> torch.Tensor:
    return torch.randn(SHAPES[name], **how) * 3 + 1


@pytest.mark.parametrize("name", [*NAMES, *[f"Lazy{name}" for name in NAMES]])
def test_the_signature_is_torchs_and_three_keywords(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name).__init__).parameters for m in (bn, nn))
    kept = {n: (p.kind, p.default) for n, p in ours.items() if n in theirs}
    assert list(kept.items()) == [(n, (p.kind, p.default)) for n, p in theirs.items()]
    added = {n: (p.kind, p.default) for n, p in ours.items() if n not in theirs}
    only = inspect.Parameter.KEYWORD_ONLY
    assert added == {
        "act": (only, None),
        "negative_slope": (only, 0.01),
        "accumulate": (only, 1),
        "batch_of_one": (only, "error"),
    }


@EVERY
def test_it_is_a_layer_of_torch_nn(name: str) -> None:
    ours, _ = pair(name)
    assert isinstance(ours, getattr(nn, name))
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert isinstance(getattr(bn, f"Lazy{name}")(), nn.modules.lazy.LazyModuleMixin)


@OPTION
@EVERY
def test_attributes_state_and_repr_are_torchs(name: str, options: dict) -> None:
    ours, theirs = pair(name, **options)
    for attribute in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    for attribute in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        mine, other = getattr(ours, attribute), getattr(theirs, attribute)
        assert type(mine) is type(other)
        assert mine is None or (torch.equal(mine, other) and mine.dtype == other.dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert repr(ours) == repr(theirs)


@OPTION
@EVERY
def test_checkpoints_load_strictly_both_ways(name: str, options: dict) -> None:
    ours, theirs = pair(name, **options)
    x = input_for(name)
    for source, target in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        source(x)
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target.eval()(x), source.eval()(x))
        source.train()
        target.train()


@pytest.mark.parametrize("metadata", [None, {"version": 1}])
@EVERY
def test_checkpoints_from_before_num_batches_tracked_load(name: str, metadata: dict | None) -> None:
    ours, _ = pair(name)
    ours(input_for(name))
    old = {k: v for k, v in pair(name)[1].state_dict().items() if k != "num_batches_tracked"}
    state = type(ours.state_dict())(old)
    if metadata is not None:
        state._metadata = {"": metadata}
    assert str(ours.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(ours.running_mean, torch.zeros(3))
    assert ours.num_batches_tracked == 1


def test_a_version_2_checkpoint_must_have_num_batches_tracked() -> None:
    state = bn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        bn.BatchNorm1d(3).load_state_dict(state)


@EVERY
def test_without_momentum_it_is_the_average_over_batches(name: str) -> None:
    ours, theirs = pair(name, momentum=None)
    batches = [input_for(name) + i for i in range(5)]
    for x in batches:
        ours(x)
        theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    axes = (0, *range(2, batches[0].dim()))
    torch.testing.assert_close(ours.running_mean, torch.stack([x.mean(axes) for x in batches]).mean(0))
    torch.testing.assert_close(ours.running_var, torch.stack([x.var(axes) for x in batches]).mean(0))
    assert ours.num_batches_tracked == 5


def test_without_momentum_float64_averages_are_exact() -> None:
    ours, theirs = pair("BatchNorm1d", momentum=None, dtype=torch.float64)
    for i in range(7):  # 1/n is no binary fraction
        x = input_for("BatchNorm1d", dtype=torch.float64) + i
        ours(x)
        theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-14, atol=1e-14)


@EVERY
def test_eval_mode_moves_nothing(name: str) -> None:
    ours, _ = pair(name)
    before = copy.deepcopy(ours.state_dict())
    ours.eval()(input_for(name))
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


@OPTION
@EVERY
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_the_layer(name: str, options: dict, duplicate) -> None:
    ours = getattr(bn, name)(3, act="leaky_relu", negative_slope=0.3, **options)
    ours(input_for(name))
    other = duplicate(ours)
    x = input_for(name)
    assert repr(other) == repr(ours)
    assert (other.act, other.negative_slope, other.eps) == ("leaky_relu", 0.3, ours.eps)
    assert torch.equal(other.eval()(x), ours.eval()(x))


@EVERY
@pytest.mark.parametrize("move", ["half", "double", "bfloat16"])
def test_moving_and_casting_do_what_torchs_do(name: str, move: str) -> None:
    ours, theirs = (getattr(layer, move)() for layer in pair(name))
    for key, value in theirs.state_dict().items():
        assert ours.state_dict()[key].dtype == value.dtype
    x = input_for(name).to(ours.weight.dtype)
    y, other = ours(x), theirs(x)
    assert torch.equal(y, other)
    assert ours.to("meta").running_mean.is_meta
    assert bn.BatchNorm1d(3, device="meta").to_empty(device="cpu").weight.device.type == "cpu"


@EVERY
def test_meta_tensors_have_torchs_shapes(name: str) -> None:
    ours, theirs = pair(name, device="meta")
    x = input_for(name, device="meta")
    y, other = ours(x), theirs(x)
    assert (y.shape, y.dtype, y.device, y.stride()) == (other.shape, other.dtype, other.device, other.stride())


@pytest.mark.parametrize("training", [True, False])
@EVERY
def test_autocast_gives_torchs_types_and_values(name: str, training: bool) -> None:
    ours, theirs = (layer.train(training) for layer in pair(name))
    with torch.autocast("cpu", torch.bfloat16):
        for x in (input_for(name), input_for(name).bfloat16()):
            y, other = ours(x), theirs(x)
            assert y.dtype == other.dtype
            assert torch.equal(y, other)


@pytest.mark.parametrize("training", [True, False])
@EVERY
def test_torch_func_sees_what_it_sees_in_torchs(name: str, training: bool) -> None:
    layers = [layer.train(training) for layer in pair(name)]
    x = input_for(name)
    known = []
    for layer in layers:
        parameters = {k: torch.full_like(v, 1.5) for k, v in layer.named_parameters()}

        def loss(values: dict, x: torch.Tensor, layer=layer) -> torch.Tensor:
            buffers = {k: v.clone() for k, v in layer.named_buffers()}
            return torch.func.functional_call(layer, {**values, **buffers}, (x,)).square().sum()

        grads = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
        known.append([*grads[0].values(), grads[1]])
        if not training:  # PyTorch refuses to update one buffer by many inputs
            per_input = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.stack([x, 3 * x]))
            known[-1] += per_input.values()
    for ours, theirs in zip(*known, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@EVERY
def test_residual_is_added_before_the_activation(name: str, act: str | None) -> None:
    ours, theirs = getattr(bn, name)(3, act=act, negative_slope=0.2), getattr(nn, name)(3)
    x, residual = input_for(name), input_for(name)
    z = theirs(x) + residual
    apply = {None: lambda v: v, "leaky_relu": lambda v: F.leaky_relu(v, 0.2)}.get(act) or getattr(F, act)
    torch.testing.assert_close(ours(x, residual), apply(z))
    torch.testing.assert_close(ours.eval()(x), apply(theirs.eval()(x)))


def test_repr_shows_the_activation_and_its_slope() -> None:
    assert repr(bn.BatchNorm2d(3, act="relu")).endswith("track_running_stats=True, act=relu)")
    assert repr(bn.BatchNorm2d(3, act="leaky_relu", negative_slope=0.2)).endswith("act=leaky_relu, negative_slope=0.2)")


def test_the_activation_leaves_no_trace_in_the_state() -> None:
    assert bn.BatchNorm2d(3, act="relu").state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()


@EVERY
def test_a_lazy_layer_keeps_its_activation(name: str) -> None:
    layer = getattr(bn, f"Lazy{name}")(act="leaky_relu", negative_slope=0.5, bias=False)
    x = input_for(name)
    y = layer(x, x)
    assert type(layer) is getattr(bn, name)
    assert layer.num_features == 3
    assert layer.bias is None
    torch.testing.assert_close(y, F.leaky_relu(F.batch_norm(x, None, None, training=True) + x, 0.5))


@EVERY
@pytest.mark.parametrize("bad", [[1.0], None, torch.tensor(1.0), torch.ones(3)], ids=["list", "None", "0-D", "1-D"])
def test_a_lazy_layer_refuses_what_torchs_refuses(name: str, bad: object) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - its type is what is asked
        getattr(nn, f"Lazy{name}")()(bad)
    with pytest.raises(theirs.type, match="input must be"):
        getattr(bn, f"Lazy{name}")()(bad)


def test_eps_can_be_changed_afterwards() -> None:
    ours, theirs = pair("BatchNorm1d")
    ours.eps = theirs.eps = 0.5
    x = input_for("BatchNorm1d")
    assert ours.eps == 0.5
    assert "eps=0.5" in repr(ours)
    assert torch.equal(ours(x), theirs(x))


def test_hooks_and_reset_parameters_work() -> None:
    layer, seen = bn.BatchNorm1d(3), []
    layer.register_forward_hook(lambda module, args, y: seen.append(y))
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    layer(input_for("BatchNorm1d").requires_grad_()).sum().backward()
    assert len(seen) == 2
    with torch.no_grad():
        layer.weight.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(3))
    assert layer.num_batches_tracked == 0


def test_constructing_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            getattr(bn, name)(3, act="relu")
            getattr(bn, f"Lazy{name}")()


@pytest.mark.parametrize("value", [nn.ReLU(), torch.relu, "ReLU", 1])
def test_an_activation_that_forward_could_not_use_cannot_be_set(value: object) -> None:
    layer = bn.BatchNorm2d(3, act="relu")
    with pytest.raises((TypeError, ValueError), match="act"):
        layer.act = value
    assert layer.act == "relu"
    layer.act = "silu"
    assert "act=silu" in repr(layer)
    with pytest.raises(TypeError, match="negative_slope must be a number"):
        layer.negative_slope = "x"


def test_eps_is_kept_where_torch_keeps_it() -> None:
    """Code that swaps classes, or copies a layer's dictionary, finds it there."""
    theirs, ours = nn.BatchNorm2d(3, eps=0.5), bn.BatchNorm2d(3, eps=0.25)
    assert vars(ours)["eps"] == 0.25
    x = torch.randn(4, 3, 2, 2)
    expected = theirs(x)
    theirs.__class__ = bn.BatchNorm2d
    torch.testing.assert_close(theirs(x), expected)
    expected = ours(x)
    ours.__class__ = nn.BatchNorm2d
    torch.testing.assert_close(ours(x), expected)


def test_parametrized_statistics_are_read_through_their_parametrization() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    layer, x = bn.BatchNorm1d(3).eval(), input_for("BatchNorm1d")
    layer.running_mean.fill_(1.0)
    nn.utils.parametrize.register_parametrization(layer, "running_mean", Doubled())
    torch.testing.assert_close(layer(x), (x - 2) / (1 + layer.eps) ** 0.5)
