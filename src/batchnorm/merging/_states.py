"""What the merging tools take for a state of a network, and how they read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from batchnorm.restoring import unwrapped
from batchnorm.surgery._shared.layers import check_module

State: TypeAlias = Mapping[str, Any] | nn.Module
"""A state dict (names to tensors), or a module that has one."""


def network(tool: str, model: nn.Module) -> nn.Module:
    """The model inside the wrappers for parallel, compiled and averaged models. Raises TypeError if it is no module."""
    check_module(tool, model)
    inner = unwrapped(model)
    return unwrapped(inner.module) if isinstance(inner, torch.optim.swa_utils.AveragedModel) else inner


def read_states(tool: str, states: Iterable[State]) -> list[Mapping[str, Tensor]]:
    """The state dicts of all states. Raises TypeError for another kind of object, and ValueError without states."""
    single = isinstance(states, Mapping | nn.Module | str) and not isinstance(states, nn.ModuleList)
    if single or not isinstance(states, Iterable):
        raise TypeError(f"{tool}: states must be a list of state dicts or modules, got {type(states).__name__}")
    loaded = [_state(tool, state, index) for index, state in enumerate(states)]
    if not loaded:
        raise ValueError(f"{tool} needs at least one state: pass state dicts or modules")
    return loaded


def _state(tool: str, state: object, index: int) -> Mapping[str, Tensor]:
    if isinstance(state, nn.Module):
        return network(tool, state).state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(
            f"state {index} must be a state dict (names to tensors) or a module, not {type(state).__name__}"
        )
    return state


def check_same_network(target: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises ValueError, with the first name that differs, if a state has other names or shapes than the target."""
    for index, state in enumerate(states):
        for name in (*target, *state):
            if name not in target or name not in state:
                where = "in it" if name in state else "missing"
                raise ValueError(f"state {index} is of another network: {name} is {where}")
            shape, expected = tuple(state[name].shape), tuple(target[name].shape)
            if shape != expected:
                raise ValueError(f"state {index} is of another network: {name} has shape {shape}, here {expected}")


def check_shares(weights: Sequence[float] | None, states: int) -> list[float]:
    """The share of each state, with sum 1; equal ones by default. Raises ValueError if the weights do not fit."""
    shares = [1.0] * states if weights is None else [float(weight) for weight in weights]
    if len(shares) != states or not all(0 <= share < float("inf") for share in shares) or sum(shares) == 0:
        raise ValueError(f"weights must be {states} numbers >= 0, not all 0, got {weights}")
    return [share / sum(shares) for share in shares]
