"""Time whole training steps: a network with torch.nn's layers, and the same network after `batchnorm.convert`.

A step is forward, cross-entropy, backward and SGD with momentum 0.9, on random inputs. All contenders start from the
same state and see the same batches, and their steps are interleaved: the losses can be compared step by step. Dropout
is off, since torch.compile draws other random numbers than eager PyTorch.

    stock          torch.nn's layers
    ours           the converted network
    ours unfused   converted with fuse=False: each layer apart from its activation
    compile        stock through torch.compile
    ours compiled  the converted network through torch.compile
    bare           stock without its batch norm layers and activations: no layer could make a step faster than that
    nudged         stock on inputs whose last digit is changed. Training amplifies rounding; this is how much

A contender whose losses differ from stock's by more than rounding explains is not reported as a time, nor is one that
torch.compile cannot compile: `excluded` says why.

    saved bytes    what forward saves for backward, by `batchnorm.memory`

Inference is timed as well: the stock network, the converted one, the folded one (`batchnorm.fold`), the folded one as
oneDNN primitives (`batchnorm.to_onednn`) where that changes anything, and the folded one through torch.compile. All
have the weights and statistics of a few training steps, and read the same inputs. None is timed if the outputs of one
differ from stock's by more than a fold may change them. A fold leaves the layers that it cannot fold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.bench import timing
from batchnorm.bench.contenders import Contender, ForwardOnly, first_line
from batchnorm.bench.networks import LAYOUTS, MODELS, Model
from batchnorm.saved_tensors.memory import memory
from batchnorm.surgery._folding.trials import difference
from batchnorm.surgery.convert import convert
from batchnorm.surgery.fold import Folding, fold
from batchnorm.surgery.to_onednn import to_onednn

Network = torch.nn.Module
Convert = Callable[..., Any]
"""`batchnorm.convert`, or a stand-in with its parameters."""
COMPILED = ("compile", "ours compiled")
STEPS = 21
_BATCHES = 4
_MORE_THAN_NOISE = 10
_ROUNDING = 1e-5
_FALL = 1e-4
"""How much of the loss the first step takes away, by the choice of the rate.

