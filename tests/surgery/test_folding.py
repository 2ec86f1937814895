"""The arithmetic of a fold, map by map, against the two modules run one after the other in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from folds import moved, norms, perturbed
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm as bn
from batchnorm.surgery.fold import Folding, fold

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
IMAGE = (7, 6, 5)


def checked(model: nn.Module, x: torch.Tensor, seed: int = 0) -> Folding:
    """Folded whole, with the same outputs."""
    perturbed(model.to(x.dtype), seed)
    with torch.no_grad():
        before = model(x)
    assert before.abs().max() > 0
    record = fold(model, x)
    assert norms(model) == [], record
    with torch.no_grad():
        assert moved(before, model(x)) < 1e-12
    return record


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4], ids="{} groups".format)
@pytest.mark.parametrize("kind", CONV + TRANSPOSED, ids=lambda kind: kind.__name__)
def test_a_norm_after_a_convolution(kind: type[nn.Module], groups: int, bias: bool) -> None:
    dims = (CONV + TRANSPOSED).index(kind) % 3
    conv = kind(4, 8, 3, stride=2, padding=1, dilation=2, groups=groups, bias=bias)
    norm = NORM[dims](8, affine=bias)
    record = checked(nn.Sequential(conv, norm), torch.randn(2, 4, *IMAGE[: dims + 1], dtype=torch.float64))
    assert [(layer.name, layer.into, layer.before) for layer in record.layers] == [("1", "0", True)]


@pytest.mark.slow
@pytest.mark.parametrize("beta", [True, False], ids=["beta", "no beta"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids="{} groups".format)
@pytest.mark.parametrize("kind", CONV + TRANSPOSED, ids=lambda kind: kind.__name__)
def test_a_norm_before_a_convolution(kind: type[nn.Module], groups: int, beta: bool) -> None:
    dims = (CONV + TRANSPOSED).index(kind) % 3
    cropped = {"padding": 4} if kind in TRANSPOSED else {"stride": 2}
    conv = kind(4, 8, 3, dilation=2, groups=groups, bias=False, **cropped)
    norm = (bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d)[dims](4, bias=beta)
    shape = (2, 4, *(9, 9, 9)[: dims + 1])
    record = checked(nn.Sequential(norm, conv), torch.randn(shape, dtype=torch.float64))
    assert [(layer.name, layer.into, layer.before) for layer in record.layers] == [("0", "1", False)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_beside_a_linear_map(bias: bool) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    checked(nn.Sequential(nn.Linear(3, 4, bias=bias), nn.BatchNorm1d(4, affine=bias)), x)
    checked(nn.Sequential(nn.BatchNorm1d(3, affine=bias), nn.Linear(3, 4, bias=bias)), x)


def test_a_map_takes_in_the_norms_on_both_its_sides() -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6))
    record = checked(model, x)
    assert {(layer.name, layer.into, layer.before) for layer in record.layers} == {("0", "1", False), ("2", "1", True)}


def test_one_map_takes_in_norm_after_norm() -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(), nn.BatchNorm2d(6, affine=False))
    assert [layer.into for layer in checked(model, x).layers] == ["0", "0"]


def test_the_map_before_is_preferred() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    assert checked(model, torch.randn(2, 3, 4, 4, dtype=torch.float64)).layers[0].into == "0"


PADDINGS = {"none": 0, "same": "same", "two": 2}


@pytest.mark.slow
@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_shift_before_a_padded_border(mode: str, padding: int | str) -> None:
    """The zeros at the border never went through the norm; any other padding is made of values that did."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    if mode != "zeros" or padding == 0:
        checked(model, x)
        return
    record = fold(perturbed(model.double()), x)
    assert record.layers == ()
    assert record.skipped[0].why == (
        "into the Conv2d after it: the convolution pads with zeros, which the norm's shift does not reach"
    )


def test_a_norm_without_a_shift_goes_through_a_padded_border() -> None:
    model = nn.Sequential(bn.BatchNorm2d(3, bias=False), nn.Conv2d(3, 4, 3, padding=1)).double().eval()
    with torch.no_grad():
        model[0].running_var.uniform_(0.2, 5)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = model(x)
    assert len(fold(model, x).layers) == 1
    assert moved(before, model(x)) < 1e-12


