"""pool_states(): pool the running statistics of several state dicts by the law of total variance."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from batchnorm.frameworks import FRAMEWORKS
from batchnorm.merging._states import State, read_states
from batchnorm.moments import Moments, merge_rows
from batchnorm.records import Record, Skipped
from batchnorm.running_stats import NAMES
from batchnorm.surgery.pool_statistics import Disagreement
from batchnorm.surgery.recalibrate import Recalibration
from batchnorm.words import plural

__all__ = ["PooledStates", "pool_states"]

Counts: TypeAlias = int | Mapping[str, int] | Recalibration
"""The number of values per channel in a state's statistics: one for all layers, by layer, or a record that has them."""

_EPS = FRAMEWORKS["PyTorch"].eps
"""State dicts do not have the eps of a layer. It is only used to compare the states."""


@dataclass(frozen=True, slots=True, repr=False)
class PooledStates(Record):
    """What `pool_states` returns.

    Attributes:
        state: the pooled tensors by name: a part of a state dict, for load_state_dict(state, strict=False).
        states: the number of states.
        exact: whether counts were given; without them the states have shares.
        layers: one record for each layer; those that differed most come first.
        skipped: the layers that were not pooled, each with the reason.
    """

    state: Mapping[str, Tensor]
    states: int
    exact: bool
    layers: tuple[Disagreement, ...]
    skipped: tuple[Skipped, ...] = ()

    _left = "not pooled"

    def _head(self) -> list[str]:
        how = "by their counts" if self.exact else "without counts"
        head = f"{plural(len(self.layers), 'batch norm layer')} pooled over {plural(self.states, 'state')}, {how}"
        return [head, *(f"  {layer}" for layer in self.layers[:3])]


def pool_states(
    states: Iterable[State], counts: Sequence[Counts] | None = None, keep: Sequence[str] = ()
) -> PooledStates:
    """Pool the running statistics of several states of one network, as if one process had seen the data of all.

    mean = Σ n_i·mean_i/n, var = (Σ (n_i - 1)·var_i + Σ n_i·(mean_i - mean)²)/(n - 1), with counts n_i and their sum n.

    For clients of federated learning, parts of a data set, and soups. The average of the variances, as of all other
    tensors in federated averaging, lacks the second sum: where the clients have different data, it is too small.

    With counts the result is exact, for running_var is the unbiased variance: it is that of all values together, if
    every state has the statistics of its data, and the weights are the same. Layers after the first one depend on the
    statistics of those before: measure, pool and freeze one layer after the other. Without counts the states have equal
    shares, and var = Σ (var_i + (mean_i - mean)²)/k over the k states.

    num_batches_tracked becomes the maximum. All is computed in float64, and stored in the type and on the device of
    the first state.

    Args:
        states: state dicts or modules of the same network; not changed.
        counts: for each state the number of values per channel that its statistics are of: an integer for all layers
            (samples, times positions in a convolutional layer), a mapping of layer names to integers, or the record of
            `recalibrate`, which has them. A state is ignored where it has 0.
        keep: patterns of layers that stay local, such as "head.*" or "*.bn1". They are not in the result.

    Returns:
        The pooled tensors, and how far apart the states were, layer by layer; `print` it.

    Raises TypeError if a state is neither a state dict nor a module, if a count is not an integer, and if keep is not a
    sequence of strings. Raises ValueError without states, with states of other layers or shapes, with statistics that
    are not finite or negative, with counts that do not fit, with a pattern that no layer has, and if a pooled number is
    beyond the range of the first state's type.
    """
    loaded = read_states("pool_states", states)
    given = None if counts is None else _by_layer(counts, len(loaded))
    layers = _layers(loaded)
    skipped = _kept({layer.name for layer in layers}, keep)
    chosen = [layer for layer in layers if layer.name not in skipped]
    shares = (lambda name: [1.0] * len(loaded)) if given is None else given
    return _pooled(loaded, chosen, shares, given is not None, tuple(skipped.values()))


def pool_shares(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> PooledStates:
    """`pool_states` of all layers, with a share of each state in place of counts. Raises its errors."""
    return _pooled(states, _layers(states), lambda name: shares, False, ())


class _Layer(NamedTuple):
    """A layer and the names of its tensors; `label` has the domain too, `batches` may be the name of no tensor."""

    name: str
    label: str
    mean: str
    var: str
    batches: str


def _layers(states: Sequence[Mapping[str, Tensor]]) -> list[_Layer]:
    """The layers of all states, by the names of their tensors. Raises ValueError where they differ."""
    layers: dict[str, _Layer] = {}
    for key in (key for state in states for key in state):
        name, dot, leaf = key.rpartition(".")
        stem = next((stem for stem in NAMES[:2] if leaf.startswith(stem)), None)
        domain = "" if stem is None else leaf.removeprefix(stem)
        if stem is not None and (not domain or domain[1:].isdecimal()):
            label = f"{name} (domain {domain[1:]})" if domain else name
            layers.setdefault(label, _Layer(name, label, *(f"{name}{dot}{stem}{domain}" for stem in NAMES)))
    for index, state in enumerate(states):
        for key in (key for layer in layers.values() for key in (layer.mean, layer.var)):
            first = states[0].get(key, None)
            if key not in state or first is None:
                missing = index if key not in state else 0
                raise ValueError(f"pool_states: state {missing} has no {key}: pass states of one network")
            if state[key].shape != first.shape or first.dim() != 1:
                shapes = f"{tuple(state[key].shape)} in state {index} and {tuple(first.shape)} in state 0"
                raise ValueError(f"pool_states: {key} has shape {shapes}: pass states of one network")
            if not state[key].is_floating_point():
                raise ValueError(
                    f"pool_states: {key} of state {index} has type {state[key].dtype}: it must be floating"
                )
    return list(layers.values())


def _kept(names: Iterable[str], keep: Sequence[str]) -> dict[str, Skipped]:
    """The layers that a pattern matches. Raises ValueError for a pattern that matches no layer."""
    if isinstance(keep, str) or not all(isinstance(pattern, str) for pattern in keep):
        raise TypeError(f"pool_states: keep must be a list of patterns such as ['head.*'], got {keep!r}")
    kept: dict[str, Skipped] = {}
    for pattern in keep:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"pool_states: keep has {pattern!r}, which is the name of no layer with statistics")
        kept |= {name: Skipped(name, "layer", f"stays local, by {pattern!r}") for name in matches}
    return kept


