"""Time whole training steps: a network with torch.nn's layers, and the same network after `batchnorm.convert`.

Inference is timed as well: the stock network, the converted one, and the folded one (`batchnorm.fold`). All three have
the weights and statistics of a few training steps, and read the same images. A network is not timed if its outputs
differ from the stock one's by more than a fold may change them, or if `fold` skipped a layer.

A step is forward, cross-entropy, backward and SGD with momentum 0.9, on random images. Both networks start from the
same state and see the same batches, with the same random numbers for dropout, and their steps are interleaved: the
losses can be compared step by step. Training amplifies rounding, so the expected difference is measured too: `nudged`
is the stock network on images whose last digit is changed. `bare` is the stock network without its batch norm layers
and activations: no layer could make a step faster than that.

    saved bytes    what forward saves for backward: the distinct storages that autograd saves, without parameters and
                   buffers; it is the peak memory of the activations
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.bench import timing
from batchnorm.bench.contenders import Contender, ForwardOnly
from batchnorm.bench.record import BenchError
from batchnorm.surgery._folding.trials import difference
from batchnorm.surgery.convert import convert
from batchnorm.surgery.fold import Folding, fold
from batchnorm.surgery.to_onednn import to_onednn

Network = torch.nn.Module
Convert = Callable[[Network], Any]
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
    """A network by name, in a layout, on batches of square images; bfloat16 is by autocast, on float32 parameters."""

    model: str
    layout: str
    batch: int = 16
    side: int = 224
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What `--filter` searches."""
        size = f"{self.batch}x3x{self.side}x{self.side}"
        return " ".join((self.model, self.layout, *([] if self.dtype == "float32" else [self.dtype]), size))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


