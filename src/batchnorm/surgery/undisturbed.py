"""Running a model to look at it: what it keeps, the random numbers and PyTorch's settings are afterwards as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.surgery.walk import opaque

_NARROWER = ("tf32", "bf16")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients and full float32 precision inside; attributes and buffers of the model as before, afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_full_precision())
        stack.enter_context(_kept(model))
        yield


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """The generators go on afterwards as if nothing had been drawn."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        yield


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Whatever forward assigns, appends or writes to a buffer is taken back. TorchScript keeps its state to itself."""
    attributes = [(m, vars(m), dict(vars(m))) for m in model.modules() if opaque(m) is None]
    held: list[tuple[Any, Any]] = []
    for _, _, values in attributes:
        held += [(value, value.copy()) for value in values.values() if type(value) in (dict, list)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if _plain(buffer)]
    try:
        yield
    finally:
        for module, given, values in attributes:
            if vars(module) is given and _differ(given, values):
                given.clear()
                given.update(values)
        for value, copied in held:
            if len(value) != len(copied) or any(a is not b for a, b in zip(_flat(value), _flat(copied), strict=True)):
                value.clear()
                value.extend(copied) if isinstance(value, list) else value.update(copied)
        for buffer, clone in buffers:
            if not torch.equal(buffer, clone):  # a batch norm moves its statistics without a change of their version
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(clone)


def _differ(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() != before.keys() or any(now[name] is not value for name, value in before.items())


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [part for pair in value.items() for part in pair]


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
