"""Taps on the batch norm layers of a model, and the columns of one recorded step (docs/run-format.md).

Taps are attached for a recorded step and removed after it. Other steps run without any class or tap of ours, only with
the hooks that count steps (`recording.steps`).

A step may run a layer several times (gradient accumulation, shared layers). Means and variances are then pooled by
`Moments`; gradient sums are added. Forwards without a backward are ignored if other forwards of the step have one: with
activation checkpointing each forward runs twice, and only one of the two is differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchnorm import quantities as q
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.contract import Pass, Tap
from batchnorm.moments import Moments
from batchnorm.recording._recorder.observed import STOCK, observed_class
from batchnorm.recording._recorder.selecting import is_norm, kind_of_layer, skip_reason
from batchnorm.restoring import unwrapped
from batchnorm.runs.run import RunError
from batchnorm.variants import ONE_SET
from batchnorm.variants.libraries import TORCH, Kind

Array = NDArray[np.float64]
Columns = dict[str, Array]

# Autograd nodes between a parameter and its operator, or that operator and the norm, that keep the units apart.
_VIEWS_AND_COPIES = frozenset(
    {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0"}
)
_PRODUCERS = ("ConvolutionBackward", "AddmmBackward", "MmBackward", "LinearBackward")
_MAX_DEPTH = 6

# Reading the norms of all weights costs more than all else together, so a dense schedule skips them in most steps.
_NORMS_APART = 10
_NORMS_SPACED = 1.02


class Producer(NamedTuple):
    """The weight that produces a norm's input: the parameter, its name, and its axis that counts the units."""

    weight: nn.Parameter
    name: str
    axis: int

    def unit_norms(self) -> Tensor:
        """||w|| of each unit, in float32 at least."""
        weight = self.weight.detach()
        axes = [axis for axis in range(weight.dim()) if axis != self.axis]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dim=axes, dtype=dtype)  # type: ignore[no-any-return]


def find_producer(x: Tensor, units: int, names: Mapping[int, str]) -> Producer | None:
    """The producer of x (N, units, *) if it is one operator with one of the parameters, whose `names` are by id."""
    node = _skip_views(x.grad_fn)
    if node is None or not node.name().startswith(_PRODUCERS):
        return None
    leaves = [getattr(_skip_views(source), "variable", None) for source, _ in node.next_functions]
    weights = [leaf for leaf in leaves if leaf is not None and id(leaf) in names and leaf.dim() >= 2]
    axis = 1 if getattr(node, "_saved_transposed", False) else 0
    if len(weights) != 1 or weights[0].shape[axis] != units:  # grouped transposed convolutions have another layout
        return None
    return Producer(weights[0], names[id(weights[0])], axis)


def _skip_views(node: Any) -> Any:
    for _ in range(_MAX_DEPTH):
        if node is None or node.name() not in _VIEWS_AND_COPIES:
            return node
        node = node.next_functions[0][0]
    return node


_OWNERS: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
"""The owner token of each watched layer's attachment."""


