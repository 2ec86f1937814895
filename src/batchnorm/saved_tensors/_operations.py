"""The operations that are followed after a batch norm: deterministic, element by element, or padding with a constant.

By PyTorch's function, as a TorchFunctionMode sees it: the function that computes the same in new memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.autograd import gate

Function = Callable[..., Tensor]

# Of the functions with `inplace`: the place of this argument.
_INPLACE: dict[Function, int] = {
    **dict.fromkeys((F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.mish, F.selu), 1),
    **dict.fromkeys((F.leaky_relu, F.elu, F.celu), 2),
    **dict.fromkeys((F.hardtanh, F.threshold), 3),
}
_ACTIVATIONS: tuple[Function, ...] = (F.gelu, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid, F.hardshrink)
_METHODS = ("relu", "sigmoid", "tanh", "add", "sub", "mul", "clamp")
_OPERATORS = {"__add__": "add", "__sub__": "sub", "__mul__": "mul", "__radd__": "add", "__rmul__": "mul"}
_IN_PLACE_OPERATORS = {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul"}
_COPIES = ("to", "float", "double", "half", "bfloat16", "contiguous", "clone")


def _table() -> dict[Any, Function]:
    table: dict[Any, Function] = {function: function for function in (*_INPLACE, *_ACTIVATIONS, F.pad)}
    for name in _METHODS:
        function = getattr(torch, name)
        for owner, spelled in ((torch, name), (torch, f"{name}_"), (Tensor, name), (Tensor, f"{name}_")):
            if hasattr(owner, spelled):
                table[getattr(owner, spelled)] = function
    for spelled, name in (_OPERATORS | _IN_PLACE_OPERATORS).items():
        table[getattr(Tensor, spelled)] = getattr(torch, name)
    for name in ("leaky_relu_", "elu_", "hardtanh_"):
        table[getattr(F, name)] = getattr(F, name[:-1])
    table[gate] = torch.mul
    for name in _COPIES:
        table[getattr(Tensor, name)] = getattr(Tensor, name)
    return table


REPLAYED: dict[Any, Function] = _table()
"""By function: what computes the same result in new memory."""


EXPOSING: tuple[Any, ...] = (
    *(Tensor.data.__get__, Tensor.data_ptr, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__),  # type: ignore[attr-defined]
    *(Tensor.untyped_storage, Tensor.storage),
)
"""Functions whose result has the tensor's memory, and not its version."""


def _overwriting() -> dict[Any, Function]:
    named: dict[Any, Any] = {
        torch.add: Tensor.add_,
        torch.sub: Tensor.sub_,
        torch.mul: Tensor.mul_,
        torch.relu: torch.relu_,
    }
    table: dict[Any, Function] = {called: named[function] for called, function in REPLAYED.items() if function in named}
    return table | {function: partial(function, inplace=True) for function in _INPLACE}


OVERWRITING: dict[Any, Function] = _overwriting()
"""By function: what computes the same result in the memory of its first argument, of the result's shape and type."""

COPIES: frozenset[Any] = frozenset(getattr(Tensor, name) for name in _COPIES)
"""Functions whose result may have another type."""

CONVERTED: tuple[Any, ...] = (
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.addmm, torch.mm),
)
"""Functions of which autocast converts the arguments; backward reads the converted ones."""


def out_of_place(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]] | None:
    """The arguments for `REPLAYED[function]`; None if the call is not followed."""
    if "out" in kwargs or any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    if function is F.pad:
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        return (list(args), kwargs) if mode == "constant" else None
    place = _INPLACE.get(function)
    if place is None:
        return list(args), kwargs
    given = [value for number, value in enumerate(args) if number != place]  # the last one
    return given, {name: value for name, value in kwargs.items() if name != "inplace"}
