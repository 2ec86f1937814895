"""repair(): set the mean and the deviation of an interpolated network's units to those of its endpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.merging._states import State, check_same_network, check_shares, network, read_states
from batchnorm.moments import Moments
from batchnorm.records import Record, Skipped, format_names
from batchnorm.restoring import all_or_nothing, measuring, use_tensors, write
from batchnorm.surgery._folding.pairs import RunTrace
from batchnorm.surgery._folding.weights import fold_weights, in_out_channels
from batchnorm.surgery._shared.calling import Feed, Follow, ForwardFn, show_progress
from batchnorm.surgery._shared.layers import (
    FRESH,
    find,
    names_of,
    warn_of_none,
)
from batchnorm.surgery._shared.measuring import Array, Survey, on_host, record_inputs, survey
from batchnorm.surgery._shared.norm import Norm
from batchnorm.surgery.recalibrate import statistics
from batchnorm.words import plural

__all__ = ["Repairing", "repair"]

_LEAST = 1e-6
"""A unit whose deviation is smaller, relative to the endpoints', is constant up to rounding: its scale stays."""


_Change = Mapping[str, Tensor] | str
"""New parameters and buffers of a layer by name, or why it has none."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """One layer of a `Repairing`. Scales and gaps are medians over the units that vary in the endpoints.

    Attributes:
        name: its name.
        kind: its class.
        scale_before, scale_after: its deviations divided by the endpoints', before and after; 1 is the goal.
        gap_before, gap_after: |mean - the endpoints' mean|, in the endpoints' deviations, before and after.
        constant: the number of units that are constant: only their mean was set.
    """

    name: str
    kind: str
    scale_before: float
    scale_after: float
    gap_before: float
    gap_after: float
    constant: int


@dataclass(frozen=True, slots=True, repr=False)
class Repairing(Record):
    """What `repair` did.

    Attributes:
        layers: one record for each layer that was changed, in the order of their calls.
        skipped: the layers that were not changed, each with the reason.
        batches: the number of batches used.
    """

    layers: tuple[Repaired, ...]
    skipped: tuple[Skipped, ...] = ()
    batches: int = 0

    def _head(self) -> list[str]:
        head = f"{plural(len(self.layers), 'layer')} repaired on {plural(self.batches, 'batch', 'batches')}"
        varied = [layer for layer in self.layers if not math.isnan(layer.scale_before)]
        if not varied:
            return [head]
        least = min(varied, key=lambda layer: layer.scale_before)
        before, after = (
            float(np.median([layer.scale_before for layer in varied])),
            float(np.median([layer.scale_after for layer in varied])),
        )
        return [
            f"{head}: deviations were {before:.3g} of the endpoints' in the median, and are {after:.3g} now",
            f"  {format_names(least.name)}: deviations were {least.scale_before:.3g} of the endpoints', the least",
        ]

    def _rows(self) -> Iterable[tuple[str, str]]:
        return [(layer.kind, format_names(layer.name)) for layer in self.layers]


class _Units(NamedTuple):
    """The mean and the deviation of each unit of a layer's output, (C,) each."""

    mean: Array
    deviation: Array


