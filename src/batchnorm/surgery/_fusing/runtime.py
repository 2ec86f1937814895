"""The functions that rewritten methods call in place of a batch norm layer, an addition and an activation.

`defer` replaces the call of the layer: it defers the batch norm. `add` and `apply` replace what follows: they store the
residual, or run everything as one transform, y = act(BN(x) [+ residual]). If something does not fit (hooks, another
shape or type, a replaced layer), the operations run one by one, as written: each function also accepts
ordinary values, and then does what the code that it replaces did.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm import kernels
from batchnorm.functional import batch_norm
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.surgery._fusing.gates import mean, multiply, pool
from batchnorm.surgery._shared.activations import METHODS, Activation, activation_of, is_bypassable
from batchnorm.surgery._shared.layers import FRESH
from batchnorm.variants.sync import SyncBatchNorm

__all__ = ["add", "apply", "defer", "defer_function", "keep", "mean", "method", "multiply", "pool", "settle"]
__all__ += ["tail", "through"]

LAYERS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_ADDITIONS = (operator.add, operator.iadd, torch.add)

# The class attribute with the forward that may return a Deferred.
TAIL = "_batchnorm_tail"


class Deferred:
    """A deferred batch norm: `run(x, residual, act, slope)` computes it.

    With `alone` no other code can reach x, so that other code may run before the batch norm.
    """

    __slots__ = ("alone", "residual", "run", "x")

    def __init__(self, run: Callable[..., Tensor], x: Tensor, alone: bool) -> None:
        self.run, self.x, self.alone = run, x, alone
        self.residual: Tensor | None = None

    def finish(self, activation: Activation = Activation(None)) -> Tensor:  # noqa: B008 - immutable
        """y = act(BN(x) [+ residual])."""
        return self.run(self.x, self.residual, *activation)

    def takes(self, residual: object) -> bool:
        """Whether the residual can be added without broadcasting or type promotion."""
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


def defer(producer: object, module: Any, *args: Any, **kwargs: Any) -> Any:
    """module(*args, **kwargs), deferred if the module is or ends in a layer of ours; `producer` computed the input."""
    if torch._C._get_tracing_state() is not None or not isinstance(module, nn.Module) or not is_bypassable(module):
        return module(*args, **kwargs)
    tail = defer_layer if type(module) in LAYERS else getattr(type(module), TAIL, None)
    if tail is None:
        return module(*args, **kwargs)
    output = tail(module, *args, **kwargs)
    if type(output) is Deferred and len(args) == 1 and output.x is args[0]:
        output.alone = type(producer) in FRESH and isinstance(producer, nn.Module) and is_bypassable(producer)
    return output


def defer_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """layer(*args, **kwargs) of a layer of ours, deferred if it is called with only an input."""
    x: Any = args[0] if len(args) == 1 and not kwargs else None
    if layer.act is None and _fuses(x, layer.training) and x.dim() in layer._dims and x.is_floating_point():
        return Deferred(layer._fused, x, alone=False)
    return layer(*args, **kwargs)


def _fuses(x: Any, training: bool) -> bool:
    """Whether one call of a kernel does it; torch.compile fuses PyTorch's operators itself."""
    if type(x) not in _PLAIN:
        return False
    return not torch.compiler.is_compiling() or (training and kernels.compiled(x))


def defer_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.nn.functional.batch_norm(*args, **kwargs), deferred."""
    x: Any = args[0] if args else kwargs.get("input")
    if function is not F.batch_norm or torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return function(*args, **kwargs)
    settings = {name: value for name, value in kwargs.items() if name != "input"}

    def run(x: Tensor, residual: Tensor | None, act: Any, slope: float) -> Tensor:
        return batch_norm(x, *args[1:], residual=residual, act=act, negative_slope=slope, **settings)

    return Deferred(run, x, alone=False)


def settle(value: Any) -> Any:
    """The value, computed now if it was deferred."""
    return value.finish() if type(value) is Deferred else value


def keep(value: Any) -> Any:
    """Before other code runs: compute what that code might change."""
    if type(value) is Deferred and (not value.alone or value.residual is not None):
        return value.finish()
    return value


def tail(value: Any) -> Any:
    """Before a forward returns: compute if there is a residual, which other code might change."""
    return value.finish() if type(value) is Deferred and value.residual is not None else value


def add(function: Any, left: Any, right: Any) -> Any:
    """function(left, right): operator.add, operator.iadd or torch.add."""
    if type(right) is Deferred and type(left) is not Deferred and function is not operator.iadd:
        return right.plus(left) if function in _ADDITIONS and right.takes(left) else function(left, right.finish())
    right = settle(right)
    if type(left) is Deferred and function in _ADDITIONS and left.takes(right):
        return left.plus(right)
    return function(settle(left), right)


def apply(called: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """called(value, *args, **kwargs): an activation, as a module or a function, or an identity."""
    if type(value) is Deferred:
        activation = activation_of(called, args, kwargs)
        if activation is not None:
            return value if activation.act is None else value.finish(activation)
        value = value.finish()
    return called(value, *args, **kwargs)


def method(name: str, value: Any, *args: Any) -> Any:
    """value.name(*args): an activation or an addition."""
    if type(value) is Deferred:
        if name in METHODS and not args:
            return value.finish(METHODS[name])
        if name in ("add", "add_") and value.takes(args[0]):
            return value.plus(args[0])
        value = value.finish()
    return getattr(value, name)(*args)


def through(modules: nn.Module, value: Any) -> Any:
    """Run the modules as torch.nn.Sequential does; the result may be deferred."""
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
