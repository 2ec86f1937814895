"""average(): average several states of one network (SWA, EMA, a soup), and recalibrate its statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.records import Record
from batchnorm.restoring import all_or_nothing, unwrapped, write
from batchnorm.surgery._shared.calling import ForwardFn
from batchnorm.surgery._shared.layers import check_module
from batchnorm.surgery.recalibrate import Recalibration, recalibrate
from batchnorm.words import plural

__all__ = ["Averaging", "average"]


@dataclass(frozen=True, slots=True, repr=False)
class Averaging(Record):
    """What `average` did.

    Attributes:
        states: the number of states that were averaged.
        tensors: the number of tensors of the state dict that were averaged: those of floating point.
        recalibration: the record of `recalibrate`, which runs afterwards.
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
    """Average the weights of several states of one network, and measure its running statistics, in place.

    θ = Σ w·θ_i/Σ w, in float64, for the weights θ_i of the states and their shares w; then `recalibrate` measures the
    running statistics of θ.

    The statistics of averaged weights are not the average of the statistics (Izmailov et al. 2018, "Averaging weights
    leads to wider optima", section 3.2). This replaces torch.optim.swa_utils.update_bn; `metric` keeps the better of
    the averaged and the recalibrated statistics. Integer tensors are those of the last state.

    Args:
        model: changed in place; not if an error is raised. Parallel and compiled wrappers, and
            torch.optim.swa_utils.AveragedModel, are unwrapped.
        states: state dicts or modules of the same network: checkpoints of one training, several trainings, or one
            averaged model (an EMA, an AveragedModel).
        batches: the data to recalibrate on, such as a DataLoader, as of `recalibrate`.
        forward_fn: forward_fn(model, batch) runs the model on a batch; by default model(batch), as of `recalibrate`.
        weights: the share w of each state, >= 0; equal by default.
        options: those of `recalibrate`: exact, tolerance, metric, higher_is_better, device, progress, nonfinite, also.

    Returns:
        How many states and tensors were averaged, and the record of the recalibration.

    Raises TypeError if a state is neither a state dict nor a module; ValueError without states, with invalid weights,
    and with states of another network (the message has the first key that differs).
    """
    inner = _network(model)
    loaded = [_state(state, index) for index, state in enumerate(states)]
    if not loaded:
        raise ValueError("average needs at least one state: pass state dicts or modules")
    shares = [1.0] * len(loaded) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(loaded) or not all(0 <= share < float("inf") for share in shares) or sum(shares) == 0:
        raise ValueError(f"weights must be {len(loaded)} numbers >= 0, not all 0, got {weights}")
    target = inner.state_dict(keep_vars=True)
    for index, state in enumerate(loaded):
        for name in (*target, *state):
            if name not in target or name not in state:
                where = "in it" if name in state else "missing"
                raise ValueError(f"state {index} is of another network: {name} is {where}")
            shape, expected = tuple(state[name].shape), tuple(target[name].shape)
            if shape != expected:
                raise ValueError(f"state {index} is of another network: {name} has shape {shape}, here {expected}")
    averaged: dict[str, Any] = {
        name: sum(
            s / sum(shares) * state[name].to("cpu", torch.float64) for s, state in zip(shares, loaded, strict=True)
        )
        for name, tensor in target.items()
        if tensor.is_floating_point()
    }
    with all_or_nothing(inner, target.values()):
        for name, tensor in target.items():
            write(tensor, averaged.get(name, loaded[-1][name]))
        recalibration = recalibrate(inner, batches, forward_fn, **options)
    return Averaging(len(loaded), len(averaged), recalibration)


def _network(model: nn.Module) -> nn.Module:
    check_module("average", model)
    inner = unwrapped(model)
    return unwrapped(inner.module) if isinstance(inner, torch.optim.swa_utils.AveragedModel) else inner


def _state(state: object, index: int) -> Mapping[str, Tensor]:
    if isinstance(state, nn.Module):
        return _network(state).state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(
            f"state {index} must be a state dict (names to tensors) or a module, not {type(state).__name__}"
        )
    return state