def repair(
    model: nn.Module,
    endpoints: Iterable[State],
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    weights: Sequence[float] | None = None,
    device: torch.device | str | int | None = None,
    progress: bool | None = None,
    also: Sequence[type[nn.Module]] = (),
) -> Repairing:
    """Set each unit's mean and deviation in an interpolated network to those of its endpoints, in place.

    mean = Σ w_i·mean_i and deviation = Σ w_i·deviation_i, over the endpoints i with their shares w_i.

    Between two networks, even with their units permuted to match, the deviations shrink from layer to layer, and the
    accuracy falls (Jordan et al. 2022, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair").
    Interpolate with `average`, then repair with the same weights.

    A unit is an output channel of a convolution or linear layer, or of a batch norm. One layer after the other is
    measured on the batches, with the layers before it repaired: a batch norm that follows it normalizes, scales and
    shifts its units, and is then folded into its weights and bias. A layer without a bias gets one. For a batch norm of
    the model the running statistics are measured, and gamma and beta are set; the convolution or linear layer right
    before it stays. Layer norms, group norms and torch.nn.MultiheadAttention stay too.

    Args:
        model: changed in place; nothing if an error is raised, KeyboardInterrupt included. Parallel and compiled
            wrappers are unwrapped.
        endpoints: state dicts or modules of the same network: those between which the model was interpolated.
        batches: data as in training, a few thousand samples: a list or DataLoader that can be read several times, as
            of `recalibrate`. It is read once for each endpoint and each layer.
        forward_fn: forward_fn(model, batch) runs the model on a batch; by default as of `recalibrate`.
        weights: the share of each endpoint, >= 0; equal by default. For (1 - a)·A + a·B they are [1 - a, a].
        device: where to move the batches; by default that of the model's first parameter or buffer.
        progress: whether to show a progress bar on stderr; by default only if it is a terminal.
        also: subclasses of batch norms that normalize as their base class does, to be included.

    Returns:
        Each layer's means and deviations relative to the endpoints', before and after, and the skipped layers.

    Raises TypeError on arguments of a wrong type. Raises ValueError without endpoints or batches, with endpoints of
    another network or with the model's tensors, with invalid weights, with an iterator, and with values that are not
    finite.
    """
    inner = network("repair", model)
    states = read_states("repair", endpoints)
    shares = check_shares(weights, len(states))
    target = inner.state_dict(keep_vars=True)
    check_same_network(target, states)
    _check_apart(target, states)
    norms, skipped = find("repair", inner, also, may_be_empty=True)
    feed = Feed("repair", inner, batches, forward_fn, device)
    if isinstance(batches, Iterator):
        raise ValueError(
            "repair has to read the batches again for each endpoint and layer: pass a list or a DataLoader"
        )
    maps = [Norm(tuple(names), layer) for layer, names in names_of(inner).items() if type(layer) in FRESH]
    if not maps and not norms and not skipped:
        warn_of_none("convolution, linear or batch norm layer")
    units, reasons = _units(feed, norms, maps)
    skipped += reasons
    if not units:
        return Repairing((), tuple(skipped))
    with show_progress("repair", progress) as follow, all_or_nothing(inner, target.values()) as restore:
        measure = partial(_measure, feed, units, follow, len(states) + len(units) + 2)
        outputs = []
        for number, state in enumerate(states, 1):
            for name, tensor in target.items():
                write(tensor, state[name])
            outputs.append(measure(number))
        restore()
        first, _ = outputs[0]
        goals = {unit: _mixed([found[unit] for _, found in outputs], shares) for unit in first.moments}
        _, before = measure(len(states) + 1, first=first)
        changes = _changes(feed, goals, follow, len(states) + 2, first)
        for unit, change in changes.items():
            if isinstance(change, Mapping):
                _apply(unit.layer, change)
        _, after = measure(len(states) + len(units) + 2, first=first)
    layers = tuple(
        _repaired(unit, goals[unit], before[unit], after[unit])
        for unit, change in changes.items()
        if isinstance(change, Mapping)
    )
    skipped += [unit.skipped(change) for unit, change in changes.items() if isinstance(change, str)]
    return Repairing(layers, tuple(skipped), first.used)


def _check_apart(target: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]]) -> None:
    for index, state in enumerate(states):
        if any(state[name].data_ptr() == tensor.data_ptr() for name, tensor in target.items() if tensor.numel()):
            raise ValueError(f"repair: endpoint {index} has tensors of the model, which changes: interpolate in a copy")


