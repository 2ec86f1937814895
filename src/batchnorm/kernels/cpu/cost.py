"""Whether the compiled loops run a tensor, or PyTorch's operators are quicker: an estimate from the machine's facts.

The difference has three parts. Our call takes longer in Python; PyTorch's operators take more instructions for each
value; and they move more memory, since every operator reads and writes its tensors. The constants were fitted to
`make sweep` on a processor at about 4 GHz; the bandwidth is measured on the machine (`machine.facts`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from batchnorm.kernels.cpu import threads
from batchnorm.kernels.cpu.machine import facts
from batchnorm.kernels.cpu.plan import KINDS, SHORT_SLICE
from batchnorm.kernels.layout import why_not_dense

NOT_SHARED = "PyTorch's OpenMP runtime has no GOMP_parallel here"

# Seconds by which our call from Python is longer.
_CALL_IN_TRAINING = 8e-6
_CALL_IN_INFERENCE = 14e-6
# Seconds by which PyTorch's operators take longer for a value, on one thread, its tensors in the cache.
_VALUE = 1.6e-9
_VALUE_IN_ROWS = 0.4e-9
_VALUE_IN_INFERENCE = 0.0
_VALUE_OF_SHORT_SLICES = -0.3e-9  # inference, contiguous
_SHORT = 128  # values
# Tensors of x's size that PyTorch's operators move and the loops do not.
_TENSORS_IN_TRAINING = 4
_TENSORS_UNFUSED = 0
_TENSORS_IN_INFERENCE = 3


def why_unsupported(x: Tensor, training: bool, fused: bool, tapped: bool = False) -> str | None:
    """Why the loops do not run this tensor; None if they do. `tapped`: by-products are recorded, too."""
    impossible = _why_not_possible(x)
    if (
        impossible is not None or tapped
    ):  # small ones are recorded as well: PyTorch's operators would need a dozen calls
        return impossible
    if not (training or fused):
        return "inference without an activation or a residual is one pass over memory either way"
    if not is_shared():
        return f"{NOT_SHARED}, so the compiled loops would run on one thread"
    span = x.stride(1) if x.is_contiguous() and x.dim() > 2 else 1
    if _gain(x.numel(), span, x.element_size(), training, fused, torch.get_num_threads()) < 0:
        return _TOO_SMALL
    return None


_TOO_SMALL = "so small that the call would cost more than the loops save"


def is_shared() -> bool:
    """Whether the loops run on as many threads as PyTorch's operators."""
    return threads.can_share() or torch.get_num_threads() == 1


def _why_not_possible(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"no faster kernel for device {x.device.type!r} is built in"
    return why_not_dense(x, KINDS, "float32, bfloat16, float16 and float64", "the compiled loops")


@lru_cache(maxsize=4096)
def _gain(values: int, span: int, size: int, training: bool, fused: bool, count_threads: int) -> float:
    """The seconds that the loops save, by estimate."""
    in_rows = span < SHORT_SLICE
    if training:
        per_value, call = _VALUE_IN_ROWS if in_rows else _VALUE, _CALL_IN_TRAINING
        tensors = _TENSORS_IN_TRAINING if fused else _TENSORS_UNFUSED
    else:
        per_value, call, tensors = _VALUE_IN_INFERENCE, _CALL_IN_INFERENCE, _TENSORS_IN_INFERENCE
        if not in_rows and span < _SHORT:
            per_value = _VALUE_OF_SHORT_SLICES
    moved = tensors * values * size
    return values * per_value / count_threads + moved / facts().copy_speed(2 * values * size) - call