With batch norm and random weights the first layer's gradient can be so steep (its norm is some hundreds) that at usual
rates one changed last digit parts the losses within a few steps. Like this they fall visibly, and can be compared.
"""
_ACTIVATIONS = torch.nn.ReLU | torch.nn.ReLU6 | torch.nn.SiLU | torch.nn.Hardswish | torch.nn.LeakyReLU
_MORE_ACTIVATIONS = "transformers.activations"
"""The module whose classes are activations, too."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A network by name, in a layout, on batches of a shape; bfloat16 is by autocast, on float32 parameters."""

    model: str
    layout: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What `--filter` searches."""
        dtype = [] if self.dtype == "float32" else [self.dtype]
        return " ".join((self.model, self.layout, *dtype, "x".join(map(str, self.shape))))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


def workloads(quick: bool, device: str = "cpu") -> list[Workload]:
    """What `--models` measures; on a GPU, networks as they are trained there."""
    if device == "cuda":
        shape = (32 if quick else 256, 3, 224, 224)
        names = ("ResNet-50", "MobileNetV2")
        return [Workload(name, "channels_last", shape, "bfloat16", device) for name in names]
    return [
        Workload(name, layout, model.quick if quick else model.shape)
        for name, model in MODELS.items()
        for layout in model.layouts
    ]


class Training:
    """One network in training, timed as a contender: forward computes the loss, backward does the rest of the step."""

    def __init__(
        self,
        network: Network,
        batches: list[tuple[Tensor, Tensor]],
        mode: Callable[[], AbstractContextManager[object]] = nullcontext,
        rate: float = 1e-8,
    ) -> None:
        self.network, self.batches = network.train(), batches
        self.optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
        self.mode = mode
        self._losses: list[Tensor] = []

    @property
    def losses(self) -> list[float]:
        """The loss of each step so far. Reading it within a step would wait for the device."""
        return [loss.item() for loss in self._losses]

    def forward(self) -> Tensor:
        """Compute the loss of the next batch."""
        images, labels = self.batches[len(self._losses) % len(self.batches)]
        with self.mode():
            return F.cross_entropy(self.network(images), labels)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, take a step of the optimizer and store the loss."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._losses.append(loss.detach())


def bare(network: Network) -> Network:
    """A copy without batch norm layers and activations, to measure the time of everything else."""
    without = copy.deepcopy(network)
    for module in without.modules():
        for name, child in module.named_children():
            norm = isinstance(child, torch.nn.modules.batchnorm._BatchNorm)
            if norm or isinstance(child, _ACTIVATIONS) or type(child).__module__ == _MORE_ACTIVATIONS:
                setattr(module, name, torch.nn.Identity())
    return without


def compiled(network: Network) -> Network:
    """A copy through torch.compile."""
    return torch.compile(copy.deepcopy(network))  # type: ignore[return-value]


def measure(
    workload: Workload,
    convert: Convert = convert,
    *,
    rounds: int,
    seed: int,
    compile: bool = False,
    stop: Callable[[], bool] = lambda: False,
    networks: Mapping[str, Model] = MODELS,
) -> dict[str, Any]:
    """Times, losses and saved bytes of a network's contenders; on the CPU inference, too.

    ratios      the time of stock over that of each contender, round by round
    at_most     the same over that of bare
    gain_share  how much of what is possible ours gains: (ours - 1)/(at_most - 1); None where that is within noise

    Raises KeyboardInterrupt when `stop` returns True.
    """
    torch.manual_seed(seed)
    model, mode = networks[workload.model], workload.autocast
    # All contenders are copies of it, without dropout.
    stock = model.build().to(device=workload.device, memory_format=LAYOUTS[workload.layout])  # type: ignore[call-overload]
    for module in stock.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    batches = _batches(workload, stock, model.classes)
    ours, unfused = copy.deepcopy(stock), copy.deepcopy(stock)
    conversion = convert(ours)
    convert(unfused, fuse=False)
    with mode():
        both = {"stock": stock, "ours": ours}
        saved = {name: memory(net.train(), batches[0][0]).total for name, net in both.items()}
    timed = {**both, "ours unfused": unfused, "bare": bare(stock)}
    if compile:
        torch._dynamo.reset()  # networks do not share guards
        timed |= {"compile": compiled(stock), "ours compiled": compiled(ours)}
    last_digit = 1 + torch.finfo(getattr(torch, workload.dtype)).eps
    nudged = [(inputs * last_digit, labels) for inputs, labels in batches]
    rate = _rate(Training(copy.deepcopy(stock), batches, mode, rate=0.0))
    sides = {name: Training(network, batches, mode, rate) for name, network in timed.items()}
    sides["nudged"] = Training(copy.deepcopy(stock), nudged, mode, rate)
    excluded = _first_steps(sides, stop)
    samples = timing.interleaved(
        sides, seconds=0.0, rounds=rounds, seed=seed, stop=stop, clock=timing.clock_of(workload.device), calls=1
    )
    losses = {name: side.losses for name, side in sides.items() if name != "bare"}
    loss = _compared(losses)
    excluded |= {
        name: f"its losses differ by {loss['difference'][name]:.0e}, and by {loss['noise']:.0e} from rounding"
        for name, good in loss["agree"].items()
        if not good
    }
    shown = {name: one for name, one in samples.items() if name not in excluded and name != "nudged"}
    faster = {
        name: timing.ratios(samples["stock"], one) for name, one in shown.items() if name not in ("stock", "bare")
    }
    at_most = timing.ratio(samples["stock"].whole, samples["bare"].whole)
    result = {
        **{name: value for name, value in asdict(workload).items() if name != "device"},
        "layers": {"all": len(conversion.layers), "converted": conversion.converted, "fused": conversion.fused},
        "contenders": {name: timing.summary(one) for name, one in shown.items()},
        "excluded": excluded,
        "ratios": faster,
        "at_most": at_most,
        "gain_share": gain_share(faster["ours"]["whole"], at_most) if "ours" in faster else None,
        "saved_bytes": saved,
        "losses": losses,
        "loss": loss,
    }
    if workload.device == "cpu":
        result["inference"] = measure_inference(
            stock, convert, batches[0][0], rounds=rounds, seed=seed, compile=compile, stop=stop
        )
    return result


def _batches(workload: Workload, network: Network, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Random inputs, and labels of the shape that the network's output asks for: one for each sample, or each voxel."""
    count, layout = workload.shape[0], LAYOUTS[workload.layout]
    inputs = [torch.randn(workload.shape).to(memory_format=layout).to(workload.device) for _ in range(_BATCHES)]
    with torch.no_grad(), workload.autocast():
        places = copy.deepcopy(network).eval()(inputs[0][:1]).shape[2:]
    return [(one, torch.randint(classes, (count, *places)).to(workload.device)) for one in inputs]


def _rate(training: Training) -> float:
    """The rate of learning with which the first step lowers the loss by `_FALL` of it, to first order."""
    training.backward(training.forward())
    gradients = (p.grad for p in training.network.parameters() if p.grad is not None)
    return _FALL * training.losses[0] / max(sum(float(g.square().sum()) for g in gradients), 1e-30)


