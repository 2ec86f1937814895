"""Which tensors the GPU kernels are for, and whether Triton can be had for them."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.contract import UnavailableError
from batchnorm.kernels.layout import CHANNELS_LAST

TYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
ACTIVATIONS: frozenset[str | None] = frozenset(
    (None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid", "tanh")
)

# A launch from Python takes a while, which only large tensors hide. From which size on is for a GPU to tell: until then
# the kernels keep to what they are made for.
_SMALL = 8 << 20  # bytes


ASKED_FOR = os.environ.get("BATCHNORM_GPU_KERNELS") == "1"
"""Whether they are to be used. No GPU has run them yet: until one has, nobody gets them unasked."""

_TRITON_IS_THERE = find_spec("triton") is not None


class Code(NamedTuple):
    """The modules in Triton's language."""

    moments: ModuleType
    forward: ModuleType
    sums: ModuleType
    backward: ModuleType
    resident: ModuleType
    rounds: ModuleType


@cache
def loaded() -> Code:
    """Import Triton and what is written in it. Raises UnavailableError."""
    try:
        return Code(*(import_module(f"batchnorm.kernels.gpu._triton.{part}") for part in Code._fields))
    except ImportError as error:
        raise UnavailableError(f"Triton cannot be imported ({error}): install it with pip install triton") from error


def uncovered(x: Tensor, training: bool, fused: bool, tapped: bool = False) -> str | None:
    """Why the GPU kernels are not for this CUDA tensor, or None where they are."""
    if not ASKED_FOR:
        return "the GPU kernels have not run on a GPU yet: set BATCHNORM_GPU_KERNELS=1 before the start to try them"
    if not _TRITON_IS_THERE:
        return "Triton, which the GPU kernels are written in, is not installed: pip install triton"
    if not (training or fused or tapped):
        return "inference without an activation or a residual is one pass over memory by either"
    if not tapped and x.numel() * x.element_size() < _SMALL:
        return f"less than {_SMALL >> 20} MiB, where launches may cost more than the work"
    if x.dtype not in TYPES:
        return f"the GPU kernels are for float32, bfloat16 and float16, not {x.dtype}"
    if x.layout != torch.strided or x.dim() < 2:
        return "the GPU kernels are for dense tensors (N, C, *)"
    last = CHANNELS_LAST.get(x.dim())
    if not x.is_contiguous() and (last is None or not x.is_contiguous(memory_format=last)):
        return "the tensor is neither contiguous nor channels_last, and a copy would cost what the kernels save"
    return None