class _Logits(torch.nn.Module):
    """A classifier of transformers' that returns its logits alone."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=images).logits
        return logits


def from_transformers(name: str, **config: Any) -> Callable[[], Network]:
    """A function that builds a network of the package transformers. It raises BenchError without the package."""

    def build() -> Network:
        try:
            package = import_module("transformers")
        except ImportError as error:
            raise BenchError('models=True needs the package transformers: pip install "batchnorm[bench]"') from error
        described = getattr(package, f"{name}Config")(num_labels=CLASSES, **config)
        network = _Logits(getattr(package, f"{name}ForImageClassification")(described))
        for module in network.modules():
            # Some start with weights and gammas so small that the signal vanishes over the layers.
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


def workloads(quick: bool, device: str = "cpu") -> list[Workload]:
    """What `--models` measures; on a GPU, networks as they are trained there."""
    if device == "cuda":
        batch = 32 if quick else 256
        names = ("ResNet-50", "MobileNetV2")
        return [Workload(name, "channels_last", batch, dtype="bfloat16", device=device) for name in names]
    batch, side = (8, 96) if quick else (16, 224)
    return [Workload(model, layout, batch, side) for model in NETWORKS for layout in LAYOUTS]


class Training:
    """One network in training, timed as a contender: forward computes the loss, backward does the rest of the step."""

    def __init__(
        self,
        network: Network,
        batches: list[tuple[Tensor, Tensor]],
        seed: int,
        mode: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.network, self.batches, self.seed = network.train(), batches, seed
        self.optimizer = torch.optim.SGD(network.parameters(), lr=_RATE, momentum=0.9)
        self.mode = mode
        self._losses: list[Tensor] = []

    @property
    def losses(self) -> list[float]:
        """The loss of each step so far. Reading it within a step would wait for the device."""
        return [loss.item() for loss in self._losses]

    def forward(self) -> Tensor:
        """Compute the loss of the next batch."""
        images, labels = self.batches[len(self._losses) % len(self.batches)]
        torch.manual_seed(self.seed + len(self._losses))
        with self.mode():
            return F.cross_entropy(self.network(images), labels)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, take a step of the optimizer and store the loss."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._losses.append(loss.detach())


def saved_bytes(network: Network, images: Tensor) -> int:
    """Bytes of the distinct storages that one forward saves for backward, without parameters and buffers."""
    parameters = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(images)
    del output
    return sum(saved.values())


def bare(network: Network) -> Network:
    """A copy without batch norm layers and activations, to measure the time of everything else."""
    without = copy.deepcopy(network)
    for module in without.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm | _ACTIVATIONS):
                setattr(module, name, torch.nn.Identity())
    return without


def measure(
    workload: Workload,
    convert: Convert = convert,
    *,
    rounds: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    networks: Mapping[str, Callable[[], Network]] = NETWORKS,
) -> dict[str, Any]:
    """Times, losses and saved bytes of both networks, and whether the losses agree; on the CPU inference, too.

    Raises KeyboardInterrupt when `stop` returns True.
    """
    torch.manual_seed(seed)
    layout = LAYOUTS[workload.layout]
    device, mode = workload.device, workload.autocast
    stock = networks[workload.model]().to(device=device, memory_format=layout)  # type: ignore[call-overload]
    batches = []
    for _ in range(_BATCHES):
        images = torch.randn(workload.batch, 3, workload.side, workload.side).to(memory_format=layout)
        batches.append((images.to(device), torch.randint(CLASSES, (workload.batch,)).to(device)))
    ours = copy.deepcopy(stock)
    conversion = convert(ours)
    with mode():
        both = {"stock": stock, "ours": ours}
        saved = {name: saved_bytes(copy.deepcopy(net).train(), batches[0][0]) for name, net in both.items()}
    last_digit = 1 + torch.finfo(getattr(torch, workload.dtype)).eps
    nudged = [(images * last_digit, labels) for images, labels in batches]
    sides = {
        "nudged": Training(copy.deepcopy(stock), nudged, seed, mode),
        "stock": Training(stock, batches, seed, mode),
        "ours": Training(ours, batches, seed, mode),
        "bare": Training(bare(stock), batches, seed, mode),
    }
    samples = timing.interleaved(sides, seconds=0.0, rounds=rounds, seed=seed, stop=stop, clock=timing.clock_of(device))
    losses = {name: side.losses for name, side in sides.items() if name != "bare"}
    apart, noise = (_largest(losses[name], losses["stock"]) for name in ("ours", "nudged"))
    result = {
        **{name: value for name, value in asdict(workload).items() if name != "device"},
        "layers": {"all": len(conversion.layers), "converted": conversion.converted, "fused": conversion.fused},
        "contenders": {name: timing.summary(samples[name]) for name in ("ours", "stock", "bare")},
        "ratio": timing.ratios(samples["stock"], samples["ours"]),
        "at_most": timing.ratio(samples["stock"].whole, samples["bare"].whole),
        "saved_bytes": saved,
        "losses": losses,
        "loss": {
            "steps": len(losses["stock"]),
            "difference": apart,
            "noise": noise,
            "agree": agree(apart, noise, losses["stock"]),
        },
    }
    if device == "cpu":
        result["inference"] = measure_inference(stock, convert, batches[0][0], rounds=rounds, seed=seed, stop=stop)
    return result


def agree(difference: float, noise: float, losses: list[float]) -> bool:
    """Whether rounding explains a difference of losses: up to ten times the effect of one changed last digit."""
    limit = _MORE_THAN_NOISE * noise + _ROUNDING * max(map(abs, losses))
    return math.isfinite(difference) and difference <= limit


def _largest(some: list[float], others: list[float]) -> float:
    """The largest difference; infinite if a loss is not finite, which no tolerance allows."""
    differences = [abs(a - b) for a, b in zip(some, others, strict=True)]
    return max(d if math.isfinite(d) else math.inf for d in differences)


@torch.no_grad()
def measure_inference(
    stock: Network,
    convert: Convert,
    images: Tensor,
    *,
    rounds: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    fold: Callable[[Network, Tensor], Folding] = fold,
) -> dict[str, Any]:
    """Times of all, interleaved, or the errors. `stock` is only read, and put in eval mode.

    one primitive  the folded network after `to_onednn`, where that changes anything
    ratio          the time of each of the others over that of folded, round by round
    """
    ours, folded = copy.deepcopy(stock.eval()), copy.deepcopy(stock.eval())
    convert(ours)
    folding = fold(folded, images)
    networks = {"stock": stock, "ours": ours.eval(), "folded": folded.eval()}
    moved, errors = {}, []
    for name in ("ours", "folded"):
        distance = difference([stock(images)], [networks[name](images)])
        moved[name] = math.inf if distance is None else distance.max
        if not moved[name] <= folding.bound:
            errors.append(f"{name}: the outputs differ by {moved[name]:.1e} of their largest, over {folding.bound:.1g}")
    if folding.skipped:
        errors.append(f"folded: {len(folding.skipped)} layers are left, the first one since {folding.skipped[0].why}")
    result: dict[str, Any] = {
        "gate": {"passed": not errors, "errors": errors},
        "folded": len(folding.layers),
        "difference": moved,
    }
    if errors:
        return result
    networks["one primitive"] = copy.deepcopy(folded)
    if not to_onednn(networks["one primitive"], images).layers:  # which compares the outputs itself
        del networks["one primitive"]
    sides: dict[str, Contender] = {name: ForwardOnly(partial(network, images)) for name, network in networks.items()}
    samples = timing.interleaved(sides, seconds=0.0, rounds=rounds, seed=seed, stop=stop)
    return result | {
        "contenders": {name: timing.summary(one) for name, one in samples.items()},
        "ratio": {
            name: timing.ratio(samples[name].whole, samples["folded"].whole) for name in samples if name != "folded"
        },
    }
