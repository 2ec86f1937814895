"""average(): the mean of several states of one network (SWA, EMA, a soup), with the statistics that belong to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.records import Record
from batchnorm.restoring import all_or_nothing, put, unwrapped
from batchnorm.surgery._shared.calling import ForwardFn
from batchnorm.surgery._shared.layers import check_module
from batchnorm.surgery.recalibrate import Recalibration, recalibrate
from batchnorm.words import plural

__all__ = ["Averaging", "average"]


@dataclass(frozen=True, slots=True, repr=False)
class Averaging(Record):
    """What `average` did.

    Attributes:
        states: how many states the weights are the mean of.
        tensors: how many tensors of the state dict were averaged: those of floating point.
        recalibration: the record of the `recalibrate` that followed.
    """

    states: int
    tensors: int
    recalibration: Recalibration

    def _head(self) -> list[str]:
        averaged = f"{plural(self.tensors, 'tensor')} averaged over {plural(self.states, 'state')}"
        return [averaged, str(self.recalibration)]


def average(
    model: nn.Module,
    states: Iterable[nn.Module | Mapping[str, Any]],
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Averaging:
    """Average the weights of several states of one network, and measure the running statistics that belong to them.

    θ = Σ w·θ_i/Σ w, in float64, for the weights θ_i of the states and their shares w; then `recalibrate` measures the
    running statistics of θ. The model is changed in place.

    The statistics of averaged weights are not the average of statistics: each state's belong to its own activations.
    That is why an averaged model looks poor until it is recalibrated (Izmailov et al. 2018, "Averaging weights leads to
    wider optima", section 3.2), and why torch.optim.swa_utils has update_bn. Here both are one call, the statistics are
    pooled exactly, whatever the batches, and with `metric` the better of the averaged and the recalibrated statistics
    stay.

    Args:
        model: changed in place; nothing of it where an error is raised. Parallel and compiled wrappers, and
            torch.optim.swa_utils.AveragedModel, are looked through.
        states: state dicts or modules of the same network: checkpoints of one training, several trainings, or one
            model whose weights are an average already (an EMA, an AveragedModel).
        batches: the data to recalibrate on, such as a DataLoader; as `recalibrate` takes them.
        forward_fn: forward_fn(model, batch) runs the model on a batch; by default model(batch), as of `recalibrate`.
        weights: the share w of each state, >= 0; equal shares where None.
        options: those of `recalibrate`: exact, tolerance, metric, higher_is_better, device, progress,
            nonfinite and also.

    Returns:
        How many states and tensors were averaged, and the record of the recalibration.

    Integer tensors, which have no mean, are those of the last state.

    Raises TypeError on what is no state, ValueError on no states, on weights that do not fit, and on states of another
    network, with the first key that differs.
    """
    inner = _network(model)
    given = [_state(each, at) for at, each in enumerate(states)]
    if not given:
        raise ValueError("average needs at least one state: pass state dicts or modules")
    parts = [1.0] * len(given) if weights is None else [float(each) for each in weights]
    if len(parts) != len(given) or not all(0 <= each < float("inf") for each in parts) or sum(parts) == 0:
        raise ValueError(f"weights must be {len(given)} numbers >= 0, not all 0, got {weights}")
    own = inner.state_dict(keep_vars=True)
    for at, state in enumerate(given):
        for name in (*own, *state):
            if name not in own or name not in state:
                where = "in it" if name in state else "missing"
                raise ValueError(f"state {at} is of another network: {name} is {where}")
            if own[name].shape != state[name].shape:
                shapes = tuple(state[name].shape), tuple(own[name].shape)
                raise ValueError(f"state {at} is of another network: {name} has shape {shapes[0]}, here {shapes[1]}")
    averaged = {
        name: sum(
            (
                part / sum(parts) * state[name].to("cpu", torch.float64)
                for part, state in zip(parts, given, strict=True)
            ),
            start=torch.zeros((), dtype=torch.float64),
        )
        for name, tensor in own.items()
        if tensor.is_floating_point()
    }
    with all_or_nothing(inner, own.values()):
        for name, tensor in own.items():
            put(tensor, averaged.get(name, given[-1][name]))
        recalibration = recalibrate(inner, batches, forward_fn, **options)
    return Averaging(len(given), len(averaged), recalibration)


def _network(model: nn.Module) -> nn.Module:
    check_module("average", model)
    inner = unwrapped(model)
    return unwrapped(inner.module) if isinstance(inner, torch.optim.swa_utils.AveragedModel) else inner


def _state(given: object, at: int) -> Mapping[str, Tensor]:
    if isinstance(given, nn.Module):
        return _network(given).state_dict()
    if not isinstance(given, Mapping) or not all(isinstance(value, Tensor) for value in given.values()):
        raise TypeError(f"state {at} is no state dict (names to tensors) and no module, but {type(given).__name__}")
    return given
