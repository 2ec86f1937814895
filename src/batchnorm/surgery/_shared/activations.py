"""Which module, function or method of PyTorch's is which activation of `batchnorm.functional.batch_norm`.

Only what the layers compute exactly: GELU without the tanh approximation, ELU with alpha = 1, and exact types, since a
subclass may mean anything by its forward.
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
    """An act of the layers', with leaky_relu's slope; None is the identity."""

    act: str | None
    slope: float = 0.01


_MODULES: dict[type[nn.Module], str | None] = {
    nn.Identity: None,
    **{getattr(nn, row.module): act for act, row in ACTIVATIONS.items()},
}
_CLASSES: dict[str | None, Callable[..., nn.Module]] = {act: module for module, act in _MODULES.items()}

# By function: the act, and the names of the arguments after the input.
_FUNCTIONS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    operator.attrgetter(path)(torch): (act, names)
    for act, row in ACTIVATIONS.items()
    for path, names in row.functions.items()
}

# As it is before anything (a tracer, a profiler) puts its own in its place.
_CALL = nn.Module.__call__

METHODS = {
    path: Activation(act) for act, row in ACTIVATIONS.items() for path in row.functions if hasattr(torch.Tensor, path)
}


def module_of(activation: Activation) -> nn.Module:
    """torch.nn's module for it."""
    has_slope = activation.act is not None and ACTIVATIONS[activation.act].slope is not None
    return _CLASSES[activation.act](*([activation.slope] if has_slope else []))


def bypassable(module: nn.Module) -> bool:
    """Whether calling the module just runs its class's forward: no hooks, no replaced or compiled forward or call."""
    return type(module).__call__ is _CALL and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def follows_additions(activation: Activation) -> bool:
    """Whether act(BN(x) + residual) is one transform: else the layer would run the activation by itself anyway."""
    return activation.act is None or activation.act in BY_Y


def activation_of(called: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
    """The activation that `called(z, *args, **kwargs)` applies to z; None where it is not one of the layers' own."""
    if isinstance(called, nn.Module):
        if type(called) not in _MODULES or args or kwargs or not bypassable(called):
            return None
        return _checked(_MODULES[type(called)], vars(called))
    try:
        act, names = _FUNCTIONS[called]  # type: ignore[index]
    except (KeyError, TypeError):
        return None
    if len(args) > len(names):
        return None
    return _checked(act, dict(zip(names, args, strict=False)) | kwargs)


def _checked(act: str | None, settings: dict[str, Any]) -> Activation | None:
    if act is None:
        return Activation(None)
    row = ACTIVATIONS[act]
    if any(settings.get(name, value) != value for name, value in row.requires.items()):
        return None
    slope = 0.01 if row.slope is None else settings.get(row.slope, 0.01)
    return Activation(act, slope) if isinstance(slope, int | float) else None
