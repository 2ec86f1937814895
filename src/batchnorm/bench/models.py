"""Whole training steps: a network with torch.nn's layers, and the same network after `batchnorm.convert`.

What they have become is then timed in inference as well (`batchnorm.bench.inference`).

A step is forward, cross-entropy, backward and SGD with momentum 0.9, on random images. Both networks start from the
same state and see the same batches, with the same random numbers for dropout, and their steps are interleaved: the
losses can be compared step by step. As training amplifies rounding, what difference is to be expected is measured too:
`nudged` is the stock network on images whose last digit is changed. And `bare` is the stock network without its batch
norm layers and activations: no layer could make a step faster than that.

    saved bytes    what forward keeps for backward: the distinct storages that autograd saves, parameters and buffers
                   excepted; it is the peak of the activations' memory
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm
from batchnorm.bench import inference, timing
from batchnorm.bench.record import BenchError

Network = torch.nn.Module
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CLASSES = 1000
_ACTIVATIONS = torch.nn.ReLU | torch.nn.ReLU6 | torch.nn.SiLU
STEPS = 21
_BATCHES = 4
_MORE_THAN_NOISE = 10
_ROUNDING = 1e-5
# With batch norm and random weights the first layer's gradient is so steep (its norm is some hundreds) that at usual
# rates one changed last digit parts the losses within a few steps. At this one they fall visibly, and can be compared.
_RATE = 1e-8


@dataclass(frozen=True, slots=True)
class Workload:
    """A network by name, in a layout, on batches of square images."""

    model: str
    layout: str
    batch: int = 16
    side: int = 224

    @property
    def name(self) -> str:
        """In words, which `--filter` looks at."""
        return f"{self.model} {self.layout} {self.batch}x3x{self.side}x{self.side}"


class _Logits(torch.nn.Module):
    """A classifier of transformers' that returns its logits alone."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=images).logits
        return logits


def from_transformers(name: str, **config: Any) -> Callable[[], Network]:
    def build() -> Network:
        try:
            package = import_module("transformers")
        except ImportError as error:
            raise BenchError('--models needs the package transformers: pip install "batchnorm[bench]"') from error
        described = getattr(package, f"{name}Config")(num_labels=CLASSES, **config)
        network = _Logits(getattr(package, f"{name}ForImageClassification")(described))
        for module in network.modules():
            # Some start with weights, gammas too, so small that from layer to layer the images' trace fades to nothing.
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.reset_parameters()
        return network

    return build


NETWORKS: dict[str, Callable[[], Network]] = {
    "ResNet-50": from_transformers("ResNet"),
    "MobileNetV2": from_transformers("MobileNetV2"),
    "EfficientNet-B0": from_transformers(
        "EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, dropout_rate=0.2, image_size=224
    ),
}
"""Built with random weights, as the papers configure them: transformers needs no torchvision for it and no download."""


class Converted(Protocol):
    """What `batchnorm.convert` tells of the layers it found."""

    @property
    def layers(self) -> Sized: ...

    @property
    def converted(self) -> int: ...

    @property
    def fused(self) -> int: ...


Convert = Callable[[Network], Converted]


def workloads(quick: bool) -> list[Workload]:
    """What `--models` times."""
    size = {"batch": 8, "side": 96} if quick else {}
    return [Workload(model, layout, **size) for model in NETWORKS for layout in LAYOUTS]


def converter() -> Convert:
    """`batchnorm.convert`. Raises BenchError where this version has none."""
    convert: Convert | None = getattr(batchnorm, "convert", None)
    if convert is None:
        raise BenchError("--models needs batchnorm.convert, which this version does not have")
    return convert


class Training:
    """One network in training, timed as a contender: forward gives the loss, backward makes the step."""

    apart = True

    def __init__(self, network: Network, batches: list[tuple[Tensor, Tensor]], seed: int) -> None:
        self.network, self.batches, self.seed = network.train(), batches, seed
        self.optimizer = torch.optim.SGD(network.parameters(), lr=_RATE, momentum=0.9)
        self.losses: list[float] = []

    def forward(self) -> Tensor:
        images, labels = self.batches[len(self.losses) % len(self.batches)]
        torch.manual_seed(self.seed + len(self.losses))
        return F.cross_entropy(self.network(images), labels)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.losses.append(loss.item())