@pytest.mark.slow
def test_a_shift_before_a_transposed_convolution_is_folded_exactly_where_it_may_be() -> None:
    """Brute force over the settings: folded if and only if a constant input gives a constant output."""
    seen = {True: 0, False: 0}
    for k, stride, padding, extra, dilation in itertools.product((1, 2, 3), (1, 2), (0, 1, 2), (0, 1), (1, 2)):
        if extra >= max(stride, dilation):
            continue
        conv = nn.ConvTranspose1d(2, 4, k, stride, padding, extra, 2, False, dilation)
        with torch.no_grad():
            nn.init.uniform_(conv.weight, 0.5, 1)
            constant = conv.double()(torch.ones(1, 2, 9, dtype=torch.float64))
        even = bool((constant - constant[..., :1]).abs().max() < 1e-12)
        record = fold(
            perturbed(nn.Sequential(nn.BatchNorm1d(2), conv).double()), torch.randn(2, 2, 9, dtype=torch.float64)
        )
        why = "" if record.layers else record.skipped[0].why
        assert ("at the border" in why) != even, (k, stride, padding, extra, dilation, record)
        seen[even] += 1
    assert min(seen.values()) > 5


def test_the_new_parameters_are_like_the_old_ones() -> None:
    for requires_grad, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16)):
        conv = nn.Conv2d(3, 4, 3, bias=False).to(dtype, memory_format=torch.channels_last)
        conv.weight.requires_grad_(requires_grad)
        model = perturbed(nn.Sequential(conv, nn.BatchNorm2d(4).to(dtype)))
        old = conv.weight
        assert len(fold(model, torch.randn(2, 3, 8, 8, dtype=dtype)).layers) == 1
        assert conv.weight is not old
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not conv.weight.is_contiguous()
        assert {conv.weight.dtype, conv.bias.dtype} == {dtype}
        assert {conv.weight.requires_grad, conv.bias.requires_grad} == {requires_grad}
        assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_a_bias_keeps_its_own_requires_grad() -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.bias.requires_grad_(False)
    fold(perturbed(nn.Sequential(conv, nn.BatchNorm2d(4))), torch.randn(2, 3, 6, 6))
    assert (conv.weight.requires_grad, conv.bias.requires_grad) == (True, False)


def test_a_state_dict_taken_before_keeps_its_values() -> None:
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    state = model.state_dict()
    copied = {key: value.clone() for key, value in state.items()}
    assert len(fold(model, torch.randn(2, 3, 6, 6)).layers) == 1
    assert all(torch.equal(state[key], value) for key, value in copied.items())


def transposed(groups: int) -> tuple[nn.Sequential, torch.Tensor]:
    conv = nn.ConvTranspose2d(4, 4, 3, stride=1, padding=1, groups=groups, bias=False)
    return perturbed(nn.Sequential(conv, nn.BatchNorm2d(4)).double()), torch.randn(2, 4, 6, 6, dtype=torch.float64)


def test_story_14_grouped_transposed_convolution() -> None:
    """pytorch/pytorch#180995: torch.nn.utils.fusion raises a shape mismatch for 1 < groups."""
    model, x = transposed(2)
    with pytest.raises(RuntimeError, match="must match the size"):
        fuse_conv_bn_eval(model[0], model[1], transpose=True)
    checked(model, x)


def test_story_14_depthwise_transposed_convolution() -> None:
    """pytorch/pytorch#180995: one group a channel broadcasts to a weight of the wrong shape, without an error."""
    model, x = transposed(4)
    wrong = fuse_conv_bn_eval(model[0], model[1], transpose=True)
    assert (tuple(model[0].weight.shape), tuple(wrong.weight.shape)) == ((4, 1, 3, 3), (4, 4, 3, 3))
    checked(model, x)
    assert model[0].weight.shape == (4, 1, 3, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_story_14_scaling_the_wrong_axis_of_a_transposed_weight(groups: int) -> None:
    """ultralytics/ultralytics#25364: the scale along axis 0, the inputs, runs and is silently wrong."""
    model, x = transposed(groups)
    before, (conv, norm) = model(x), model
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    wrong = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=groups).double()
    with torch.no_grad():
        wrong.weight.copy_(conv.weight * scale[:, None, None, None])
        wrong.bias.copy_(norm.bias - norm.running_mean * scale)
    assert moved(before, wrong(x)) > 0.1
    assert len(fold(model, x).layers) == 1
    assert moved(before, model(x)) < 1e-12


def test_story_14_a_linear_map_before_a_norm_without_gamma_and_beta() -> None:
    """pytorch/pytorch#180995's neighbour: fuse_linear_bn_eval multiplies None where affine=False."""
    model = perturbed(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)).double())
    with pytest.raises(TypeError, match="NoneType"):
        fuse_linear_bn_eval(model[0], model[1])
    checked(model, torch.randn(5, 3, dtype=torch.float64))


def test_story_14_a_linear_map_whose_norm_has_other_channels() -> None:
    """fuse_linear_bn_eval folds wherever the numbers match; on (N, C, L) input the channels are not the units."""
    model = perturbed(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double())
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    assert moved(model(x), fuse_linear_bn_eval(model[0], model[1])(x)) > 0.1
    record = fold(model, x)
    assert record.layers == ()
    assert "has 3-d output, in which its units are not the norm's channels" in record.skipped[0].why
