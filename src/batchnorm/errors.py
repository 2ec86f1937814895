"""What was wrong with the arguments of a batch norm call, and what to do: one line for each kind of mistake.

PyTorch decides what is refused and with which type of error; here its message is replaced by one that names the
argument and the remedy. Runs only after an error, so it costs a good call nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")


class NotATensorError(TypeError, AttributeError):
    """An argument that is no tensor. PyTorch raises one or the other of its two bases; this is caught as both."""


def not_a_tensor(name: str, value: object) -> NotATensorError:
    """The error for `value` given as the tensor `name`."""
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
    """The better message for a call that failed with these arguments, or None where none is known."""
    vectors = dict(zip(_PER_CHANNEL, (running_mean, running_var, weight, bias), strict=True))
    return (
        _wrong_scalar(training, momentum, eps)
        or _wrong_input(input)
        or _wrong_statistics(running_mean, running_var, training)
        or _wrong_size(input, vectors)
        or _wrong_place(input, vectors)
        or _wrong_type(input, vectors)
        or _differentiated_statistics(running_mean, running_var)
    )


def _wrong_scalar(training: object, momentum: object, eps: object) -> str | None:
    if not isinstance(training, bool):
        return f"training must be a bool, got {type(training).__name__}: pass True or False"
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, int | float):
            hint = ": momentum=None (a cumulative average) is a layer's option" if value is None else ""
            return f"{name} must be a float, got {type(value).__name__}{hint}"
    return None


def too_few_dimensions(input: Tensor) -> str:
    """For an input without a batch or without channels."""
    shape = tuple(input.shape)
    return f"input must be (N, C) or (N, C, *spatial), got {input.dim()}D of shape {shape}: add the batch"


def _wrong_input(input: Tensor) -> str | None:
    if input.dim() < 2:
        return too_few_dimensions(input)
    if input.layout != torch.strided:
        return f"input must be dense, got layout {input.layout}: use input.to_dense()"
    if input.dtype not in _TYPES:
        named = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        return f"input must be of type {named}, got {input.dtype}: {_remedy_for_type(input)}"
    return None


def _remedy_for_type(input: Tensor) -> str:
    if input.is_quantized:
        return "use input.dequantize()"
    if input.is_complex():
        return "normalize its real and imaginary parts as channels, torch.view_as_real(input)"
    return "use input.float()"


def _wrong_statistics(running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> str | None:
    missing = [n for n, v in (("running_mean", running_mean), ("running_var", running_var)) if v is None]
    if not training and missing:
        return (
            f"{' and '.join(missing)} must be given when training=False: pass the running statistics, or training=True"
        )
    if len(missing) == 1:
        return f"running_mean and running_var must be given both or neither; {missing[0]} is None"
    return None


def _wrong_size(input: Tensor, vectors: dict[str, Tensor | None]) -> str | None:
    channels = input.shape[1]
    for name, vector in vectors.items():
        if vector is not None and vector.numel() != channels:
            return (
                f"{name} should contain {channels} elements, one for each channel of the input {tuple(input.shape)}, "
                f"not {vector.numel()}: set num_features={channels}, or give the input with channels second"
            )
    return None


def _wrong_place(input: Tensor, vectors: dict[str, Tensor | None]) -> str | None:
    for name, vector in vectors.items():
        if vector is not None and vector.device != input.device:
            remedy = f"move the layer with .to({str(input.device)!r})"
            return f"{name} is on {vector.device}, the input on {input.device}: {remedy}"
    return None


def _wrong_type(input: Tensor, vectors: dict[str, Tensor | None]) -> str | None:
    others = {name: vector.dtype for name, vector in vectors.items() if vector is not None}
    wrong = {name: dtype for name, dtype in others.items() if dtype not in (input.dtype, torch.float32)}
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    if wrong or len(set(others.values())) > 1 or (not narrow and set(others.values()) - {input.dtype}):
        named = ", ".join(f"{name} {dtype}" for name, dtype in others.items())
        return (
            f"mixed dtype: the input is {input.dtype}, but {named}: give all one type (layer.to(input.dtype)); "
            "only a float16 or bfloat16 input goes with parameters and statistics of another type, all float32"
        )
    return None


def _differentiated_statistics(running_mean: Tensor | None, running_var: Tensor | None) -> str | None:
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        if vector is None:
            continue
        if vector.requires_grad:
            return f"{name} requires grad, but it is a constant of the transform: pass {name}.detach()"
        if forward_ad.unpack_dual(vector).tangent is not None:  # type: ignore[no-untyped-call]
            return f"{name} carries a forward gradient, but it is a constant of the transform: pass its primal"
    return None