@dataclass(slots=True, eq=False)
class WatchedLayer:
    """A layer with its tap; `observed` is the subclass that reports to it, None for layers of this package."""

    name: str
    aliases: tuple[str, ...]
    layer: nn.Module
    stock: type[nn.Module]
    observed: type[nn.Module] | None
    tap: Tap
    kind: Kind = TORCH
    producer: Producer | None = None

    @property
    def units(self) -> int:
        mean = self.kind.tensor(self.layer, "mean")
        return int(getattr(self.layer, "num_features", 0 if mean is None else mean.numel()))

    @property
    def eps(self) -> float:
        return self.kind.eps_of(self.layer)

    @property
    def act(self) -> tuple[str | None, float]:
        """The name of the activation that the layer itself applies, if it is known, and its slope."""
        if self.kind is TORCH:
            return getattr(self.layer, "act", None), float(getattr(self.layer, "negative_slope", 0.01))
        follows = list(self.kind.follows(self.layer).values())
        names = [
            name for name, row in ACTIVATIONS.items() if [type(one) for one in follows] == [getattr(nn, row.module)]
        ]
        return (names[0], float(getattr(follows[0], "negative_slope", 0.01))) if names else (None, 0.01)

    def look(self, names: Mapping[int, str], x: Tensor) -> None:
        """Find the layer's producer in the first forward that autograd records."""
        if x.grad_fn is not None:
            self.tap.look = None
            self.producer = find_producer(x, self.units, names)

    def facts(self) -> dict[str, Any]:
        """The layer's entry in run.json."""
        layer = self.layer
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "class": self.stock.__name__,
            "units": self.units,
            "eps": self.eps,
            "momentum": None if (momentum := getattr(layer, "momentum", None)) is None else float(momentum),
            "affine": self.kind.tensor(layer, "gamma") is not None,
            "act": self.act[0],
            "ours": self.observed is None,
            "producer": None if self.producer is None else self.producer.name,
        }


class StepData(NamedTuple):
    """Data of a step or of a part of it: the passes of each layer, the layers' vectors, and the rates if read."""

    passes: list[list[Pass]]
    vectors: Columns
    rates: Columns | None


