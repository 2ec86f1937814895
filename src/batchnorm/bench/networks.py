"""The networks of `batchnorm bench --models`, built with random weights: nothing is downloaded.

ResNet-50, MobileNetV2, EfficientNet-B0 and RegNet are classes of the package transformers. The others are written here
as they usually are, so that what `convert` rewrites is ordinary code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.record import BenchError

CLASSES = 1000
LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@dataclass(frozen=True)
class Model:
    """A network: how it is built, the shape of a batch, and a smaller one for `--quick`. `classes`: of its output.

    Layouts are those in which people train it: channels_last needs an image or a volume.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    quick: tuple[int, ...]
    classes: int = CLASSES

    @property
    def layouts(self) -> tuple[str, ...]:
        """The memory layouts that are measured."""
        return ("contiguous", *{4: ("channels_last",), 5: ("channels_last_3d",)}.get(len(self.shape), ()))


class _Logits(nn.Module):
    """A classifier of transformers' that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=images).logits
        return logits


def from_transformers(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A function that builds a network of the package transformers. It raises BenchError without the package."""

    def build() -> nn.Module:
        try:
            package = import_module("transformers")
        except ImportError as error:
            raise BenchError('models=True needs the package transformers: pip install "batchnorm[bench]"') from error
        described = getattr(package, f"{name}Config")(num_labels=CLASSES, **config)
        network = _Logits(getattr(package, f"{name}ForImageClassification")(described))
        for module in network.modules():
            # Some start with weights and gammas so small that the signal vanishes over the layers.
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        return network

    return build


def efficientnet_b0() -> nn.Module:
    """EfficientNet-B0. Its pooling is over the whole image, as the paper's.

    transformers pools with a window of 1280², larger than the image, and torch.compile in PyTorch 2.13 divides the
    gradient by the area of the window (pytorch#198119): compiled steps would neither learn nor be comparable.
    """
    sizes = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
    network = from_transformers("EfficientNet", dropout_rate=0.2, **sizes)()
    network.network.efficientnet.pooler = nn.AdaptiveAvgPool2d(1)  # type: ignore[union-attr]
    return network


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. He et al. 2016, figure 2."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)  # type: ignore[no-any-return]


def resnet18() -> nn.Module:
    """ResNet-18 for small images: a 3x3 stem, no pooling before the blocks."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    inputs = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [_BasicBlock(inputs, channels, stride), _BasicBlock(channels, channels, 1)]
        inputs = channels
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class _DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution, appended to the input. Huang et al. 2017, section 3."""

    def __init__(self, inputs: int, growth: int = 32, bottleneck: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(x)))
        out = self.conv2(self.relu2(self.norm2(out)))
        return torch.cat((x, out), 1)


def densenet121() -> nn.Module:
    """DenseNet-121: blocks of 6, 12, 24 and 16 layers, growth 32, compression one half."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for number, depth in enumerate((6, 12, 24, 16)):
        for _ in range(depth):
            layers.append(_DenseLayer(channels))
            channels += 32
        if number < 3:
            layers += [
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, channels // 2, 1, bias=False),
            ]
            layers += [nn.AvgPool2d(2)]
            channels //= 2
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, CLASSES))


class _AudioBlock(nn.Module):
    """Halve the length twice, then a residual pair of convolutions, with SiLU."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv1d(inputs, channels, 5, 4, 2, bias=False), nn.BatchNorm1d(channels), nn.SiLU())
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        out = self.act(self.bn1(self.conv1(x)))
        return self.act(x + self.bn2(self.conv2(out)))  # type: ignore[no-any-return]


def audio() -> nn.Module:
    """A residual network on raw audio, one second at 16 kHz."""
    stem = [nn.Conv1d(1, 32, 9, padding=4, bias=False), nn.BatchNorm1d(32), nn.SiLU()]
    blocks = [_AudioBlock(inputs, channels) for inputs, channels in ((32, 64), (64, 128), (128, 256), (256, 256))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(256, 35))


def tabular() -> nn.Module:
    """A multilayer perceptron on 100 features: four hidden layers of 512 units."""
    widths = (100, 512, 512, 512, 512)
    layers: list[nn.Module] = []
    for inputs, units in pairwise(widths):
        layers += [nn.Linear(inputs, units, bias=False), nn.BatchNorm1d(units), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _twice3d(inputs: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, channels):
        layers += [
            nn.Conv3d(before, channels, 3, padding=1, bias=False),
            nn.BatchNorm3d(channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """A 3-d U-Net with three levels: a class for every voxel. Çiçek et al. 2016, figure 2."""

    def __init__(self, channels: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.down1, self.down2 = _twice3d(1, channels), _twice3d(channels, 2 * channels)
        self.bottom = _twice3d(2 * channels, 4 * channels)
        self.pool = nn.MaxPool3d(2)
        self.up2 = nn.ConvTranspose3d(4 * channels, 2 * channels, 2, 2)
        self.join2 = _twice3d(4 * channels, 2 * channels)
        self.up1 = nn.ConvTranspose3d(2 * channels, channels, 2, 2)
        self.join1 = _twice3d(2 * channels, channels)
        self.head = nn.Conv3d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A map of logits, of the volume's size."""
        fine = self.down1(x)
        middle = self.down2(self.pool(fine))
        x = self.up2(self.bottom(self.pool(middle)))
        x = self.up1(self.join2(torch.cat([middle, x], 1)))
        logits: Tensor = self.head(self.join1(torch.cat([fine, x], 1)))
        return logits


_IMAGES, _FEW_IMAGES = (16, 3, 224, 224), (4, 3, 64, 64)

MODELS: dict[str, Model] = {
    "MobileNetV2": Model(from_transformers("MobileNetV2"), _IMAGES, _FEW_IMAGES),
    "ResNet-18": Model(resnet18, (64, 3, 32, 32), (8, 3, 32, 32), 10),
    "ResNet-50": Model(from_transformers("ResNet"), _IMAGES, _FEW_IMAGES),
    "EfficientNet-B0": Model(efficientnet_b0, _IMAGES, _FEW_IMAGES),
    "DenseNet-121": Model(densenet121, _IMAGES, _FEW_IMAGES),
    "RegNetY-400MF": Model(
        from_transformers(
            "RegNet", embedding_size=32, hidden_sizes=[48, 104, 208, 440], depths=[1, 3, 6, 6], groups_width=8
        ),
        _IMAGES,
        _FEW_IMAGES,
    ),
    "audio": Model(audio, (16, 1, 16000), (2, 1, 16000), 35),
    "tabular": Model(tabular, (2048, 100), (256, 100), 10),
    "U-Net 3-d": Model(UNet3d, (2, 1, 64, 64, 64), (1, 1, 16, 16, 16), 4),
}
"""As the papers configure them. The numbers of parameters are those of torchvision's networks, where it has them."""
