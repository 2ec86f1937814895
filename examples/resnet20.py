"""A published ResNet-20 on CIFAR-10: which data its running statistics describe, and how to repair them.

    python examples/resnet20.py FOLDER      or with BATCHNORM_DATA=FOLDER

FOLDER/cifar10 has `resnet20-12fca82f.th` of akamaster/pytorch_resnet_cifar10 (BSD-2-Clause), and
`cifar10_lossless_subset.npz` with x_train, x_test (N, 32, 32, 3) uint8 and y_test.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.surgery.adapt import adapt
from batchnorm.surgery.compare import compare
from batchnorm.surgery.fold import fold
from batchnorm.surgery.recalibrate import recalibrate

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def folder(path: str | None = None) -> Path | None:
    """The folder with checkpoint and images: in `path`, in $BATCHNORM_DATA, or in shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = Path(path or os.environ.get("BATCHNORM_DATA", default)) / "cifar10"
    names = ("resnet20-12fca82f.th", "cifar10_lossless_subset.npz")
    return data if all((data / name).is_file() for name in names) else None


class Block(nn.Module):
    def __init__(self, inside: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.missing = stride, planes - inside

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.missing:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        out = out + x
        return F.relu(out)


class ResNet20(nn.Module):
    """He et al. 2016, with the shortcuts of option A and the keys of akamaster's checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


class Images(NamedTuple):
    """float32 (N, 3, 32, 32) in 0..1, and classes."""

    train: Tensor
    test: Tensor
    labels: Tensor


def load(where: Path) -> tuple[ResNet20, Images]:
    model = ResNet20()
    stored = torch.load(where / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()}, strict=False)
    with np.load(where / "cifar10_lossless_subset.npz") as found:
        train, test, labels = (torch.from_numpy(found[name]) for name in ("x_train", "x_test", "y_test"))
    return model.eval(), Images(*(x.permute(0, 3, 1, 2).float() / 255 for x in (train, test)), labels.long())


def augmented(images: Tensor, seed: int = 0) -> Tensor:
    """As it was trained: padded with 4 black pixels, cropped at random and flipped."""
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images, (4, 4, 4, 4))
    corners = torch.randint(0, 9, (len(images), 2), generator=generator).tolist()
    cropped = [image[:, i : i + 32, j : j + 32] for image, (i, j) in zip(padded, corners, strict=True)]
    flips = torch.rand(len(images), generator=generator) < 0.5
    return torch.stack([image.flip(2) if flip else image for image, flip in zip(cropped, flips, strict=True)])


def normalized(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def low_contrast(images: Tensor) -> Tensor:
    return 0.5 + 0.3 * (images - 0.5)


def percent(images: Images, change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[nn.Module], float]:
    """A metric: how many of the test images, changed, a model gets right."""
    x = normalized(change(images.test))

    def metric(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((model(x).argmax(1) == images.labels).float().mean())

    return metric


def adapted(model: nn.Module, images: Images, change: Callable[[Tensor], Tensor], prior: float) -> float:
    """How many of the test images, changed, it gets right while its statistics lean towards each batch."""
    x, right = normalized(change(images.test)), 0
    with torch.no_grad(), adapt(model, prior=prior):
        for some, labels in zip(x.split(200), images.labels.split(200), strict=True):
            right += int((model(some).argmax(1) == labels).sum())
    return 100 * right / len(x)


def main() -> int:
    where = folder(sys.argv[1] if len(sys.argv) > 1 else None)
    if where is None:
        sys.stderr.write(f"no checkpoint and images found: see the head of {__file__}\n")
        return 2
    model, images = load(where)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.rule("Its statistics are of augmented images: on a batch of those, training and eval agree")
    console.print(str(compare(model, normalized(augmented(images.train[:128])))))
    console.rule("On plain images they do not")
    console.print(str(compare(model, normalized(images.train[:128]))))
    cases: dict[str, tuple[Tensor, Callable[[nn.Module], float]]] = {
        "Recalibrated on plain images it is worse, and the metric keeps the old statistics": (
            images.train[:1000],
            percent(images),
        ),
        "Recalibrated on images as it was trained on": (augmented(images.train[:1000]), percent(images)),
        "On pictures with less contrast, recalibrated on such pictures": (
            low_contrast(images.train[:1000]),
            percent(images, low_contrast),
        ),
    }
    for title, (data, metric) in cases.items():
        console.rule(title)
        record = recalibrate(copy.deepcopy(model), normalized(data).split(100), exact=False, metric=metric)
        console.print(str(record))
    console.rule(
        "Adapted, 200 test images at a time: what it gets right of the images as they are, and of less contrast"
    )
    for prior in (math.inf, 256, 64, 16, 0):
        plain, less = (adapted(model, images, change, prior) for change in (lambda x: x, low_contrast))
        console.print(f"  running statistics worth {prior:3g} samples: {plain:.2f} and {less:.2f}")
    console.rule("Folded, for inference")
    console.print(str(fold(model, normalized(images.test[:64]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
