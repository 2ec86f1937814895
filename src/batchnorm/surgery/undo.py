"""undo(): gamma and beta that give back what the normalization took; the founding question's experiment as a tool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.quantities import undo_index
from batchnorm.records import Record, Skipped
from batchnorm.restoring import all_or_nothing, measuring, put, stand_in, unwrapped
from batchnorm.running_stats import Buffers, store
from batchnorm.surgery._shared.calling import Feed, ForwardFn, followed
from batchnorm.surgery._shared.layers import Norm, find, made_of
from batchnorm.surgery._shared.measuring import on_host, survey
from batchnorm.surgery.freeze import is_frozen
from batchnorm.surgery.recalibrate import statistics
from batchnorm.words import plural

__all__ = ["Undoing", "Undone", "undo"]

_LEARNED = {"weight": "gamma", "bias": "beta"}
_INDICES = ("index_before", "index_after")


@dataclass(frozen=True, slots=True)
class Undone:
    """One layer of an `Undoing`.

    Attributes:
        names: all its names in the model.
        kind: its class.
        values: how many values of a channel were pooled.
        index_before, index_after: the median over its units of `undo_index`, by the running statistics of before and
            after: 1 where the layer is the identity. NaN where bare normalization already is the identity.
    """

    names: tuple[str, ...]
    kind: str
    values: int
    index_before: float
    index_after: float


@dataclass(frozen=True, slots=True, repr=False)
class Undoing(Record):
    """What `undo` did.

    Attributes:
        layers: one record for each layer, in the order of their calls.
        skipped: the layers that were left as they were, each with the reason.
        batches: how many batches were used.
    """

    layers: tuple[Undone, ...]
    skipped: tuple[Skipped, ...] = ()
    batches: int = 0

    def _head(self) -> list[str]:
        head = f"{plural(len(self.layers), 'batch norm layer')} undone"
        rows = [f"{head} on {plural(self.batches, 'batch', 'batches')}" if self.layers else head]
        for kind in dict.fromkeys(layer.kind for layer in self.layers):
            layers = [layer for layer in self.layers if layer.kind == kind]
            before, after = (_middle([getattr(layer, name) for layer in layers]) for name in _INDICES)
            rows.append(f"{len(layers):4}  {kind}  undo index {before} → {after} in the median")
        return rows


def undo(
    model: nn.Module,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    device: torch.device | str | int | None = None,
    progress: bool | None = None,
    also: Sequence[type[nn.Module]] = (),
) -> Undoing:
    """Set gamma and beta so that every batch norm is the identity in eval mode, in place.

    gamma = sqrt(running_var + eps) and beta = running_mean.

    The running statistics become the pooled moments of what each layer receives in that network without normalization,
    over all batches (running_var unbiased, as PyTorch's), and gamma and beta follow from them. In eval mode the network
    then computes what it would with torch.nn.Identity in place of its batch norms, up to rounding; activations and
    residuals that are part of a layer stay. In training mode what varies from batch to batch is still normalized, and
    the gradients are not those of the network without batch norm.

    Left alone, and named in the record: layers without gamma, beta or running statistics, with a gamma or beta that
    another module uses too, those that `recalibrate` leaves alone, and those of which `freeze` froze anything.

    Args:
        model: gamma, beta and the running statistics are changed in place; nothing where an error is raised.
        batches: the data, such as a DataLoader or a list of tensors. One pass is enough, so an iterator will do.
        forward_fn: forward_fn(model, batch) runs the model on a batch; by default model(batch), as of `recalibrate`.
        device: where batches go; the device of the model's first parameter or buffer where None.
        progress: True and False show a progress bar on stderr or not; None does where it is a terminal.
        also: subclasses of torch.nn's layers that normalize as these do, which the caller vouches for.

    Returns:
        The undo_index of each layer before and after, and which layers were left alone; `print` it.

    Raises TypeError on arguments of a wrong type. Raises ValueError on no batches, and where a layer receives values
    that are not finite, as a deep network without normalization may.
    """
    inner = unwrapped(model)
    norms, skipped = find("undo", inner, also)
    feed = Feed("undo", inner, batches, forward_fn, device)
    modules = inner.modules()
    uses = Counter(p for m in modules for _, p in m.named_parameters(recurse=False, remove_duplicate=False))
    reasons = {norm: _why_not(norm.layer, uses) for norm in norms}
    skipped += [norm.skipped(why) for norm, why in reasons.items() if why is not None]
    norms = [norm for norm, why in reasons.items() if why is None]
    if not norms:
        return Undoing((), tuple(skipped))
    with measuring(inner), followed("undo", progress) as follow:
        for norm in norms:
            # The identity in eval mode: the layer's activation and residual still run.
            identity = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1 - norm.eps}
            state: dict[str, Any] = {**norm.layer._parameters, **norm.layer._buffers}
            full = partial(torch.full_like, requires_grad=False)
            stand_in(norm.layer, **{name: full(state[name], value) for name, value in identity.items()})
        read = survey(feed, norms, follow)
        new = {norm: statistics(norm, moments) for norm, moments in read.moments.items()}
    skipped += [norm.skipped("never called") for norm in norms if norm not in new]
    before = {norm: _index(norm) for norm in new}
    with all_or_nothing(inner, (tensor for n in new for tensor in (*n.layer.parameters(), *n.layer.buffers()))):
        for norm, tensors in new.items():
            store(Buffers.of(norm.layer), tensors.values(), read.used)
            _give_back(norm)
        layers = tuple(
            Undone(norm.names, type(norm.layer).__name__, int(read.moments[norm].count), before[norm], _index(norm))
            for norm in new
        )
    return Undoing(layers, tuple(skipped), read.used)


def _give_back(norm: Norm) -> None:
    """gamma and beta from the running statistics as they are stored, rounding included."""
    layer: Any = norm.layer
    put(layer.weight, (layer.running_var.cpu().double() + norm.eps).sqrt())
    put(layer.bias, layer.running_mean)


def _middle(indices: list[float]) -> str:
    """The median of those that are defined, in words."""
    defined = [value for value in indices if value == value]
    return f"{np.median(defined):.2f}" if defined else "unknown"


def _index(norm: Norm) -> float:
    layer: Any = norm.layer
    mean, var, gamma, beta = map(on_host, (layer.running_mean, layer.running_var, layer.weight, layer.bias))
    index = undo_index(mean, var, norm.eps, gamma, beta)
    return float(np.median(index[~np.isnan(index)])) if not np.isnan(index).all() else float("nan")


def _why_not(layer: _BatchNorm, uses: Counter[nn.Parameter]) -> str | None:
    for name, meaning in _LEARNED.items():
        found = made_of(layer, name)
        if not found:
            return f"it has no {meaning}"
        if is_frozen(layer, meaning):
            return f"its {meaning} is frozen: unfreeze it first"
        if layer._parameters.get(name) is None:
            return (
                f"its {meaning} is computed from other parameters: make it a parameter first, as with "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
            )
        if uses[found[0]] > 1:
            return f"its {meaning} is shared with another module"
    return None
