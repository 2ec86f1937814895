"""Squeeze-and-excite gates: y·s, with a factor for each sample and channel, and gradients in fewer passes over memory.

PyTorch multiplies and then sums for the gradient of s, and writes the gradient of the pooling to a whole tensor. Here
Σ grad·y is one pass without a result of y's size, and the pooling's gradient is expanded, not stored.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from batchnorm import kernels
from batchnorm.kernels.contract import UnavailableError
from batchnorm.kernels.cpu import products
from batchnorm.surgery._shared.activations import is_bypassable

_LEAST_VALUES = 1 << 15
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
PRODUCTS = (torch.mul, torch.multiply)


class _Gate(torch.autograd.Function):
    """y·s: dy = grad·s, ds = Σ grad·y over the positions."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(y, s)
        return y * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, s = ctx.saved_tensors
        dy = grad * s if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dy, None
        return dy, _sums_of_products(grad, y).to(s.dtype).view_as(s)


def _sums_of_products(grad: Tensor, y: Tensor) -> Tensor:
    """Σ grad·y over the positions, by PyTorch's operators where the result is differentiated again."""
    if not torch.is_grad_enabled() and grad.stride() == y.stride():
        try:
            return products.sums_of_products(grad, y)
        except UnavailableError:
            pass
    return (grad * y).flatten(2).sum(2)


class _Pool(torch.autograd.Function):
    """The mean over the positions of each sample and channel; its gradient is an expanded tensor."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.shape = y.shape
        return pool(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad / math.prod(ctx.shape[2:])).expand(ctx.shape), None


def multiply(function: Any, left: Any, right: Any) -> Any:
    """function(left, right): operator.mul or torch.mul."""
    if function is operator.mul or function in PRODUCTS:
        for y, s in ((left, right), (right, left)):
            if _is_gate(y, s):
                return _Gate.apply(y, s)  # type: ignore[no-untyped-call]
    return function(left, right)


def pool(module: Any, *args: Any, **kwargs: Any) -> Any:
    """module(*args, **kwargs): a module that averages over all positions."""
    if len(args) == 1 and not kwargs and _averages(module) and _is_supported(args[0]):
        return _Pool.apply(args[0], module)  # type: ignore[no-untyped-call]
    return module(*args, **kwargs)


def mean(y: Any, *args: Any, **kwargs: Any) -> Any:
    """y.mean(*args, **kwargs)."""
    if _is_supported(y) and _covers_positions(y.dim(), *args, **kwargs):
        return _Pool.apply(y, lambda y: y.mean(*args, **kwargs))  # type: ignore[no-untyped-call]
    return y.mean(*args, **kwargs)


def _averages(module: Any) -> bool:
    size = module.output_size if type(module) in POOLS else None
    return bool(size == 1 or (isinstance(size, tuple) and set(size) == {1})) and is_bypassable(module)


def _covers_positions(dims: int, dim: Any = None, keepdim: Any = False, **others: Any) -> bool:
    """Whether y.mean(dim, keepdim) averages over all positions, and keeps their dimensions."""
    if others or keepdim is not True or not isinstance(dim, tuple | list):
        return False
    return all(type(d) is int for d in dim) and sorted(d % dims for d in dim) == list(range(2, dims))


def _is_gate(y: Any, s: Any) -> bool:
    if type(y) not in _PLAIN or type(s) not in _PLAIN or not s.requires_grad or y.dtype is not s.dtype:
        return False
    return s.shape == (*y.shape[:2], *[1] * (y.dim() - 2)) and s.device == y.device and _is_supported(y)


def _is_supported(y: Any) -> bool:
    """Whether the gradients are faster here: of large CPU tensors, in steps that PyTorch runs eagerly."""
    if type(y) not in _PLAIN or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not y.requires_grad:
        return False
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or y.numel() < _LEAST_VALUES:
        return False
    return products.why_unsupported(y) is None and kernels.choose(y).name == "cpu"
