"""The layers of a model that can be watched, a tap on each, and what they leave at one step (docs/run-format.md).

A tap is put on for a recorded step and taken off after it: a step that is not recorded runs as if nobody watched, with
no hook, no class and no tap on any layer.

A step may have several forwards of a layer (accumulated gradients, a shared layer). Their distributions are pooled by
`Moments`, their gradient sums added. Forwards without a backward do not count where others of the step have one: with
activation checkpointing, each forward runs twice and one of the two is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm import quantities as q
from batchnorm.kernels.contract import Pass, Tap
from batchnorm.moments import Moments
from batchnorm.recording._recorder.observed import OBSERVED, STOCK
from batchnorm.restoring import unwrapped
from batchnorm.runs.run import RunError
from batchnorm.variants import DOMAINS, ONE_SET

Array = NDArray[np.float64]
Columns = dict[str, Array]

# What stands between a parameter and the operator that uses it, or between that operator and the norm, unit by unit.
_PASSED_THROUGH = frozenset(
    {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0"}
)
_PRODUCERS = ("ConvolutionBackward", "AddmmBackward", "MmBackward", "LinearBackward")
_DEPTH = 6

# The norms of all weights cost a pass over them, more than all else together: not in each step of a dense schedule.
_NORMS_APART = 10
_NORMS_SPACED = 1.02


class Producer(NamedTuple):
    """The weight below a norm: the model's parameter, its name, and the axis of it that counts the units."""

    weight: nn.Parameter
    name: str
    axis: int

    def unit_norms(self) -> Tensor:
        """||w|| of each unit, in float32 at least."""
        weight = self.weight.detach()
        others = [axis for axis in range(weight.dim()) if axis != self.axis]
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dim=others, dtype=wide)  # type: ignore[no-any-return]


def producer(x: Tensor, units: int, parameters: Mapping[int, str]) -> Producer | None:
    """What made x (N, units, *), where that is one operator with one of the parameters (names by id); else None."""
    node = _through(x.grad_fn)
    if node is None or not node.name().startswith(_PRODUCERS):
        return None
    leaves = [getattr(_through(above), "variable", None) for above, _ in node.next_functions]
    found = [leaf for leaf in leaves if leaf is not None and id(leaf) in parameters and leaf.dim() >= 2]
    axis = 1 if getattr(node, "_saved_transposed", False) else 0
    if len(found) != 1 or found[0].shape[axis] != units:  # a grouped transposed convolution counts units otherwise
        return None
    return Producer(found[0], parameters[id(found[0])], axis)


def _through(node: Any) -> Any:
    """Past what only copies or turns a tensor."""
    for _ in range(_DEPTH):
        if node is None or node.name() not in _PASSED_THROUGH:
            return node
        node = node.next_functions[0][0]
    return node


_TAKEN: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
"""The layers that are watched, each with a mark of the attachment that watches it."""


@dataclass(slots=True, eq=False)
class Watched:
    """A layer, the class that listens where the layer's own does not, and the weight below it where known."""

    name: str
    aliases: tuple[str, ...]
    layer: _BatchNorm
    stock: type[nn.Module]
    observed: type[nn.Module] | None
    tap: Tap
    producer: Producer | None = None

    @property
    def units(self) -> int:
        return int(self.layer.num_features)

    @property
    def eps(self) -> float:
        return float(self.layer.__dict__["eps"])

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        layer = self.layer
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "class": self.stock.__name__,
            "units": self.units,
            "eps": self.eps,
            "momentum": None if layer.momentum is None else float(layer.momentum),
            "affine": layer.weight is not None,
            "act": getattr(layer, "act", None),
            "ours": self.observed is None,
            "producer": None if self.producer is None else self.producer.name,
        }


class Seen(NamedTuple):
    """What a part of a step has left: the passes of each layer, what the layers hold, and the rates where read."""

    passes: list[list[Pass]]
    state: State
    rates: Columns | None


