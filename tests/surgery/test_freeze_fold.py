"""freeze(fold=True): frozen layers applied by the map before them compute the same, keep less, and come back."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from folds import perturbed
from frozen_folds import FLAVOURS, assert_same, folded, frozen_and_folded, images, network
from torch import Tensor, nn
from zoo import BasicBlock, ResNet

import batchnorm as bn
from batchnorm.surgery._folding.on_the_fly import is_folded
from randomness import SEED

# --- the same numbers -------------------------------------------------------------------------------------------------


@FLAVOURS
@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(), nn.SiLU(), nn.Tanh(), nn.Hardswish(), nn.GELU()],
    ids=str,
)
def test_outputs_and_gradients_do_not_change(act: nn.Module, flavour: str) -> None:
    model, other = frozen_and_folded(lambda: network(act, flavour), flavour)
    assert sum(map(is_folded, other.modules())) == 2
    assert_same(model, other, images())
    assert_same(model.eval(), other.eval(), 3 * images(2, 3, 5, 5))


MAPS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 6), (5, 4)),
    (nn.Linear(4, 6, bias=False), (5, 4)),
    (nn.Conv1d(4, 6, 3, padding="same", groups=2), (2, 4, 7)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, (1, 3), dilation=2, groups=2, bias=False), (2, 4, 7, 6)),
    (nn.Conv3d(4, 6, 2, padding=1), (2, 4, 3, 4, 2)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 3)),
    (nn.ConvTranspose3d(4, 6, 2, groups=2, bias=False), (2, 4, 3, 2, 2)),
]


@pytest.mark.parametrize(
    ("linear", "shape"), MAPS, ids=lambda value: str(value) if isinstance(value, nn.Module) else ""
)
@pytest.mark.parametrize("affine", [True, False])
def test_every_map(linear: nn.Module, shape: tuple[int, ...], affine: bool) -> None:
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]

    def make() -> nn.Module:
        return perturbed(nn.Sequential(copy.deepcopy(linear), norm(6, affine=affine)).double(), SEED).train()

    model, other = frozen_and_folded(make, "", images(*shape))
    assert_same(model, other, images(*shape))
    assert_same(model, other, images(3, *shape[1:]))


class Upsampling(nn.Module):
    """A transposed convolution that is called with an output size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(2, 3, 3, stride=2), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x, output_size=(2 * x.shape[2] + 2, 2 * x.shape[3] + 1)))


def test_the_output_size_of_a_transposed_convolution() -> None:
    model, other = frozen_and_folded(lambda: perturbed(Upsampling().double(), SEED), "", images(2, 2, 4, 3))
    model.load_state_dict(other.state_dict())
    assert_same(model, other, images(2, 2, 4, 3))


@pytest.mark.parametrize("convert", [False, True])
def test_residuals(convert: bool) -> None:
    torch.manual_seed(SEED)
    plain = perturbed(nn.Sequential(ResNet(BasicBlock(8, 8), out=8)).double(), SEED).train()
    if convert:
        bn.convert(plain)
    model, other = frozen_and_folded(lambda: copy.deepcopy(plain), "", images(2, 3, 8, 8))
    assert_same(model, other, images(2, 3, 8, 8))
    assert bn.memory(other, images(2, 3, 8, 8)).total < bn.memory(model, images(2, 3, 8, 8)).total


class Residual(nn.Module):
    """One of this package's layers with a residual and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, act="relu6")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), x)


def test_a_layer_that_adds_a_residual() -> None:
    torch.manual_seed(SEED)
    plain = perturbed(Residual().double(), SEED)
    model, other = frozen_and_folded(lambda: copy.deepcopy(plain))
    assert_same(model, other, images())
    with pytest.raises(ValueError, match="residual must have the input's shape"):
        other.norm(images(), images(1, 3, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    plain = network().to(dtype)
    other = copy.deepcopy(plain)
    bn.freeze(plain)
    folded(other, images().to(dtype))
    assert_same(plain, other, images().to(dtype), tolerance=tolerance)


def test_half_maps_with_norms_in_float32() -> None:
    model = network().to(torch.bfloat16)
    for norm in (model[1], model[4]):
        norm.float()
    x = images().to(torch.bfloat16)
    other = copy.deepcopy(model)
    bn.freeze(model)
    folded(other, x)
    assert_same(model, other, x, tolerance=6e-2)


@pytest.mark.parametrize("flavour", ["stock", "converted"])
def test_autocast(flavour: str) -> None:
    plain = network(nn.ReLU6(), flavour).float()
    other = copy.deepcopy(plain)
    bn.freeze(plain)
    with torch.autocast("cpu", torch.bfloat16):
        folded(other, images().float())
        assert_same(plain, other, images().float(), tolerance=6e-2)
    assert other[0].weight.dtype == torch.float32


def test_channels_last_stays() -> None:
    model = network(nn.ReLU6()).to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    folded(model, x)
    for last in (1, 3, 4, 6):
        assert model[:last](x).is_contiguous(memory_format=torch.channels_last)


def test_double_backward() -> None:
    model, other = frozen_and_folded(lambda: network(nn.ELU()))
    found = []
    for each in (model, other):
        x = images().requires_grad_()
        (slope,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, each[0].weight, each[3].weight]))
    for old, new in zip(*found, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-10)


def test_functional_call_and_vmap() -> None:
    model, other = frozen_and_folded(lambda: network(nn.ReLU6()))

    def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    found = []
    for each in (model, other):
        parameters = {name: p.detach() for name, p in each.named_parameters()}
        gradient = torch.func.vmap(torch.func.grad(lambda p, x, m=each: loss(m, p, x)), (None, 0))
        found.append(gradient(parameters, images()))
    for name, old in found[0].items():
        if "weight" in name and old.dim() == 5:
            torch.testing.assert_close(found[1][name], old, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("flavour", ["stock", "converted"])
def test_compiled(flavour: str) -> None:
    model, other = frozen_and_folded(lambda: network(nn.ReLU6(), flavour))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert_same(model, compiled, images())
    with torch.no_grad():
        other[1].running_mean.add_(1)
        model[1].running_mean.add_(1)
    assert_same(model, compiled, images())


def test_distributed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    model, other = frozen_and_folded(network)
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(other)
        for _ in range(2):
            wrapped(images()).square().sum().backward()
            model(images()).square().sum().backward()
        with pytest.raises(ValueError, match="fold before DistributedDataParallel wraps the model"):
            bn.freeze(wrapped, fold=True, example=images())
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(other[0].weight.grad, model[0].weight.grad, rtol=1e-10, atol=1e-10)