def saved_bytes(network: Network, images: Tensor) -> int:
    """Bytes of the distinct storages that one forward saves for backward, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = network(images)
    del kept
    return sum(found.values())


def bare(network: Network) -> Network:
    """A copy without batch norm layers and activations; what it computes is of no use, how long it takes is."""
    without = copy.deepcopy(network)
    for module in without.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm | _ACTIVATIONS):
                setattr(module, name, torch.nn.Identity())
    return without


def measure(
    workload: Workload,
    convert: Convert,
    *,
    rounds: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    networks: Mapping[str, Callable[[], Network]] = NETWORKS,
) -> dict[str, Any]:
    """Times, losses and saved bytes of both networks, and whether the losses agree; then inference of the stock one.

    Raises KeyboardInterrupt where `stop` says so.
    """
    torch.manual_seed(seed)
    layout = LAYOUTS[workload.layout]
    stock = networks[workload.model]().to(memory_format=layout)  # type: ignore[call-overload]
    batches = []
    for _ in range(_BATCHES):
        images = torch.randn(workload.batch, 3, workload.side, workload.side).to(memory_format=layout)
        batches.append((images, torch.randint(CLASSES, (workload.batch,))))
    ours = copy.deepcopy(stock)
    conversion = convert(ours)
    saved = {
        name: saved_bytes(copy.deepcopy(network).train(), batches[0][0])
        for name, network in (("stock", stock), ("ours", ours))
    }
    last_digit = 1 + torch.finfo(torch.float32).eps
    nudged = [(images * last_digit, labels) for images, labels in batches]
    sides = {
        "nudged": Training(copy.deepcopy(stock), nudged, seed),
        "stock": Training(stock, batches, seed),
        "ours": Training(ours, batches, seed),
        "bare": Training(bare(stock), batches, seed),
    }
    samples = timing.interleaved(sides, train=True, seconds=0.0, rounds=rounds, seed=seed, stop=stop)
    stocks, noise = sides["stock"].losses, _largest(sides["nudged"].losses, sides["stock"].losses)
    difference = _largest(sides["ours"].losses, stocks)
    return {
        "model": workload.model,
        "layout": workload.layout,
        "batch": workload.batch,
        "side": workload.side,
        "layers": {
            "all": len(conversion.layers),
            "converted": conversion.converted,
            "fused": conversion.fused,
        },
        "contenders": {name: timing.summary(samples[name], True) for name in ("ours", "stock", "bare")},
        "ratio": {
            part: timing.ratio(getattr(samples["stock"], part), getattr(samples["ours"], part))
            for part in ("whole", "forward", "backward")
        },
        "at_most": timing.ratio(samples["stock"].whole, samples["bare"].whole),
        "saved_bytes": saved,
        "losses": {name: side.losses for name, side in sides.items() if name != "bare"},
        "loss": {
            "steps": len(stocks),
            "difference": difference,
            "noise": noise,
            "agree": agree(difference, noise, stocks),
        },
        "inference": inference.measure(stock, convert, batches[0][0], rounds=rounds, seed=seed, stop=stop),
    }


def agree(difference: float, noise: float, losses: list[float]) -> bool:
    """Whether losses that differ by so much are the same but for rounding: some ten times what one last digit does."""
    limit = _MORE_THAN_NOISE * noise + _ROUNDING * max(map(abs, losses))
    return math.isfinite(difference) and difference <= limit


def _largest(some: list[float], others: list[float]) -> float:
    """The largest difference; infinite where a loss is no number, which no tolerance allows."""
    differences = [abs(a - b) for a, b in zip(some, others, strict=True)]
    return max(d if math.isfinite(d) else math.inf for d in differences)
