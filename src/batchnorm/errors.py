"""Error messages for batch norm calls: what was wrong with the arguments, and what to do.

PyTorch decides which calls fail, and with which type of error; this module replaces the message. It runs only after an
error, so successful calls pay nothing. Other checks run before every call: `layers.py` checks the number of dimensions,
`functional.py` checks eps, the residual and the number of values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

Vectors = dict[str, Tensor | None]

_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class NotATensorError(TypeError, AttributeError):
    """An argument is not a tensor. PyTorch raises either of the two bases; this error is caught as both."""


def not_a_tensor(name: str, value: object) -> NotATensorError:
    """The error for `value` passed as the tensor `name`."""
    remedy = "convert it with torch.as_tensor" if name == "input" else "pass a tensor or None"
    return NotATensorError(f"{name} must be a torch.Tensor, got {type(value).__name__}: {remedy}")


def batch_norm_error(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: object,
    eps: object,
) -> str | None:
    """The better message for a call that failed with these arguments; None if no mistake is recognized."""
    running = {"running_mean": running_mean, "running_var": running_var}
    vectors = running | {"weight": weight, "bias": bias}
    return next(_mistakes(input, running, vectors, training, {"momentum": momentum, "eps": eps}), None)


def too_few_dimensions(input: Tensor) -> str:
    """For an input without a batch or without channels."""
    shape = tuple(input.shape)
    return f"input must be (N, C) or (N, C, *spatial), got {input.dim()}D of shape {shape}: add the batch"


def _mistakes(
    input: Tensor, running: Vectors, vectors: Vectors, training: object, numbers: dict[str, object]
) -> Iterator[str]:
    """Each mistake in words: the cause of the error first."""
    if not isinstance(training, bool):
        yield f"training must be a bool, got {type(training).__name__}: pass True or False"
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            hint = ": momentum=None (a cumulative average) is a layer's option" if value is None else ""
            yield f"{name} must be a float, got {type(value).__name__}{hint}"
    if input.dim() < 2:
        yield too_few_dimensions(input)
    if input.layout != torch.strided:
        yield f"input must be dense, got layout {input.layout}: use input.to_dense()"
    if input.dtype not in _TYPES:
        remedy = "use input.dequantize()" if input.is_quantized else "use input.float()"
        if input.is_complex():
            remedy = "normalize its real and imaginary parts as channels, torch.view_as_real(input)"
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        yield f"input must be of type {types}, got {input.dtype}: {remedy}"
    missing = [name for name, vector in running.items() if vector is None]
    if not training and missing:
        yield f"{' and '.join(missing)} must be given if training=False: pass the running statistics, or training=True"
    if len(missing) == 1:
        yield f"running_mean and running_var must be given both or neither; {missing[0]} is None"
    present = {name: vector for name, vector in vectors.items() if vector is not None}
    channels = input.shape[1]
    for name, vector in present.items():
        if vector.numel() != channels:
            yield (
                f"{name} should contain {channels} elements, one per channel of the input {tuple(input.shape)}, "
                f"not {vector.numel()}: set num_features={channels}, or pass the input with channels second"
            )
    for name, vector in present.items():
        if vector.device != input.device:
            remedy = f"move the layer with .to({str(input.device)!r})"
            yield f"{name} is on {vector.device}, the input on {input.device}: {remedy}"
    types_used = {vector.dtype for vector in present.values()}
    allowed = {input.dtype, torch.float32} if input.dtype in (torch.float16, torch.bfloat16) else {input.dtype}
    if types_used - allowed or len(types_used) > 1:
        names = ", ".join(f"{name} {vector.dtype}" for name, vector in present.items())
        yield (
            f"mixed dtype: the input is {input.dtype}, but {names}: use one type for all (layer.to(input.dtype)); "
            "only with a float16 or bfloat16 input may all parameters and statistics be float32"
        )
    for name, average in running.items():
        if average is not None and average.requires_grad:
            yield f"{name} requires grad, but it is a constant of the transform: pass {name}.detach()"
        elif average is not None and forward_ad.unpack_dual(average).tangent is not None:  # type: ignore[no-untyped-call]
            yield f"{name} carries a forward gradient, but it is a constant of the transform: pass its primal"
