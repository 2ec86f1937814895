"""The mechanism of freeze(fold=True): what activations save, their derivatives, and the classes of layers."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from folds import perturbed
from frozen_folds import assert_same, images
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

import batchnorm as bn
from batchnorm.kernels.aten import activate
from batchnorm.surgery._folding import on_the_fly
from batchnorm.surgery._folding.on_the_fly import apply_activation, can_use_mask, can_use_output, is_folded
from batchnorm.surgery._shared.activations import Activation
from batchnorm.surgery._shared.layers import OURS, STOCK
from randomness import SEED

NAN, INF = float("nan"), float("inf")
ACTS = [Activation("relu"), Activation("relu6"), Activation("leaky_relu", 0.2), Activation("leaky_relu", 0.0)]
HOW = [(act, mask) for act in ACTS for mask in (False, True)] + [(Activation("elu"), False)]
EVERY = pytest.mark.parametrize(("activation", "mask"), HOW, ids=lambda value: str(value))


def values(*more: float) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    random = 5 * torch.randn(40, generator=generator, dtype=torch.float64)
    return torch.cat([random, torch.tensor(more, dtype=torch.float64)])


@EVERY
def test_values_and_gradients_are_those_of_pytorch(activation: Activation, mask: bool) -> None:
    """To the bit at kinks, infinities and NaN; elu computes its derivative from another number."""
    kinks = () if activation.act == "elu" else (0.0, -0.0, 6.0, 5e-324, INF, -INF, NAN)
    z = values(*kinks).requires_grad_()
    g = values(*reversed(kinks))
    y = apply_activation(z, activation, mask)
    expected = activate(z, *activation)
    assert "ByOutput" in str(y.grad_fn) or (activation.act == "relu" and not mask)
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    (old,), (new,) = torch.autograd.grad(expected, z, g), torch.autograd.grad(y, z, g)
    torch.testing.assert_close(new, old, rtol=0, atol=1e-14 if activation.act == "elu" else 0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # forward mode imports it
@EVERY
def test_double_backward_and_forward_mode(activation: Activation, mask: bool) -> None:
    z = values().requires_grad_()

    def run(z: Tensor) -> Tensor:
        return apply_activation(z, activation, mask)

    assert torch.autograd.gradcheck(run, z, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, z)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(z, values()))).tangent
    (gradient,) = torch.autograd.grad(run(z), z, values())
    torch.testing.assert_close(tangent, gradient)


@EVERY
def test_vmap(activation: Activation, mask: bool) -> None:
    z = torch.stack([values(), -values()])
    gradient = torch.func.grad(lambda z: apply_activation(z, activation, mask).square().sum())
    torch.testing.assert_close(torch.func.vmap(gradient)(z), torch.stack([gradient(z[0]), gradient(z[1])]))


@EVERY
def test_nothing_is_kept_after_the_output_is_gone(activation: Activation, mask: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        y = apply_activation(values().requires_grad_() * 1, activation, mask)
        memory = StorageWeakRef(y.untyped_storage())
        del y
        assert memory.expired(), "without the garbage collector, which does not know how large it is"
    finally:
        gc.enable()


def test_which_activations_can_use_their_output() -> None:
    acts = ("relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "silu", "hardswish")
    assert [act for act in acts if can_use_output(Activation(act))] == list(acts[:6])
    assert [act for act in acts if can_use_mask(Activation(act))] == list(acts[:3])
    assert not can_use_output(Activation("leaky_relu", -0.1))
    assert not can_use_mask(Activation("leaky_relu", -0.1))


@pytest.mark.parametrize("act", [nn.ELU(), nn.LeakyReLU()], ids=str)
def test_a_setting_that_changes_later(act: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 1, 1)).double()
    bn.freeze(model, fold=True, example=images())
    setattr(act, "alpha" if isinstance(act, nn.ELU) else "negative_slope", -0.5)
    plain = type(act)(-0.5)
    z = values().requires_grad_()
    (old,), (new,) = (torch.autograd.grad(each(z), z, values()) for each in (plain, act))
    torch.testing.assert_close(new, old)


@pytest.mark.parametrize("cls", [*STOCK, *OURS], ids=lambda cls: f"{cls.__module__.split('.')[0]} {cls.__name__}")
def test_every_class_of_layers(cls: Any) -> None:
    torch.manual_seed(SEED)
    dims = int(cls.__name__[-2]) if cls.__name__.endswith("d") else 2
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 4, 1)
    norm = cls(4, 2) if cls.__name__.startswith("Ghost") else cls(4)
    plain = perturbed(nn.Sequential(conv, norm).double(), SEED).train()
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    x = images(4, 3, *(2,) * dims)
    bn.freeze(model)
    assert len(bn.freeze(other, fold=True, example=x).folding.layers) == 1
    assert_same(model, other, x)
    if cls is not nn.SyncBatchNorm:  # it takes any number of dimensions
        with pytest.raises(ValueError, match="expected"):
            other[1](torch.zeros(2, 4, *(1,) * (dims + 2)))
    bn.unfreeze(other)
    assert type(other[1]) is cls


@pytest.mark.parametrize("act", ["relu", "relu6", "silu"])
def test_an_activation_of_the_layer(act: Any) -> None:
    torch.manual_seed(SEED)
    plain = perturbed(nn.Sequential(nn.Conv2d(3, 4, 1), bn.BatchNorm2d(4, act=act)).double(), SEED).train()
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    bn.freeze(model)
    (layer,) = bn.freeze(other, fold=True, example=images()).folding.layers
    assert (layer.activation, layer.keeps) == (act, "input" if act == "silu" else "output")
    assert_same(model, other, images())


def test_a_map_that_is_parametrized_later() -> None:
    """Its class is of the parametrization then: it stays, and runs as usual once the norm is unfrozen."""
    torch.manual_seed(SEED)
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double(), SEED).train()
    plain = copy.deepcopy(model)
    bn.freeze(plain)
    bn.freeze(model, fold=True, example=images())
    for each in (model, plain):
        nn.utils.parametrizations.weight_norm(each[0])
    assert_same(plain, model, images())
    for each in (model, plain):
        bn.unfreeze(each)
        each.eval()
    assert not is_folded(model[1])
    assert_same(plain, model, images())


def test_the_weights_are_computed_in_float32_at_least() -> None:
    conv, norm = nn.Conv2d(1, 1, 1, dtype=torch.bfloat16), nn.BatchNorm2d(1, dtype=torch.bfloat16)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        norm.running_var.fill_(1.0 + 1 / 128)
        norm.eps = 1 / 1024
    weight, bias = on_the_fly._scaled(conv, norm)
    exact = (1 + 1 / 128 + 1 / 1024) ** -0.5
    assert weight.dtype == bias.dtype == torch.bfloat16
    assert float(weight.detach()) == float(torch.tensor(exact).to(torch.bfloat16))