def _first_steps(sides: dict[str, Training], stop: Callable[[], bool]) -> dict[str, str]:
    """One step of each before the clock runs, in which torch.compile compiles. Remove what it cannot, and say why."""
    failed = {}
    for name, side in list(sides.items()):
        if stop():
            raise KeyboardInterrupt
        try:
            side.backward(side.forward())
        except Exception as error:
            if name not in COMPILED:
                raise
            failed[name] = f"torch.compile failed: {first_line(error)}"
            del sides[name]
    return failed


def _compared(losses: Mapping[str, list[float]]) -> dict[str, Any]:
    """The largest difference of each contender's losses from stock's, and whether rounding explains it."""
    stock = losses["stock"]
    apart = {name: _largest(one, stock) for name, one in losses.items() if name != "stock"}
    noise = apart.pop("nudged")
    agreeing = {name: agree(one, noise, stock) for name, one in apart.items()}
    return {"steps": len(stock), "noise": noise, "difference": apart, "agree": agreeing}


def gain_share(faster: Mapping[str, float], at_most: Mapping[str, float]) -> float | None:
    """How much of the possible gain a ratio reaches, by medians; None if stock may be as fast as the bare network."""
    return (faster["median"] - 1) / (at_most["median"] - 1) if at_most["q1"] > 1 else None


def agree(difference: float, noise: float, losses: list[float]) -> bool:
    """Whether rounding explains a difference of losses: up to ten times the effect of one changed last digit."""
    limit = _MORE_THAN_NOISE * noise + _ROUNDING * max(map(abs, losses))
    return math.isfinite(difference) and difference <= limit


def _largest(some: list[float], others: list[float]) -> float:
    """The largest difference; infinite if a loss is not finite, which no tolerance allows."""
    differences = [abs(a - b) for a, b in zip(some, others, strict=True)]
    return max(d if math.isfinite(d) else math.inf for d in differences)


def _compiled_folded(folded: Network, inputs: Tensor, expected: Tensor, bound: float) -> dict[str, Network]:
    """The folded network through torch.compile, if that compiles it and its outputs are right."""
    fast = compiled(folded)
    try:
        distance = difference([expected], [fast(inputs)])
    except Exception:  # the compiler can fail in any way
        return {}
    return {"folded, compiled": fast} if distance is not None and distance.max <= bound else {}


@torch.no_grad()
def measure_inference(
    stock: Network,
    convert: Convert,
    inputs: Tensor,
    *,
    rounds: int,
    seed: int,
    compile: bool = False,
    stop: Callable[[], bool] = lambda: False,
    fold: Callable[[Network, Tensor], Folding] = fold,
) -> dict[str, Any]:
    """Times of all contenders, interleaved, or the errors. `stock` is only read, and put in eval mode.

    folded     the number of layers that are folded; the others run as before, and `left` says why the first one does
    ratio      the time of each contender over that of folded, round by round
    """
    ours, folded = copy.deepcopy(stock.eval()), copy.deepcopy(stock.eval())
    convert(ours)
    folding = fold(folded, inputs)
    networks = {"stock": stock, "ours": ours.eval(), "folded": folded.eval()}
    expected, moved, errors = stock(inputs), {}, []
    for name, network in networks.items():
        distance = difference([expected], [network(inputs)])
        moved[name] = math.inf if distance is None else distance.max
        if not moved[name] <= folding.bound:
            errors.append(f"{name}: the outputs differ by {moved[name]:.1e} of their largest, over {folding.bound:.1g}")
    result: dict[str, Any] = {
        "gate": {"passed": not errors, "errors": errors},
        "folded": len(folding.layers),
        "left": folding.skipped[0].why if folding.skipped else None,
        "difference": moved,
    }
    if errors:
        return result
    packed = copy.deepcopy(folded)
    if to_onednn(packed, inputs).layers:  # which compares the outputs itself
        networks["one primitive"] = packed
    if compile:
        networks |= _compiled_folded(folded, inputs, expected, folding.bound)
    sides: dict[str, Contender] = {name: ForwardOnly(partial(network, inputs)) for name, network in networks.items()}
    samples = timing.interleaved(sides, seconds=0.0, rounds=rounds, seed=seed, stop=stop)
    slower = {name: timing.ratio(one.whole, samples["folded"].whole) for name, one in samples.items()}
    del slower["folded"]
    return result | {
        "contenders": {name: timing.summary(one) for name, one in samples.items()},
        "ratio": slower,
    }
