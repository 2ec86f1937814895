"""The functions that rewritten methods call in place of a product and of an average over positions.

Each returns what the code that it replaces did; gates and their averages have faster gradients (`batchnorm.autograd`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from batchnorm import kernels
from batchnorm.autograd import average, gate
from batchnorm.kernels.cpu import products
from batchnorm.surgery._shared.activations import is_bypassable

POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
PRODUCTS = (torch.mul, torch.multiply)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def multiply(function: Any, left: Any, right: Any) -> Any:
    """function(left, right): operator.mul or torch.mul."""
    if function is operator.mul or function in PRODUCTS:
        for y, s in ((left, right), (right, left)):
            if _is_gate(y, s):
                return gate(y, s)
    return function(left, right)


def pool(module: Any, *args: Any, **kwargs: Any) -> Any:
    """module(*args, **kwargs): a module that averages over all positions."""
    if len(args) == 1 and not kwargs and _averages(module) and _is_supported(args[0]):
        return average(args[0], module)
    return module(*args, **kwargs)


def mean(y: Any, *args: Any, **kwargs: Any) -> Any:
    """y.mean(*args, **kwargs)."""
    if _is_supported(y) and _covers_positions(y.dim(), *args, **kwargs):
        return average(y, lambda y: y.mean(*args, **kwargs))
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
    """Whether s is a factor for each sample and channel of y, and `gate` is faster than PyTorch's product."""
    if type(y) not in _PLAIN or type(s) not in _PLAIN or not s.requires_grad or y.dtype is not s.dtype:
        return False
    return s.shape == (*y.shape[:2], *[1] * (y.dim() - 2)) and s.device == y.device and _is_supported(y)


def _is_supported(y: Any) -> bool:
    """Whether the gradients are faster here: of large CPU tensors, in steps that PyTorch runs eagerly."""
    if type(y) not in _PLAIN or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not y.requires_grad:
        return False
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0:
        return False
    return products.why_unsupported(y) is None and kernels.choose(y).name == "cpu"
