"""Small models in the manner of well-known ones, and what convert is to find in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it


class Kind(NamedTuple):
    """A model's maker, the shape of its input, and how many layers are converted and fused."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    converted: int
    fused: int


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8, momentum=None),
        nn.Identity(),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8, affine=False),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ELU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


class BasicBlock(nn.Module):
    """torchvision's: one ReLU, in place, called twice; `out += identity`."""

    def __init__(self, inside: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inside != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inside, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out  # noqa: RET504 - as torchvision writes it


class Bottleneck(nn.Module):
    """timm's: optional attention and drop path between the last batch norm and the addition."""

    def __init__(self, inside: int, width: int, planes: int, se: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop_block = nn.Identity()
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.se = se
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if inside != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inside, planes, 1), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.conv3(x)
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class ResNet(nn.Module):
    """The stem in a method of its own, as torchvision has it."""

    def __init__(self, *blocks: nn.Module, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(*blocks)
        self.fc = nn.Linear(out, 4)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.layer1(x)
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class InvertedResidual(nn.Module):
    """MobileNetV2's: the last batch norm has no activation, and the block's output is a sum."""

    def __init__(self, inside: int, planes: int) -> None:
        super().__init__()
        wide = 2 * inside
        self.use_res_connect = inside == planes
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:  # noqa: RET505 - as torchvision writes it
            return self.conv(x)


class ConvLayer(nn.Module):
    """transformers': every part optional, tested in forward."""

    def __init__(self, inside: int, planes: int, activation: nn.Module | None) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inside, planes, 1)
        self.normalization = nn.BatchNorm2d(planes)
        self.activation = activation

    def forward(self, features: Tensor) -> Tensor:
        features = self.convolution(features)
        if self.normalization is not None:
            features = self.normalization(features)
        if self.activation is not None:
            features = self.activation(features)
        return features


class Nested(nn.Module):
    """transformers' ResNet layer: the batch norm is two modules below the addition."""

    def __init__(self, inside: int, planes: int) -> None:
        super().__init__()
        self.shortcut = ConvLayer(inside, planes, None) if inside != planes else nn.Identity()
        self.layer = nn.Sequential(ConvLayer(inside, 5, nn.ReLU()), ConvLayer(5, planes, None))
        self.activation = nn.ReLU()
        self.use_residual = True

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state  # noqa: RET504 - as transformers writes it


class LinearTail(Nested):
    def forward(self, features: Tensor) -> Tensor:
        residual = features
        features = self.layer(features)
        return residual + features if self.use_residual else features


class MBConv(nn.Module):
    """EfficientNet's: SiLU, squeeze and excite, and stochastic depth while training."""

    def __init__(self, channels: int, depth_probability: float = 0.5, dropout: float = 0.3) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand, self.bn0 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide, momentum=0.01, eps=1e-3)
        self.depthwise = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.reduce, self.excite = nn.Conv2d(wide, 2, 1), nn.Conv2d(2, wide, 1)
        self.project, self.bn2 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.swish = nn.SiLU()
        self.depth_probability, self.dropout = depth_probability, dropout

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.swish(self.bn0(self.expand(inputs)))
        x = self.depthwise(x)
        x = F.silu(self.bn1(x), inplace=True)
        squeezed = F.adaptive_avg_pool2d(x, 1)
        x = torch.sigmoid(self.excite(self.swish(self.reduce(squeezed)))) * x
        x = self.bn2(self.project(x))
        if self.training:
            keep = torch.rand(len(x), 1, 1, 1, dtype=x.dtype) < self.depth_probability
            x = x / self.depth_probability * keep
        x = F.dropout(x, self.dropout, self.training)
        return x + inputs


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d: a batch norm that applies an activation itself."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        x = self.drop(x)
        x = self.act(x)
        return x  # noqa: RET504 - as timm writes it


class NormActBlock(nn.Module):
    """timm's inverted residual, of norm-and-activation layers."""

    def __init__(self, channels: int, has_skip: bool) -> None:
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(channels, channels, 1), NormAct(channels, nn.SiLU(inplace=True))
        self.conv_pwl, self.bn3 = nn.Conv2d(channels, channels, 1), NormAct(channels, nn.Identity())
        self.drop_path = nn.Identity()
        self.has_skip = has_skip

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.conv_pwl(x)
        x = self.bn3(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(inside), nn.ReLU(inplace=True), nn.Conv2d(inside, 4, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, growth, 3, 1, 1)

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        features = [inputs] if isinstance(inputs, Tensor) else inputs
        return self.conv2(self.relu2(self.norm2(self.bn_function(features))))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 1, 1)
        self.layers = nn.ModuleList([DenseLayer(4 + 3 * i, 3) for i in range(3)])
        self.norm = nn.BatchNorm2d(13)
        self.last = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.first(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.last(x.mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attend(y, y, y)[0]
        return x + self.mix(self.norm(x))


class UNet(nn.Module):
    """Of 1, 2 or 3 dimensions, with skip connections by concatenation."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.down = nn.Sequential(conv(2, 4, 3, 1, 1), norm(4), nn.GELU())
        self.strided = conv(4, 6, 2, 2)
        self.norm = norm(6)
        self.act = nn.Hardswish()
        self.up, self.norm_up = up(6, 4, 2, 2), norm(4)
        self.out = conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.act(self.norm(self.strided(skip)))
        y = self.norm_up(self.up(y)).tanh()
        return self.out(torch.cat([skip, y], 1))


ZOO: dict[str, Kind] = {
    "plain CNN": Kind(plain_cnn, (4, 3, 10, 10), 4, 3),
    "ResNet, basic": Kind(lambda: ResNet(BasicBlock(8, 8), BasicBlock(8, 10, 2), out=10), (4, 3, 8, 8), 6, 5),
    "ResNet, bottleneck": Kind(lambda: ResNet(Bottleneck(8, 4, 10), Bottleneck(10, 4, 10), out=10), (4, 3, 8, 8), 8, 7),
    "ResNet, attention": Kind(lambda: ResNet(Bottleneck(8, 4, 8, nn.Conv2d(8, 8, 1)), out=8), (4, 3, 8, 8), 4, 3),
    "ResNet, nested": Kind(lambda: ResNet(Nested(8, 8), Nested(8, 6), out=6), (4, 3, 8, 8), 6, 5),
    "linear tails, nested": Kind(lambda: ResNet(LinearTail(8, 8), out=8), (4, 3, 8, 8), 3, 3),
    "MobileNetV2": Kind(lambda: ResNet(InvertedResidual(8, 8), InvertedResidual(8, 6), out=6), (4, 3, 8, 8), 7, 6),
    "EfficientNet": Kind(lambda: ResNet(MBConv(8), MBConv(8), out=8), (4, 3, 8, 8), 7, 5),
    "norm-act": Kind(lambda: ResNet(NormActBlock(8, True), NormActBlock(8, False), out=8), (4, 3, 8, 8), 5, 4),
    "DenseNet": Kind(DenseNet, (4, 3, 6, 6), 7, 7),
    "transformer": Kind(Transformer, (4, 5, 8), 0, 0),
    "U-Net 1d": Kind(lambda: UNet(1), (4, 2, 16), 3, 3),
    "U-Net 2d": Kind(lambda: UNet(2), (4, 2, 8, 8), 3, 3),
    "U-Net 3d": Kind(lambda: UNet(3), (4, 2, 4, 4, 4), 3, 3),
}

WITHOUT_NORMS = pytest.mark.filterwarnings("ignore:.* found no batch norm layer in it:UserWarning")
"""For tests of all models: the transformer has no batch norm, of which tools warn."""
