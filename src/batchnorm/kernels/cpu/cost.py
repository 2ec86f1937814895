"""Whether the compiled loops run a tensor, or PyTorch's operators are quicker: an estimate from the machine's facts.

The difference has three parts. Our call takes longer in Python; PyTorch's operators take more instructions for each
value; and they move more memory, since every operator reads and writes its tensors. The constants were fitted to
`make sweep` on a processor at about 4 GHz; the bandwidth is measured on the machine (`machine.facts`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from batchnorm.kernels.cpu import compiler, threads
from batchnorm.kernels.cpu.machine import facts
from batchnorm.kernels.cpu.plan import KINDS, SHORT_SLICE
from batchnorm.kernels.layout import why_not_dense

NOT_SHARED = "PyTorch's OpenMP runtime has no GOMP_parallel here"

# Seconds by which our call from Python is longer; PyTorch's is longer, too, where an activation follows.
_CALL = 38e-6
_CALL_FUSED = 30e-6
_CALL_IN_INFERENCE = 14e-6
# Seconds by which PyTorch's operators take longer for a value, on one thread, its tensors in the cache.
_VALUE = 1.6e-9
_VALUE_IN_ROWS = 0.2e-9
_CHANNEL = -12e-9
# Tensors of x's size that PyTorch's operators move and the loops do not.
_TENSORS = 4
_TENSORS_IN_INFERENCE = 3


def why_unsupported(x: Tensor, training: bool, fused: bool, tapped: bool = False) -> str | None:
    """Why the loops do not run this tensor; None if they do. `tapped`: by-products are recorded, too."""
    impossible = why_not_possible(x)
    if impossible is not None or tapped:  # to record a small one with PyTorch's operators would take a dozen calls
        return impossible
    if not (training or fused):
        return "inference without an activation or a residual is one pass over memory either way"
    if not is_shared():
        return f"{NOT_SHARED}, so the compiled loops would run on one thread"
    span = x.stride(1) if x.is_contiguous() and x.dim() > 2 else 1
    if _gain(x.numel(), x.shape[1], span, x.element_size(), training, fused, torch.get_num_threads()) < 0:
        return _TOO_SMALL
    return None


_TOO_SMALL = "so small that the call would cost more than the loops save"


def is_shared() -> bool:
    """Whether the loops run on as many threads as PyTorch's operators."""
    return threads.can_share() or torch.get_num_threads() == 1


def why_not_possible(x: Tensor) -> str | None:
    """Why the loops cannot run this tensor, whatever its size; None if they can."""
    if x.device.type != "cpu":
        return f"no faster kernel for device {x.device.type!r} is built in"
    if x.dtype == torch.float16 and not _converts_float16():
        return "this processor does not convert float16"
    return why_not_dense(x, KINDS, "float32, bfloat16, float16 and float64", "the compiled loops")


def _converts_float16() -> bool:
    try:
        return compiler.converts_float16()
    except ImportError:  # the first call of the kernel says what to install
        return True


_converts_float16._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch.compile stores the answer


@lru_cache(maxsize=4096)
def _gain(
    values: int, channels: int, span: int, itemsize: int, training: bool, fused: bool, count_threads: int
) -> float:
    """The seconds that the loops save, by estimate."""
    size = values * itemsize
    known = facts()
    if not training:
        if 3 * size <= known.cached_bytes:  # then PyTorch's second operator finds the first one's result there
            return -_CALL_IN_INFERENCE
        return _TENSORS_IN_INFERENCE * size / known.copy_speed(3 * size) - _CALL_IN_INFERENCE
    work = values * (_VALUE_IN_ROWS if span < SHORT_SLICE else _VALUE) + channels * _CHANNEL
    moved = _TENSORS * size if fused else 0
    return work / count_threads + moved / known.copy_speed(2 * size) - (_CALL_FUSED if fused else _CALL)
