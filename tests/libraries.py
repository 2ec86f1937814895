"""Stand-ins of other libraries' layers: their qualified names, attributes and computation; no library is needed.

A checkpoint of the library has the same keys; `__module__` and `__qualname__` are what the rows of
`batchnorm.variants.libraries` match.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from batchnorm.variants.libraries import kind_of

T = TypeVar("T", bound=type)


def of(module: str) -> Callable[[T], T]:
    """A class decorator: the class is one of a module of another library."""

    def mark(cls: T) -> T:
        cls.__module__ = module
        return cls

    return mark


@of("timm.layers.norm_act")
class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(
        self, num_features: int, act: nn.Module | None = None, drop: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        exponential_average_factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                exponential_average_factor = 1.0 / float(self.num_batches_tracked)
        bn_training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            bn_training,
            exponential_average_factor,
            self.eps,
        )
        x = self.drop(x)
        return self.act(x)


@of("timm.layers.norm_act")
class SyncBatchNormAct(nn.SyncBatchNorm):
    def __init__(self, num_features: int, act: nn.Module | None = None) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity()
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@of("timm.layers.split_batchnorm")
class SplitBatchNorm2d(nn.BatchNorm2d):
    def __init__(self, num_features: int, num_splits: int = 2) -> None:
        super().__init__(num_features)
        self.num_splits = num_splits
        self.aux_bn = nn.ModuleList([nn.BatchNorm2d(num_features) for _ in range(num_splits - 1)])

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        first, *rest = input.split(input.shape[0] // self.num_splits)
        return torch.cat([super().forward(first), *(bn(part) for bn, part in zip(self.aux_bn, rest, strict=True))])


class _Constants(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def _affine(self, x: Tensor, eps: float) -> Tensor:
        w, b, rv, rm = (
            tensor.reshape(1, -1, 1, 1) for tensor in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = w * (rv + eps).rsqrt()
        return x * scale + (b - rm * scale)


@of("torchvision.ops.misc")
class FrozenBatchNorm2d(_Constants):
    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self._affine(x, self.eps)


@of("timm.layers.norm_act")
class FrozenBatchNormAct2d(_Constants):
    def __init__(self, num_features: int, act: nn.Module | None = None, eps: float = 1e-5) -> None:
        super().__init__(num_features)
        self.eps = eps
        self.drop = nn.Identity()
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._affine(x, self.eps)))


@of("models.backbone")
class DETRFrozenBatchNorm2d(_Constants):
    def forward(self, x: Tensor) -> Tensor:
        return self._affine(x, 1e-5)


DETRFrozenBatchNorm2d.__qualname__ = "FrozenBatchNorm2d"


@of("detectron2.layers.batch_norm")
class DetectronFrozenBatchNorm2d(_Constants):
    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features)
        self.num_features, self.eps = num_features, eps
        self.running_var -= eps

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


DetectronFrozenBatchNorm2d.__qualname__ = "FrozenBatchNorm2d"


@of("mmcv.ops.sync_bn")
class MMSyncBatchNorm(nn.Module):
    """In training its own operators run, on CUDA only."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        like = nn.BatchNorm2d(num_features)
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            setattr(self, name, getattr(like, name))
        self.group, self.group_size = None, 1
        self.weight, self.bias = nn.Parameter(torch.rand(num_features)), nn.Parameter(torch.zeros(num_features))
        for name, buffer in like.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, input: Tensor) -> Tensor:
        if self.training or not self.track_running_stats:
            raise RuntimeError("sync_bn_forward_mean is implemented for CUDA only")
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


MMSyncBatchNorm.__qualname__ = "SyncBatchNorm"


