"""Running a model to look at it: its state, the random numbers and PyTorch's settings are as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from batchnorm.restoring import unchanged

_NARROWER = ("tf32", "bf16")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients and full float32 precision inside; afterwards the model and the random numbers are as before."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_full_precision())
        stack.enter_context(unchanged(model))
        yield


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """The generators go on afterwards as if nothing had been drawn."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 is multiplied as float32: in TF32 or bfloat16 two right answers differ in the fourth digit."""
    backends: Any = torch.backends
    operators = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [(operator, operator.fp32_precision) for operator in operators]
    narrow = [(operator, precision) for operator, precision in before if precision in _NARROWER]
    try:
        for operator, _ in narrow:
            operator.fp32_precision = "ieee"
        yield
    finally:
        for operator, precision in narrow:
            operator.fp32_precision = precision
