"""Map PyTorch's modules, functions and methods to the activations that a layer can fuse.

Only exact equivalents: GELU without the tanh approximation, ELU with alpha = 1, and no subclasses, which may override
forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.activations import ACTIVATIONS, BY_Y


class Activation(NamedTuple):
    """The `act` and `negative_slope` of a layer; None is the identity."""

    act: str | None
    slope: float = 0.01


_MODULES: dict[type[nn.Module], str | None] = {
    nn.Identity: None,
    **{getattr(nn, row.module): act for act, row in ACTIVATIONS.items()},
}
_CLASSES: dict[str | None, Callable[..., nn.Module]] = {act: module for module, act in _MODULES.items()}

# By function: the activation, and the names of the arguments after the input.
_FUNCTIONS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    operator.attrgetter(path)(torch): (act, names)
    for act, row in ACTIVATIONS.items()
    for path, names in row.functions.items()
}

# The original, before a tracer or a profiler replaces it.
_CALL = nn.Module.__call__

METHODS = {
    path: Activation(act) for act, row in ACTIVATIONS.items() for path in row.functions if hasattr(torch.Tensor, path)
}


def module_of(activation: Activation) -> nn.Module:
    """The torch.nn module of an activation."""
    has_slope = activation.act is not None and ACTIVATIONS[activation.act].slope is not None
    return _CLASSES[activation.act](*([activation.slope] if has_slope else []))


def is_bypassable(module: nn.Module) -> bool:
    """Whether a call only runs the class's forward: no hooks, no replaced or compiled forward or call."""
    return type(module).__call__ is _CALL and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def can_follow_addition(activation: Activation) -> bool:
    """Whether a kernel fuses act(BN(x) + residual)."""
    return activation.act is None or activation.act in BY_Y


def activation_of(called: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
    """The activation that `called(z, *args, **kwargs)` computes; None if a layer cannot fuse it."""
    if isinstance(called, nn.Module):
        if type(called) not in _MODULES or args or kwargs or not is_bypassable(called):
            return None
        return _with_settings(_MODULES[type(called)], vars(called))
    try:
        act, names = _FUNCTIONS[called]  # type: ignore[index]
    except (KeyError, TypeError):
        return None
    if len(args) > len(names):
        return None
    return _with_settings(act, dict(zip(names, args, strict=False)) | kwargs)


def _with_settings(act: str | None, settings: dict[str, Any]) -> Activation | None:
    if act is None:
        return Activation(None)
    row = ACTIVATIONS[act]
    if any(settings.get(name, value) != value for name, value in row.requires.items()):
        return None
    slope = 0.01 if row.slope is None else settings.get(row.slope, 0.01)
    return Activation(act, slope) if isinstance(slope, int | float) else None