@of("inplace_abn.abn")
class ABN(nn.Module):
    def __init__(
        self, num_features: int, activation: str = "leaky_relu", activation_param: float = 0.01, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, 0.1
        self.affine = self.track_running_stats = True
        self.activation, self.activation_param = activation, activation_param
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def _scale(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        tracks = self.training and self.track_running_stats
        if tracks:
            self.num_batches_tracked = self.num_batches_tracked + 1
        mean, var = (
            buffer if not self.training or tracks else None for buffer in (self.running_mean, self.running_var)
        )
        x = F.batch_norm(x, mean, var, self._scale(), self.bias, self.training, self.momentum, self.eps)
        if self.activation == "relu":
            return F.relu(x, inplace=True)
        if self.activation == "leaky_relu":
            return F.leaky_relu(x, self.activation_param, inplace=True)
        if self.activation == "elu":
            return F.elu(x, self.activation_param, inplace=True)
        return x


@of("inplace_abn.abn")
class InPlaceABN(ABN):
    """Its operator scales by abs(weight) + eps and writes to its input."""

    def _scale(self) -> Tensor:
        return self.weight.abs() + self.eps

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        with torch.no_grad():
            x.copy_(output)
        return output


@of("sb3_contrib.common.torch_layers")
class BatchRenorm1d(nn.Module):
    def __init__(self, num_features: int, affine: bool = True) -> None:
        super().__init__()
        self.register_buffer("ra_mean", torch.zeros(num_features))
        self.register_buffer("ra_var", torch.ones(num_features))
        self.register_buffer("steps", torch.tensor(0))
        self.scale, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.affine, self.eps, self.momentum, self.num_features = affine, 1e-3, 0.01, num_features

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.ra_mean, self.ra_var
        if self.training:
            mean, var = x.mean(0), x.var(0)
            self.ra_mean += self.momentum * (mean.detach() - self.ra_mean)
            self.ra_var += self.momentum * (var.detach() - self.ra_var)
            self.steps += 1
        x = (x - mean) / (var + self.eps).sqrt()
        return self.scale * x + self.bias if self.affine else x


@of("timm.layers.conv2d_same")
class Conv2dSame(nn.Conv2d):
    """Pads as TensorFlow does, by the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class ScaledStdConv2d(nn.Conv2d):
    """Normalizes its weight: a scale that is folded into it has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1).t(), None, None, training=True).t().reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


IMAGES: dict[str, Callable[[int], nn.Module]] = {
    "BatchNormAct2d": lambda c: BatchNormAct2d(c, nn.SiLU(inplace=True)),
    "BatchNormAct2d, no act": BatchNormAct2d,
    "BatchNormAct2d, other act": lambda c: BatchNormAct2d(c, nn.PReLU(c)),
    "SyncBatchNormAct": lambda c: SyncBatchNormAct(c, nn.ReLU()),
    "SplitBatchNorm2d": SplitBatchNorm2d,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "FrozenBatchNormAct2d": lambda c: FrozenBatchNormAct2d(c, nn.ReLU(inplace=True)),
    "DETR": DETRFrozenBatchNorm2d,
    "detectron2": DetectronFrozenBatchNorm2d,
    "mmcv": MMSyncBatchNorm,
    "ABN": ABN,
    "ABN, elu": lambda c: ABN(c, "elu", 0.7),
    "InPlaceABN": InPlaceABN,
}
"""Layers of images by name, of c channels."""

FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d", "DETR", "detectron2")

C = 4


def filled(layer: nn.Module) -> nn.Module:
    """With random statistics, gamma and beta; gamma is negative in some channels."""
    kind = kind_of(type(layer))
    assert kind is not None
    with torch.no_grad():
        for role, low in (("gamma", -1.5), ("beta", -1.0), ("mean", -1.0), ("var", 0.5)):
            tensor = kind.tensor(layer, role)
            if tensor is not None:
                tensor.uniform_(low, 1.5)
    return layer


def network(name: str) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, C, 3), filled(IMAGES[name](C)), nn.Conv2d(C, 2, 1)).eval()


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 8, 8) * 2 + 1


class Twice(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2
