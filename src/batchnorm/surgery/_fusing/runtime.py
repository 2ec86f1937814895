"""What a fused forward calls in place of a batch norm layer, an addition and an activation: it decides as it runs.

`defer` stands for the call of the layer: it holds the input back. `add` and `apply` stand for what follows: they note
the residual, or run everything as one transform, y = act(BN(x) [+ residual]). Where something does not fit (hooks,
another shape or type, a layer put in another's place, torch.compile), the same operations run one by one, as written:
each function here takes a plain value too, and then does what the code that it stands for did.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.functional import batch_norm
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.surgery._shared.activations import (
    METHODS,
    Activation,
    activation_of,
    bypassable,
)
from batchnorm.surgery._shared.layers import FRESH
from batchnorm.variants.sync import SyncBatchNorm

LAYERS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

# The class attribute under which a module's class keeps the forward that may return a Deferred.
TAIL = "_batchnorm_tail"


class Deferred:
    """A batch norm whose input is known and whose activation is not yet: `run(x, residual, act, slope)` completes it.

    `alone` says that nothing but this object can reach x, so that other code may run before the batch norm does.
    """

    __slots__ = ("alone", "residual", "run", "x")

    def __init__(self, run: Callable[..., Tensor], x: Tensor, alone: bool) -> None:
        self.run, self.x, self.alone = run, x, alone
        self.residual: Tensor | None = None

    def finish(self, activation: Activation = Activation(None)) -> Tensor:  # noqa: B008 - immutable
        """y = act(BN(x) [+ residual])."""
        return self.run(self.x, self.residual, *activation)

    def takes(self, residual: object) -> bool:
        """Whether adding it neither broadcasts nor promotes."""
        return (
            self.residual is None
            and type(residual) in _PLAIN
            and isinstance(residual, Tensor)
            and residual.shape == self.x.shape
            and residual.dtype == self.x.dtype
            and residual.device == self.x.device
            and residual.layout == torch.strided
        )

    def plus(self, residual: Tensor) -> Deferred:
        """BN(x) + residual."""
        self.residual = residual
        return self


def defer(maker: object, module: Any, *args: Any, **kwargs: Any) -> Any:
    """module(*args, **kwargs) held back where the module is a layer of ours, or ends in one; `maker` made the input."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return module(*args, **kwargs)
    if not isinstance(module, nn.Module) or not bypassable(module):
        return module(*args, **kwargs)
    if type(module) in LAYERS:
        if len(args) == 1 and not kwargs and type(args[0]) in _PLAIN and module.act is None:
            x = args[0]
            if x.dim() in module._dims and x.is_floating_point():
                return Deferred(module._fused, x, _fresh(maker))
        return module(*args, **kwargs)
    tail = getattr(type(module), TAIL, None)
    if tail is None:
        return module(*args, **kwargs)
    held = tail(module, *args, **kwargs)
    if type(held) is Deferred and len(args) == 1 and held.x is args[0]:
        held.alone = _fresh(maker)
    return held


def _fresh(maker: object) -> bool:
    return type(maker) in FRESH and isinstance(maker, nn.Module) and bypassable(maker)


def defer_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.nn.functional.batch_norm(*args, **kwargs) held back."""
    x = args[0] if args else kwargs.get("input")
    if function is not F.batch_norm or torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return function(*args, **kwargs)
    return _deferred_batch_norm(*args, **kwargs)


def _deferred_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Deferred:
    settings = running_mean, running_var, weight, bias, training, momentum, eps
    return Deferred(partial(_batch_norm, settings), input, alone=False)


def _batch_norm(settings: tuple[Any, ...], x: Tensor, residual: Tensor | None, act: Any, slope: float) -> Tensor:
    return batch_norm(x, *settings, residual=residual, act=act, negative_slope=slope)


def settle(value: Any) -> Any:
    """The value itself, computed now if it was held back."""
    return value.finish() if type(value) is Deferred else value


def keep(value: Any) -> Any:
    """Before other code runs: what that code might change is computed first."""
    if type(value) is Deferred and (not value.alone or value.residual is not None):
        return value.finish()
    return value


def tail(value: Any) -> Any:
    """Before a forward returns: a residual that others can reach goes in first."""
    return value.finish() if type(value) is Deferred and value.residual is not None else value


def add(value: Any, residual: Any) -> Any:
    """value + residual."""
    return _add(operator.add, value, residual)


def add_right(residual: Any, value: Any) -> Any:
    """residual + value."""
    if type(value) is Deferred:
        residual = settle(residual)
        if value.takes(residual):
            return value.plus(residual)
        value = value.finish()
    return residual + value


def add_in_place(value: Any, residual: Any) -> Any:
    """value += residual."""
    return _add(operator.iadd, value, residual)


def add_function(function: Any, left: Any, right: Any) -> Any:
    """torch.add(left, right)."""
    if type(right) is Deferred and type(left) is not Deferred:
        if function is torch.add and right.takes(left):
            return right.plus(left)
        return function(left, right.finish())
    return _add(function, left, right)


def _add(function: Any, value: Any, residual: Any) -> Any:
    residual = settle(residual)
    if type(value) is Deferred:
        if value.takes(residual) and function in (operator.add, operator.iadd, torch.add):
            return value.plus(residual)
        value = value.finish()
    return function(value, residual)


def apply(called: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """called(value, *args, **kwargs): an activation, as a module or a function, or an identity."""
    if type(value) is Deferred:
        activation = activation_of(called, args, kwargs)
        if activation is not None:
            return value if activation.act is None else value.finish(activation)
        value = value.finish()
    return called(value, *args, **kwargs)


def method(name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    """value.name(*args, **kwargs): an activation or an addition."""
    if type(value) is Deferred:
        if name in METHODS and not args and not kwargs:
            return value.finish(METHODS[name])
        if name in ("add", "add_") and len(args) == 1 and not kwargs and value.takes(args[0]):
            return value.plus(args[0])
        value = value.finish()
    return getattr(value, name)(*args, **kwargs)


def through(modules: nn.Module, value: Any) -> Any:
    """What torch.nn.Sequential does with its modules; may end held back."""
    before: object = None
    for module in modules:  # type: ignore[attr-defined]
        if type(value) is Deferred:
            activation = activation_of(module, (), {})
            if activation is not None:
                value = value if activation.act is None else value.finish(activation)
                before = None
                continue
            value = value.finish()
        value = defer(before, module, value)
        before = module
    return value
