"""undo(): set gamma and beta so that they undo the normalization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from batchnorm.quantities import undo_index
from batchnorm.records import Record, Skipped
from batchnorm.restoring import all_or_nothing, measuring, unwrapped, write
from batchnorm.running_stats import store
from batchnorm.surgery._shared.calling import Feed, ForwardFn, show_progress
from batchnorm.surgery._shared.layers import find, made_of
from batchnorm.surgery._shared.measuring import on_host, survey
from batchnorm.surgery._shared.norm import Norm
from batchnorm.surgery.freeze import is_frozen
from batchnorm.surgery.recalibrate import statistics
from batchnorm.words import known, plural, quantile

__all__ = ["Undoing", "Undone", "undo"]

_LEARNED = ("gamma", "beta")
_INDICES = ("index_before", "index_after")


@dataclass(frozen=True, slots=True)
class Undone:
    """One layer of an `Undoing`.

    Attributes:
        names: all its names in the model.
        kind: its class.
        values: the number of values per channel that were pooled.
        index_before, index_after: the median over its units of `undo_index`, before and after: 1 if the layer is the
            identity. NaN if plain normalization already is the identity.
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
        skipped: the layers that were not changed, each with the reason.
        batches: the number of batches used.
    """

    layers: tuple[Undone, ...]
    skipped: tuple[Skipped, ...] = ()
    batches: int = 0

    def _head(self) -> list[str]:
        head = f"{plural(len(self.layers), 'batch norm layer')} undone"
        rows = [f"{head} on {plural(self.batches, 'batch', 'batches')}" if self.layers else head]
        for kind in dict.fromkeys(layer.kind for layer in self.layers):
            layers = [layer for layer in self.layers if layer.kind == kind]
            medians = (quantile(np.array([getattr(layer, name) for layer in layers])) for name in _INDICES)
            before, after = (known(median, "{:.2f}".format) or "unknown" for median in medians)
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

    The running statistics become the pooled moments of each layer's input in the network without normalization; gamma
    and beta follow from them. In eval mode the network then computes what it would with torch.nn.Identity in place of
    its batch norms, up to rounding; fused activations and residuals remain. In training mode the variation between
    batches is still normalized, and the gradients are not those of the network without batch norm.

    Skipped, and named in the record: layers without gamma, beta or running statistics, layers that share gamma or beta
    with another module, layers that `recalibrate` skips, and layers with anything frozen.

    Args:
        model: gamma, beta and the running statistics are changed in place; nothing if an error is raised.
        batches: the data, such as a DataLoader, a list of tensors or an iterator: one pass is enough.
        forward_fn: forward_fn(model, batch) runs the model on a batch; by default model(batch), as of `recalibrate`.
        device: where to move the batches; by default that of the model's first parameter or buffer.
        progress: whether to show a progress bar on stderr; by default only if it is a terminal.
        also: subclasses that normalize as their base class does, to be included.

    Returns:
        The undo_index of each layer before and after, and the skipped layers; `print` it.

    Raises TypeError on arguments of a wrong type; ValueError without batches, and if a layer receives values that are
    not finite, as a deep network without normalization may.
    """
    inner = unwrapped(model)
    norms, skipped = find("undo", inner, also)
    feed = Feed("undo", inner, batches, forward_fn, device)
    modules = inner.modules()
    uses = Counter(p for m in modules for _, p in m.named_parameters(recurse=False, remove_duplicate=False))
    reasons = {norm: _why_not(norm, uses) for norm in norms}
    skipped += [norm.skipped(why) for norm, why in reasons.items() if why is not None]
    norms = [norm for norm, why in reasons.items() if why is None]
    if not norms:
        return Undoing((), tuple(skipped))
    with measuring(inner), show_progress("undo", progress) as follow:
        for norm in norms:
            # The identity in eval mode; the activation and the residual still run.
            identity = {"gamma": norm.gamma_of(1.0), "beta": 0.0, "mean": 0.0, "var": 1 - norm.eps}
            state: dict[str, Any] = {role: norm.tensor(role) for role in identity}
            full = partial(torch.full_like, requires_grad=False)
            norm.use(**{role: full(state[role], value) for role, value in identity.items()})
        pooled = survey(feed, norms, follow)
        new = {norm: statistics(norm, moments) for norm, moments in pooled.moments.items()}
    skipped += [norm.skipped("never called") for norm in norms if norm not in new]
    before = {norm: _index(norm) for norm in new}
    with all_or_nothing(inner, (tensor for n in new for tensor in (*n.layer.parameters(), *n.layer.buffers()))):
        for norm, tensors in new.items():
            store(norm.buffers(), tensors.values(), pooled.used)
            _set_gamma_beta(norm)
        layers = tuple(
            Undone(norm.names, type(norm.layer).__name__, int(pooled.moments[norm].count), before[norm], _index(norm))
            for norm in new
        )
    return Undoing(layers, tuple(skipped), pooled.used)


def _set_gamma_beta(norm: Norm) -> None:
    """Compute gamma and beta from the stored running statistics, rounding included."""
    gamma, beta, mean, var = _tensors(norm)
    write(gamma, norm.gamma_of((var.cpu().double() + norm.eps).sqrt()))
    write(beta, mean)


def _index(norm: Norm) -> float:
    scale: Any = norm.scale
    gamma, beta, mean, var = map(on_host, (scale, *_tensors(norm)[1:]))
    return quantile(undo_index(mean, var, norm.eps, gamma, beta))


def _tensors(norm: Norm) -> tuple[Any, ...]:
    return tuple(norm.tensor(role) for role in ("gamma", "beta", "mean", "var"))


def _why_not(norm: Norm, uses: Counter[nn.Parameter]) -> str | None:
    layer = norm.layer
    for meaning in _LEARNED:
        name = norm.tensor_name(meaning)
        parameters = made_of(layer, name) if norm.uses(meaning) else ()
        if not parameters:
            return f"it has no {meaning}"
        if is_frozen(norm, meaning):
            return f"its {meaning} is frozen: unfreeze it first"
        if layer._parameters.get(name) is None:
            return (
                f"its {meaning} is computed from other parameters: make it a parameter first, as with "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
            )
        if uses[parameters[0]] > 1:
            return f"its {meaning} is shared with another module"
    return None
