"""Networks as they are trained: five steps with equal bits, and how much less forward keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from leaning import assert_equal_steps, share_saved
from torch import nn

import batchnorm as bn
from batchnorm.bench.networks import MODELS, from_transformers
from processes import succeed


def vgg16() -> nn.Module:
    """VGG16-BN with a small classifier: the large one's weights are not activations."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if not width:
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 10))


def unpadded() -> nn.Module:
    return from_transformers("MobileNetV2", tf_padding=False)()


# By name: the network, the shape of a batch, and the least share of what forward keeps that must be saved.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "ResNet-50": (MODELS["ResNet-50"].build, (2, 3, 64, 64), 0.25),
    "MobileNetV2": (MODELS["MobileNetV2"].build, (2, 3, 64, 64), 0.45),
    "MobileNetV2, padding in the convolution": (unpadded, (2, 3, 64, 64), 0.45),
    "EfficientNet-B0": (MODELS["EfficientNet-B0"].build, (2, 3, 64, 64), 0.25),
    "DenseNet-121": (MODELS["DenseNet-121"].build, (2, 3, 64, 64), 0.45),
    "VGG16-BN": (vgg16, (2, 3, 64, 64), 0.4),
    "U-Net 3-d": (MODELS["U-Net 3-d"].build, (1, 1, 16, 16, 16), 0.35),
    "audio": (MODELS["audio"].build, (2, 1, 4000), 0.4),
    "tabular": (MODELS["tabular"].build, (64, 100), 0.4),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_five_steps_and_what_is_kept(name: str, converted: bool) -> None:
    build, shape, least = NETWORKS[name]
    network = build()
    if converted:
        bn.convert(network)
    assert share_saved(network.train(), torch.randn(shape)) > least
    assert_equal_steps(network, lambda: torch.randn(shape))


@pytest.mark.parametrize("name", ["ResNet-50", "EfficientNet-B0", "U-Net 3-d", "tabular"])
@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_bfloat16(name: str, converted: bool) -> None:
    build, shape, _ = NETWORKS[name]
    network = build()
    if converted:
        bn.convert(network)

    def mode() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    assert_equal_steps(network, lambda: torch.randn(shape), steps=2, mode=mode)


@pytest.mark.parametrize("name", ["ResNet-18", "MobileNetV2", "DenseNet-121"])
def test_channels_last_and_accumulation(name: str) -> None:
    network = MODELS[name].build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def inputs() -> torch.Tensor:
        return torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)

    assert_equal_steps(network, inputs, steps=2, accumulate=2)
    bn.convert(network)
    assert_equal_steps(network, inputs, steps=2, accumulate=2)


SCRIPT = """
import copy, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
import batchnorm as bn
from batchnorm.bench.networks import MODELS

dist.init_process_group("gloo")
torch.manual_seed(0)
network = MODELS["ResNet-18"].build()
if sys.argv[1] == "sync":
    bn.convert(network)
    bn.sync(network)
other = copy.deepcopy(network)
plain, leaned = DDP(network), DDP(other)
record = bn.lean(leaned)
same = True
for step in range(5):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
    gradients = []
    for each in (plain, leaned):
        each.zero_grad()
        loss = each(x).square().mean()
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in each.parameters())])
        torch.optim.SGD(each.parameters(), lr=1e-3).step()
    same &= all(map(torch.equal, *gradients))
print(same, record.aside, record.bytes > 0)
"""


@pytest.mark.parametrize("layers", ["stock", "sync"])
def test_two_processes(layers: str, tmp_path: Path) -> None:
    assert succeed(SCRIPT, 2, layers, folder=tmp_path) == ["True None True"] * 2