class Attachment:
    """Every layer of a model that can be watched; `skipped` are those that cannot, with the reason."""

    def __init__(self, model: nn.Module) -> None:
        self.watched: list[Watched] = []
        self.skipped: list[dict[str, str]] = []
        names: dict[nn.Module, list[str]] = {}
        inner = unwrapped(model)
        for name, module in inner.named_modules(remove_duplicate=False):
            if isinstance(module, _BatchNorm):
                names.setdefault(module, []).append(name)
        for module, found in names.items():
            why = _why_not(module)
            if why is None:
                stock = STOCK.get(type(module), type(module))
                watched = Watched(found[0], tuple(found[1:]), module, stock, OBSERVED.get(stock), Tap())  # type: ignore[arg-type]
                self.watched.append(watched)
            else:
                self.skipped.append({"name": found[0], "class": type(module).__name__, "why": why})
        parameters = {id(p): name for name, p in inner.named_parameters()}
        for watched in self.watched:
            watched.tap.look = partial(_look, watched, parameters)
        self.armed = False
        self.seen: list[Seen] = []
        self._mark = object()
        self._norms_due = 0

    def arm(self, wanted: bool) -> None:
        """Listen, or do not."""
        if wanted is self.armed:
            return
        for watched in self.watched:
            layer = watched.layer
            if wanted:
                layer.__dict__["_tap"] = watched.tap
            else:
                layer.__dict__.pop("_tap", None)
            now, then = (watched.stock, watched.observed) if wanted else (watched.observed, watched.stock)
            if watched.observed is not None and type(layer) is now:
                layer.__class__ = then  # type: ignore[assignment]
        self.armed = wanted

    def take(self) -> None:
        """Mark the layers as watched. Raises RunError where another recording watches one of them.

        Other threads do the same with their layers: setdefault is one step, and nothing here iterates over `_TAKEN`.
        """
        for watched in self.watched:
            if _TAKEN.setdefault(watched.layer, self._mark) is not self._mark:
                self._give_back()
                raise RunError("this model is being watched already: close the other Run first")

    def release(self) -> None:
        """Leave the layers as they were."""
        self.arm(False)
        self._give_back()

    def _give_back(self) -> None:
        for watched in self.watched:
            if _TAKEN.get(watched.layer) is self._mark:
                del _TAKEN[watched.layer]

    def facts(self) -> list[dict[str, Any]]:
        """What run.json says of the layers."""
        return [watched.facts() for watched in self.watched]

    def see(self, step: int | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Keep what the step has left since the last call, with the gamma and beta that it used.

        The rates are not read where `step` is None: it is not known yet what a step is.
        """
        rates = None if step is None else self._rates(step, optimizer)
        self.seen.append(Seen(self._passes(), state(self.watched), rates))

    def pooled(self) -> Seen | None:
        """All that was seen as one step, with what came later; None where no layer ran.

        More passes may come inside the optimizer's step: closures run forwards there, of Lightning's Trainer all.
        """
        seen, self.seen = self.seen, []
        if not seen:
            return None
        late, (_, held, rates) = self._passes(), seen[-1]
        if any(late):
            held = state(self.watched)._replace(gamma=held.gamma, beta=held.beta)
        parts = zip(*(each.passes for each in seen), late, strict=True)
        passes = [[passed for part in of_layer for passed in part] for of_layer in parts]
        return Seen(passes, held, rates) if any(passes) else None

    def columns(self, seen: Seen | None = None, step: int | None = None) -> Columns:
        """All columns of a snapshot; by default of the layers as they are, without a batch and a gradient."""
        passes, held, rates = seen or Seen([[] for _ in self.watched], state(self.watched), None)
        rates = self._rates(step, None) if rates is None else rates
        return held._asdict() | sums(self.watched, passes) | rates

    def _passes(self) -> list[list[Pass]]:
        return [watched.tap.take() for watched in self.watched]

    @torch.no_grad()
    def _rates(self, step: int | None, optimizer: torch.optim.Optimizer | None) -> Columns:
        """`lr` and `weight_norm` of the weights that produce the units; NaN where they are not known.

        The norms are read now and then; `step` None: not this time.
        """
        norms = step is not None and step >= self._norms_due
        if step is not None and norms:
            self._norms_due = max(step + _NORMS_APART, int(_NORMS_SPACED * step))
        groups = [] if optimizer is None else optimizer.param_groups
        by_parameter = {id(p): group.get("lr") for group in groups for p in group["params"]}
        found: list[tuple[Tensor | None, int, float]] = []
        lrs = []
        for watched in self.watched:
            below = watched.producer
            found.append((below.unit_norms() if norms and below is not None else None, watched.units, np.nan))
            lr = None if below is None else by_parameter.get(id(below.weight))
            lrs.append(np.nan if lr is None else float(lr))
        return {"weight_norm": _joined(found), "lr": np.repeat(lrs, [watched.units for watched in self.watched])}


def _look(watched: Watched, parameters: Mapping[int, str], x: Tensor) -> None:
    """Look where the layer's input comes from, once, in the first forward that knows."""
    if x.grad_fn is not None:
        watched.tap.look = None
        watched.producer = producer(x, watched.units, parameters)


def _why_not(module: nn.Module) -> str | None:
    cls = type(module)
    if cls in OBSERVED or cls in STOCK or cls in ONE_SET:
        return None
    if isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if getattr(cls, "_batchnorm_frozen", False):
        return "frozen: it does not normalize by the batch's statistics"
    if isinstance(module, nn.SyncBatchNorm):
        return "torch.nn.SyncBatchNorm does not tell: batchnorm.sync(model) makes it one that does"
    if cls in DOMAINS:
        return "it has statistics for each of several domains, and a recording has room for one"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs its own compiled code"
    return f"a subclass of {next(b.__name__ for b in cls.__mro__[1:] if b.__module__.startswith('torch.'))}"


# --- one step's numbers, of all layers and units ----------------------------------------------------------------------


class State(NamedTuple):
    """What the layers hold at one moment, all units in a row: NaN where a layer has no such vector."""

    gamma: Array
    beta: Array
    running_mean: Array
    running_var: Array


@torch.no_grad()
def state(layers: Sequence[Watched]) -> State:
    """Copies of gamma, beta and the running statistics."""
    return State(
        *(
            _joined([(_vector(watched, name), watched.units, default) for watched in layers])
            for name, default in (("weight", 1.0), ("bias", 0.0), ("running_mean", np.nan), ("running_var", np.nan))
        )
    )


def sums(layers: Sequence[Watched], passes: Sequence[Sequence[Pass]]) -> Columns:
    """What the step's passes, a list for each layer, give."""
    counted = [[passed for passed in found if passed.grads] or found for found in passes]
    if all(len(found) == 1 and len(found[0].grads) == 1 for found in counted):
        return _of_single_passes(layers, [found[0] for found in counted])
    parts = [_of_layer(watched, found) for watched, found in zip(layers, counted, strict=True)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _of_single_passes(layers: Sequence[Watched], passes: Sequence[Pass]) -> Columns:
    """The usual case, of all layers at once: one forward and one backward each."""
    sizes = [watched.units for watched in layers]

    def joined(pick: Callable[[Pass], Tensor | None]) -> Array:
        return _joined([(pick(passed), units, np.nan) for passed, units in zip(passes, sizes, strict=True)])

    count = np.repeat([float(passed.count) for passed in passes], sizes)
    eps = np.repeat([watched.eps for watched in layers], sizes)
    mean, var = joined(lambda passed: passed.mean), joined(lambda passed: passed.var)
    dgamma, dbeta = joined(lambda passed: passed.grads[0].dgamma), joined(lambda passed: passed.grads[0].dbeta)
    unknown = np.full(len(mean), np.nan)
    return {
        "count": count,
        "batches": np.ones(len(mean)),
        "mean": mean,
        "var": var,
        "dgamma": dgamma,
        "dbeta": dbeta,
        "energy": joined(lambda passed: passed.grads[0].energy),
        "diverted": _diverted(dgamma, dbeta, var, eps, count),
        "noise_mean": unknown,
        "noise_log_scale": unknown,
    }


def _of_layer(watched: Watched, passes: Sequence[Pass]) -> Columns:
    unknown = np.full(watched.units, np.nan)
    columns = dict.fromkeys(
        ("mean", "var", "dgamma", "dbeta", "energy", "diverted", "noise_mean", "noise_log_scale"), unknown
    )
    columns |= {"count": np.zeros(watched.units), "batches": np.full(watched.units, float(len(passes)))}
    if not passes:
        return columns
    means, variances = ([_f64(getattr(passed, name)) for passed in passes] for name in ("mean", "var"))
    counts = [int(passed.count) for passed in passes]
    parts = [Moments.of_variance(*part) for part in zip(counts, means, variances, strict=True)]
    pooled = parts[0].merge(*parts[1:])
    noise = q.batch_noise(means, variances, watched.eps)
    columns |= {"count": np.full(watched.units, float(pooled.count)), "mean": pooled.mean, "var": pooled.var}
    columns |= {"noise_mean": noise.mean, "noise_log_scale": noise.log_scale}
    backwards = [
        (_f64(grads.dgamma), _f64(grads.dbeta), _f64(grads.energy), var, count)
        for passed, var, count in zip(passes, variances, counts, strict=True)
        for grads in passed.grads
    ]
    if backwards:
        dgammas, dbetas, energies, *_ = zip(*backwards, strict=True)
        diverted = [_diverted(dgamma, dbeta, var, watched.eps, count) for dgamma, dbeta, _, var, count in backwards]
        found = {"dgamma": dgammas, "dbeta": dbetas, "energy": energies, "diverted": diverted}
        columns |= {name: np.sum(values, axis=0) for name, values in found.items()}
    return columns


def _diverted(dgamma: Array, dbeta: Array, var: Array, eps: float | Array, m: float | Array) -> Array:
    """`gradient_diverted` times Σg²: what can be added up over backwards."""
    ones = np.ones_like(dgamma)
    return q.gradient_diverted(dgamma, dbeta, ones, var, eps, m)


def _vector(watched: Watched, name: str) -> Tensor | None:
    """None where the layer has none; empty where this process does not hold it whole."""
    layer = watched.layer
    found: Tensor | None = layer._parameters.get(name)
    if found is None:
        found = layer._buffers.get(name)
    return torch.empty(0) if found is not None and hasattr(found, "full_tensor") else found


def _joined(vectors: Sequence[tuple[Tensor | None, int, float]]) -> Array:
    """All units in a row, copied: a default where a layer has no vector, NaN where this process does not hold it whole.

    One transfer for each run of layers on one device.
    """
    device = next((vector.device for vector, _, _ in vectors if vector is not None), None)
    whole = [
        torch.full((units,), default if vector is None else np.nan, device=device)
        if vector is None or vector.numel() != units
        else vector.detach()
        for vector, units, default in vectors
    ]
    runs = groupby(whole, lambda vector: vector.device)
    return np.concatenate([_f64(torch.cat(list(run))) for _, run in runs])


def _f64(vector: Tensor | None) -> Array:
    assert vector is not None, "the sums of a tapped layer hold the energy"
    values: Array = vector.detach().cpu().to(torch.float64, copy=True).numpy()
    return values