def _units(feed: Feed, norms: Sequence[Norm], maps: Sequence[Norm]) -> tuple[list[Norm], list[Skipped]]:
    """The layers whose units can be set, and the others with the reason. Raises ValueError without batches."""
    with measuring(feed.model):
        batch = next(feed.read(1), None)
        if batch is None:
            raise ValueError("repair: there are no batches: pass a list of them or a DataLoader that is not empty")
        trace = RunTrace(feed.model, norms, lambda: feed.run(batch))
    units, skipped = [], []
    for unit in (*norms, *maps):
        roles = ("gamma", "beta", "mean", "var") if unit in norms else ("gamma", "beta")
        why = trace.why_not_module(unit.layer, {unit.tensor_name(role): unit.tensor(role) for role in roles})
        if why is None:
            units.append(unit)
        else:
            skipped.append(unit.skipped(why))
    layers = {unit.layer for unit in units}
    normalized = {
        link.first
        for link in trace.links
        if link.other_use is None and isinstance(link.second, _BatchNorm) and link.second in layers
    }
    return [unit for unit in units if unit.layer not in normalized], skipped


def _measure(
    feed: Feed, units: Sequence[Norm], follow: Follow, passes: int, number: int, *, first: Survey | None = None
) -> tuple[Survey, dict[Norm, _Units]]:
    """One pass with the tensors that the model has now: the survey, and the means and deviations of the outputs."""
    with measuring(feed.model):
        found = survey(feed, units, follow, number=number, passes=passes, observe=_record_units)
        if first is not None and found.read != first.read:
            raise ValueError(
                f"repair: there were {first.read} batches in the first pass and {found.read} in a later one: pass a "
                "list or a DataLoader"
            )
        outputs = {unit: _output(unit, moments) for unit, moments in found.moments.items()}
    for unit, output in outputs.items():
        if not (np.isfinite(output.mean).all() and np.isfinite(output.deviation).all()):
            raise ValueError(
                f"repair: the outputs of {unit} are not finite: call batchnorm.recalibrate on each network"
            )
    return found, outputs