class Attachment:
    """Every layer of a model that can be watched; `skipped` lists the others with the reason."""

    def __init__(self, model: nn.Module, also: Sequence[type[nn.Module]] = ()) -> None:
        self.watched: list[WatchedLayer] = []
        self.skipped: list[dict[str, str]] = []
        names: dict[nn.Module, list[str]] = {}
        inner = unwrapped(model)
        for name, module in inner.named_modules(remove_duplicate=False):
            if is_norm(module, also):
                names.setdefault(module, []).append(name)
        parameters = {id(p): name for name, p in inner.named_parameters()}
        for module, (name, *aliases) in names.items():
            kind = kind_of_layer(module, also)
            reason = skip_reason(module, kind)
            if reason is not None:
                self.skipped.append({"name": name, "class": type(module).__name__, "why": reason})
                continue
            stock: Any = STOCK.get(type(module), type(module))
            observed = None if stock in ONE_SET else observed_class(stock, kind or TORCH)
            watched = WatchedLayer(name, tuple(aliases), module, stock, observed, Tap(), kind or TORCH)
            watched.tap.look = partial(watched.look, parameters)
            self.watched.append(watched)
        self.armed = False
        self.collected: list[StepData] = []
        self._owner = object()
        self._next_norms = 0

    def arm(self, enabled: bool) -> None:
        """Attach the taps, or remove them."""
        if enabled is self.armed:
            return
        for watched in self.watched:
            layer = watched.layer
            if enabled:
                layer.__dict__["_tap"] = watched.tap
            else:
                layer.__dict__.pop("_tap", None)
            old, new = (watched.stock, watched.observed) if enabled else (watched.observed, watched.stock)
            if watched.observed is not None and type(layer) is old:
                layer.__class__ = new  # type: ignore[assignment]
        self.armed = enabled

    def claim(self) -> None:
        """Mark the layers as watched. Raises RunError if another recording watches one of them.

        Other threads claim layers at the same time: setdefault is atomic, and nothing iterates over `_OWNERS`.
        """
        for watched in self.watched:
            if _OWNERS.setdefault(watched.layer, self._owner) is not self._owner:
                self.release()
                raise RunError("this model is being watched already: close the other Run first")

    def release(self) -> None:
        """Restore the layers, and end the claim to them."""
        self.arm(False)
        for watched in self.watched:
            if _OWNERS.get(watched.layer) is self._owner:
                del _OWNERS[watched.layer]

    def facts(self) -> list[dict[str, Any]]:
        """The layers' entries in run.json."""
        return [watched.facts() for watched in self.watched]

    def collect(self, step: int | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Store the passes since the last call, with the gamma and beta that they used.

        If `step` is None, steps are not counted yet, and the rates are not read.
        """
        rates = None if step is None else self._rates(step, optimizer)
        self.collected.append(StepData(self._passes(), read_vectors(self.watched), rates))

    def pooled(self) -> StepData | None:
        """Everything collected, and passes that came later, as one step; None if no layer ran.

        Later passes come from closures inside the optimizer's step, such as all forwards of Lightning's Trainer.
        """
        collected, self.collected = self.collected, []
        if not collected:
            return None
        late, (_, vectors, rates) = self._passes(), collected[-1]
        if any(late):
            vectors = read_vectors(self.watched) | {name: vectors[name] for name in ("gamma", "beta")}
        parts = zip(*(data.passes for data in collected), late, strict=True)
        passes = [[one for part in of_layer for one in part] for of_layer in parts]
        return StepData(passes, vectors, rates) if any(passes) else None

    def columns(self, data: StepData | None = None, step: int | None = None) -> Columns:
        """All columns of a snapshot; without `data`, of the layers now, without a batch and a gradient."""
        passes, vectors, rates = data or StepData([[] for _ in self.watched], read_vectors(self.watched), None)
        return vectors | sums(self.watched, passes) | (self._rates(step, None) if rates is None else rates)

    def _passes(self) -> list[list[Pass]]:
        return [watched.tap.take() for watched in self.watched]

    @torch.no_grad()
    def _rates(self, step: int | None, optimizer: torch.optim.Optimizer | None) -> Columns:
        """`lr` and `weight_norm` of the producers' weights; NaN if unknown. The norms are read only when due."""
        due = step is not None and step >= self._next_norms
        if step is not None and due:
            self._next_norms = max(step + _NORMS_APART, int(_NORMS_SPACED * step))
        groups = [] if optimizer is None else optimizer.param_groups
        lr_of = {id(p): group.get("lr") for group in groups for p in group["params"]}
        producers = [watched.producer for watched in self.watched]
        norms = [producer.unit_norms() if due and producer is not None else None for producer in producers]
        lrs = [None if producer is None else lr_of.get(id(producer.weight)) for producer in producers]
        return {
            "weight_norm": _concatenate(self.watched, norms),
            "lr": _repeat(self.watched, [np.nan if lr is None else float(lr) for lr in lrs]),
        }


# --- one step's numbers, of all layers and units ----------------------------------------------------------------------

_VECTORS = {
    "gamma": ("gamma", 1.0),
    "beta": ("beta", 0.0),
    "running_mean": ("mean", np.nan),
    "running_var": ("var", np.nan),
}
"""Columns read from the layers: the tensor's role, and the default of a layer without it."""


@torch.no_grad()
def read_vectors(layers: Sequence[WatchedLayer]) -> Columns:
    """Copies of gamma, beta and the running statistics."""
    return {
        column: _concatenate(layers, [_local_tensor(watched, role) for watched in layers], default)
        for column, (role, default) in _VECTORS.items()
    }


def sums(layers: Sequence[WatchedLayer], passes: Sequence[Sequence[Pass]]) -> Columns:
    """The columns that the step's passes, a list per layer, determine."""
    counted = [[one for one in of_layer if one.grads] or of_layer for of_layer in passes]
    if all(len(of_layer) == 1 and len(of_layer[0].grads) == 1 for of_layer in counted):
        return _single_pass_sums(layers, [of_layer[0] for of_layer in counted])
    parts = [_layer_sums(watched, of_layer) for watched, of_layer in zip(layers, counted, strict=True)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _single_pass_sums(layers: Sequence[WatchedLayer], passes: Sequence[Pass]) -> Columns:
    """The usual case, all layers at once: one forward and one backward each."""
    columns = {name: _concatenate(layers, [getattr(one, name) for one in passes]) for name in ("mean", "var")}
    for name in ("dgamma", "dbeta", "energy"):
        columns[name] = _concatenate(layers, [getattr(one.grads[0], name) for one in passes])
    count = _repeat(layers, [float(one.count) for one in passes])
    eps = _repeat(layers, [watched.eps for watched in layers])
    columns["diverted"] = _diverted_energy(columns["dgamma"], columns["dbeta"], columns["var"], eps, count)
    columns |= {"count": count, "batches": np.ones(len(count))}
    return columns | dict.fromkeys(("noise_mean", "noise_log_scale"), np.full(len(count), np.nan))


def _layer_sums(watched: WatchedLayer, passes: Sequence[Pass]) -> Columns:
    """One layer with any number of forwards and backwards."""
    names = ("mean", "var", "dgamma", "dbeta", "energy", "diverted", "noise_mean", "noise_log_scale")
    columns = dict.fromkeys(names, np.full(watched.units, np.nan))
    columns |= {"count": np.zeros(watched.units), "batches": np.full(watched.units, float(len(passes)))}
    if not passes:
        return columns
    means, variances = ([_f64(getattr(one, name)) for one in passes] for name in ("mean", "var"))
    counts = [int(one.count) for one in passes]
    parts = [Moments.of_variance(*part) for part in zip(counts, means, variances, strict=True)]
    pooled = parts[0].merge(*parts[1:])
    noise = q.batch_noise(means, variances, watched.eps)
    columns |= {"count": np.full(watched.units, float(pooled.count)), "mean": pooled.mean, "var": pooled.var}
    columns |= {"noise_mean": noise.mean, "noise_log_scale": noise.log_scale}
    backwards = []
    for one, var, count in zip(passes, variances, counts, strict=True):
        for grads in one.grads:
            sums_of = {name: _f64(getattr(grads, name)) for name in ("dgamma", "dbeta", "energy")}
            diverted = _diverted_energy(sums_of["dgamma"], sums_of["dbeta"], var, watched.eps, count)
            backwards.append(sums_of | {"diverted": diverted})
    if backwards:
        columns |= {name: np.sum([backward[name] for backward in backwards], axis=0) for name in backwards[0]}
    return columns


def _diverted_energy(dgamma: Array, dbeta: Array, var: Array, eps: float | Array, m: float | Array) -> Array:
    """`gradient_diverted` times Σg², which can be added over backwards."""
    return q.gradient_diverted(dgamma, dbeta, np.ones_like(dgamma), var, eps, m)


def _local_tensor(watched: WatchedLayer, role: str) -> Tensor | None:
    """None if the layer has no such tensor; empty if this process has only a shard of it."""
    layer, kind = watched.layer, watched.kind
    name = getattr(kind, role)
    tensor: Tensor | None = layer._parameters.get(name)
    if tensor is None:
        tensor = layer._buffers.get(name)
    if role == "gamma" and kind is not TORCH:
        tensor = kind.scale(layer)
    return torch.empty(0) if tensor is not None and hasattr(tensor, "full_tensor") else tensor


def _concatenate(layers: Sequence[WatchedLayer], vectors: Sequence[Tensor | None], default: float = np.nan) -> Array:
    """One value per unit of all layers, copied: `default` for a layer whose vector is None, NaN if its size is wrong.

    Consecutive layers on one device are transferred together.
    """
    device = next((vector.device for vector in vectors if vector is not None), None)
    complete = [
        vector.detach()
        if vector is not None and vector.numel() == watched.units
        else torch.full((watched.units,), default if vector is None else np.nan, device=device)
        for watched, vector in zip(layers, vectors, strict=True)
    ]
    return np.concatenate([_f64(torch.cat(list(group))) for _, group in groupby(complete, lambda v: v.device)])


def _repeat(layers: Sequence[WatchedLayer], values: Sequence[float]) -> Array:
    """Each layer's value once per unit."""
    return np.repeat(np.asarray(values, np.float64), [watched.units for watched in layers])


def _f64(vector: Tensor | None) -> Array:
    assert vector is not None, "the sums of a tapped layer include the energy"
    values: Array = vector.detach().cpu().to(torch.float64, copy=True).numpy()
    return values