def _by_layer(counts: Sequence[Counts], states: int) -> Callable[[str], list[float]]:
    """The counts of the states by layer name. Raises TypeError or ValueError if they do not fit."""
    if isinstance(counts, str | Mapping) or not isinstance(counts, Sequence):
        raise TypeError(f"pool_states: counts must be a list with one for each state, got {type(counts).__name__}")
    if len(counts) != states:
        raise ValueError(f"pool_states: there are {plural(states, 'state')} and {plural(len(counts), 'count')}")
    tables: list[Mapping[str, int] | int] = []
    for each in counts:
        if isinstance(each, Recalibration):
            tables.append({name: layer.values for layer in each.layers for name in layer.names})
        else:
            tables.append(each)

    def of_layer(name: str) -> list[float]:
        found = []
        for index, table in enumerate(tables):
            value: Any = table.get(name) if isinstance(table, Mapping) else table
            if value is None:
                raise ValueError(f"pool_states: the counts of state {index} have no layer {name!r}: add it, or keep it")
            try:
                count = operator.index(value)
            except TypeError:
                count = -1
            if isinstance(value, bool) or count < 0:
                raise TypeError(
                    f"pool_states: the count of state {index} must be an integer >= 0, the number of values per "
                    f"channel, got {value!r}"
                )
            found.append(float(count))
        if sum(found) < 2:
            raise ValueError(f"pool_states: the counts of {name or 'the layer'} are {found}: a variance needs 2 values")
        return found

    return of_layer


def _pooled(
    states: Sequence[Mapping[str, Tensor]],
    layers: Sequence[_Layer],
    shares_of: Callable[[str], Sequence[float]],
    exact: bool,
    skipped: tuple[Skipped, ...],
) -> PooledStates:
    result: dict[str, Tensor] = {}
    gaps = []
    for layer in layers:
        shares = shares_of(layer.name)
        used = [index for index, share in enumerate(shares) if share > 0]
        counts = torch.tensor([[shares[index]] for index in used], dtype=torch.float64)
        means, variances = (_rows(states, used, name) for name in (layer.mean, layer.var))
        negative = (variances < 0).any(1).tolist()
        if any(negative):
            raise ValueError(f"pool_states: {layer.var} of state {used[negative.index(True)]} is negative")
        merged = merge_rows(Moments.of_variance(counts, means, variances, unbiased=exact))
        for name, wide in ((layer.mean, merged.mean), (layer.var, merged.unbiased_var if exact else merged.var)):
            result[name] = _stored(name, wide, states[0][name])
        batches = [states[index][layer.batches] for index in used if layer.batches in states[index]]
        if batches and layer.batches in states[0]:
            most = max(batches, key=int)
            result[layer.batches] = most.to(states[0][layer.batches].device, copy=True)
        gaps.append(Disagreement.of(layer.label, means, variances, merged, _EPS))
    gaps.sort(key=lambda gap: -gap.largest)
    return PooledStates(result, len(states), exact, tuple(gaps), skipped)


def _rows(states: Sequence[Mapping[str, Tensor]], used: Sequence[int], name: str) -> Tensor:
    """A tensor of these states as rows in float64. Raises ValueError if one is not finite."""
    rows = torch.stack([states[index][name].detach().to("cpu", torch.float64) for index in used])
    finite = rows.isfinite().all(1).tolist()
    if not all(finite):
        raise ValueError(
            f"pool_states: {name} of state {used[finite.index(False)]} is not finite: call batchnorm.recalibrate on it"
        )
    return rows


def _stored(name: str, wide: Tensor, like: Tensor) -> Tensor:
    """In the type and on the device of the first state's. Raises ValueError if the type cannot represent it."""
    stored = wide.to(like.dtype)
    if not bool(stored.isfinite().all()):
        raise ValueError(
            f"pool_states: {name} would be {float(wide.abs().max()):.3g}, beyond the range of "
            f"{str(like.dtype).removeprefix('torch.')}: turn the statistics of state 0 into float32"
        )
    return stored.to(like.device)
