"""Which tensors the compiled CPU loops are for: those that they cover, and run faster than PyTorch's operators."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from batchnorm.kernels.cpu import threads
from batchnorm.kernels.layout import CHANNELS_LAST

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

# Where the call itself, which is Python, costs no more than the loops save: more where PyTorch's operators are quick.
_FEW_VALUES = 500_000
_FEW_VALUES_IN_INFERENCE = 6_000_000
_FEW_VALUES_IN_SHORT_SLICES = 1_500_000
_FEW_VALUES_IN_ROWS = 6_000_000
_FEW_VALUES_IN_LONG_ROWS = 12_000_000
_SLOW_SLICE = 64  # values
_LONG_ROW = 256  # channels
_FEW_CHANNELS = 4


def uncovered(x: Tensor, training: bool, fused: bool, tapped: bool = False) -> str | None:
    """Why the loops are not for this tensor, or None where they are; `tapped`: its by-products are wanted, too."""
    if tapped:  # small ones as well: PyTorch's operators would need a dozen calls
        return _foreign(x)
    values = x.numel()
    if values < _FEW_VALUES:
        return _too_few(_FEW_VALUES, "the call itself would cost more than the work")
    if not (training or fused):
        return "inference without an activation or a residual is one pass over memory by either"
    if not training and values < _FEW_VALUES_IN_INFERENCE:
        return _too_few(_FEW_VALUES_IN_INFERENCE, "in inference PyTorch's operators are quick")
    return _foreign(x) or _slow(x)


def _foreign(x: Tensor) -> str | None:
    """Why the loops cannot run it."""
    if x.device.type != "cpu":
        return f"no faster kernel for device {x.device.type!r} is built in"
    if x.dtype not in KINDS:
        return f"the compiled loops are for float32, bfloat16 and float64, not {x.dtype}"
    if x.layout != torch.strided or x.dim() < 2:
        return "the compiled loops are for dense tensors (N, C, *)"
    last = CHANNELS_LAST.get(x.dim())
    if not x.is_contiguous() and (last is None or not x.is_contiguous(memory_format=last)):
        return "the tensor is neither contiguous nor channels_last, and a copy would cost what the loops save"
    return None


def _slow(x: Tensor) -> str | None:
    """Why PyTorch's operators are quicker."""
    values, channels = x.numel(), x.shape[1]
    if x.dim() == 2 or not x.is_contiguous():
        few = _FEW_VALUES_IN_LONG_ROWS if channels > _LONG_ROW else _FEW_VALUES_IN_ROWS
        if values < few:
            return _too_few(few, f"in rows of {channels} channels PyTorch's operators are quick")
    elif values < _FEW_VALUES_IN_SHORT_SLICES and values < x.shape[0] * channels * _SLOW_SLICE:
        return _too_few(_FEW_VALUES_IN_SHORT_SLICES, f"slices shorter than {_SLOW_SLICE} are slow")
    if not threads.shared() and torch.get_num_threads() > 1:
        return "PyTorch's OpenMP runtime has no GOMP_parallel here, so the compiled loops would run on one thread"
    if channels < _FEW_CHANNELS:
        return f"fewer than {_FEW_CHANNELS} channels, too few to share between threads"
    return None


@cache
def _too_few(few: int, why: str) -> str:
    return f"fewer than {few:,} values, {why}"