@contextmanager
def _record_units(units: Sequence[Norm], record: Callable[[Norm, Tensor], None]) -> Iterator[None]:
    """Call `record` with the inputs of batch norms, and the outputs of the other layers as (N, C, *)."""

    def after(unit: Norm, layer: nn.Module, args: object, output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            record(unit, output.reshape(-1, output.shape[-1]))
        else:
            kernel: Any = layer.kernel_size
            record(unit, output if output.dim() == len(kernel) + 2 else output.unsqueeze(0))

    with ExitStack() as stack:
        stack.enter_context(record_inputs([unit for unit in units if _is_norm(unit)], record))
        for unit in units:
            if not _is_norm(unit):
                stack.callback(unit.layer.register_forward_hook(partial(after, unit)).remove)
        yield


def _is_norm(unit: Norm) -> bool:
    return isinstance(unit.layer, _BatchNorm)


def _output(unit: Norm, moments: Moments) -> _Units:
    """The units of a layer's output before an activation; `moments` are of a batch norm's input, or of the output."""
    mean, deviation = np.asarray(moments.mean), np.sqrt(moments.var)
    layer: Any = unit.layer
    if not _is_norm(unit):
        return _Units(mean, deviation)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = 1 / np.sqrt(on_host(layer.running_var) + unit.eps)
        scale = scale if layer.weight is None else scale * on_host(layer.weight)
        shift = 0.0 if layer.bias is None else on_host(layer.bias)
        return _Units((mean - on_host(layer.running_mean)) * scale + shift, deviation * abs(scale))


def _mixed(parts: Sequence[_Units], shares: Sequence[float]) -> _Units:
    mean, deviation = (
        np.asarray(sum(share * part[which] for share, part in zip(shares, parts, strict=True))) for which in (0, 1)
    )
    return _Units(mean, deviation)


def _changes(
    feed: Feed, goals: Mapping[Norm, _Units], follow: Follow, number: int, first: Survey
) -> dict[Norm, _Change]:
    """The new tensors of each layer, in the order of their calls: each is measured with the earlier ones changed."""
    changes: dict[Norm, _Change] = {}
    passes = number + len(goals)
    with measuring(feed.model):
        for position, (unit, goal) in enumerate(goals.items(), number):
            found = survey(
                feed, [unit], follow, number=position, passes=passes, first=first, observe=_record_units
            ).moments[unit]
            is_norm = _is_norm(unit)
            changes[unit] = change = (
                _norm_change(unit, goal, found, first) if is_norm else _map_change(unit, goal, found)
            )
            if isinstance(change, Mapping):
                use_tensors(unit.layer, **change)
    return changes


def _norm_change(norm: Norm, goal: _Units, moments: Moments, first: Survey) -> _Change:
    """Statistics that are measured, and gamma and beta that make the outputs those of the goal."""
    layer: Any = norm.layer
    found = statistics(norm, moments)
    change = {norm.tensor_name(role): tensor for role, tensor in found.items()}
    change["num_batches_tracked"] = torch.tensor(first.used)
    if layer.weight is not None:
        normalized = np.sqrt(moments.var / (on_host(found["var"]) + norm.eps))
        gamma = on_host(layer.weight)
        change["weight"] = _like(layer.weight, gamma * _factor(goal.deviation, abs(gamma) * normalized))
    if layer.bias is not None:
        change["bias"] = _like(layer.bias, goal.mean)
    if not all(bool(tensor.isfinite().all()) for tensor in change.values()):
        return "its gamma and beta would not be finite"
    return change


def _map_change(unit: Norm, goal: _Units, moments: Moments) -> _Change:
    """The weight and the bias, with a batch norm folded in that gives the outputs the goal's means and deviations."""
    layer: Any = unit.layer
    deviation = np.sqrt(moments.var)
    constant = _is_constant(goal.deviation, deviation)
    inserted = nn.BatchNorm1d(in_out_channels(layer)[1], eps=0.0, device=layer.weight.device, dtype=torch.float64)
    tensors = {
        "running_mean": moments.mean,
        "running_var": np.where(constant, 1.0, moments.var),
        "weight": np.where(constant, 1.0, goal.deviation),
        "bias": goal.mean,
    }
    for name, values in tensors.items():
        write(getattr(inserted, name), torch.from_numpy(np.asarray(values)))
    folded = fold_weights(layer, Norm(("",), inserted), before=True)
    return folded if isinstance(folded, str) else folded._asdict()


def _is_constant(goal: Array, deviation: Array) -> NDArray[np.bool_]:
    """The units whose scale stays."""
    return np.asarray((deviation == 0) | (deviation < _LEAST * goal), dtype=np.bool_)


def _factor(goal: Array, deviation: Array) -> Array:
    constant = _is_constant(goal, deviation)
    return np.where(constant, 1.0, goal / np.where(constant, 1.0, deviation))


def _like(tensor: Tensor, values: Array) -> Tensor:
    return torch.from_numpy(np.asarray(values)).to(tensor.dtype).to(tensor.device)


def _apply(layer: nn.Module, change: Mapping[str, Tensor]) -> None:
    """Write the tensors in place; a bias that was missing is a new parameter."""
    for name, value in change.items():
        table = layer._parameters if name in layer._parameters else layer._buffers
        old = table.get(name)
        if old is not None:
            write(old, value)
        elif isinstance(value, nn.Parameter):
            layer._parameters[name] = value


def _repaired(unit: Norm, goal: _Units, before: _Units, after: _Units) -> Repaired:
    """Medians over the units that vary in the endpoints."""
    varies = np.flatnonzero(goal.deviation)

    def median(values: Array) -> float:
        return float(np.median(values[varies] / goal.deviation[varies])) if varies.size else math.nan

    return Repaired(
        unit.name,
        type(unit.layer).__name__,
        scale_before=median(before.deviation),
        scale_after=median(after.deviation),
        gap_before=median(abs(before.mean - goal.mean)),
        gap_after=median(abs(after.mean - goal.mean)),
        constant=int(_is_constant(goal.deviation, after.deviation)[varies].sum()),
    )
