"""How a tensor lies in memory, and how what goes with it is laid out alike. For the kernels that run along memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of y and dx, as PyTorch's batch_norm returns them: channels_last where x is laid out so."""
    last = CHANNELS_LAST.get(x.dim())
    for known in (torch.contiguous_format, last):
        if known is not None and x.is_contiguous(memory_format=known):
            return known
    return suggest_memory_format(x)  # of strides with gaps; its first call imports for a third of a second


def alike(tensor: Tensor, dtype: torch.dtype, laid: torch.memory_format) -> Tensor:
    """The tensor in this type and format; itself where it is so."""
    if tensor.dtype == dtype and tensor.is_contiguous(memory_format=laid):
        return tensor
    return tensor.to(dtype).contiguous(memory_format=laid)


def dense(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """The vector itself where it is as wanted: to ask costs a tenth of a conversion that changes nothing."""
    return vector if vector.dtype == dtype and vector.is_contiguous() else vector.to(dtype).contiguous()
