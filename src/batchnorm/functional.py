"""batch_norm(): the function behind all layers, and how it runs: eager, autocast, vmap, compiled, exported to ONNX.

    y = act(gamma·(x - mean)/sqrt(var + eps) + beta [+ residual])

A `Call` holds the arguments. `route` decides once per call how it runs: by a kernel with its backward
(`kernels.choose`, `batchnorm.autograd`), as a custom operator of a compiled step (`batchnorm.compiled`), or by
PyTorch's operators, as under torch.func (vmap), torch.export and ONNX export. Autocast casts no argument: y has x's
type, and vectors may be float32 where x has 16 bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm import errors, kernels
from batchnorm.activations import Act, check_act
from batchnorm.autograd import by_kernel, on_made, unseen
from batchnorm.compiled import by_operator
from batchnorm.kernels.aten import ATEN, composite
from batchnorm.kernels.contract import Call, Epilogue, Kernel
from batchnorm.running_stats import eval_averages

__all__ = ["batch_norm"]

# Plain tensors only: a subclass may override operators that the kernels bypass.
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: Act | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """Batch normalization as torch.nn.functional.batch_norm, with a fused activation and residual.

    y = act(weight·(x - mean)/sqrt(var + eps) + bias [+ residual]), per channel.

    In training, mean and var are the batch's (var biased, divided by m), and the running statistics are updated in
    place: running ← (1 - momentum)·running + momentum·batch, with the unbiased variance (divided by m - 1). Otherwise
    mean and var are the running statistics. Ioffe and Szegedy 2015, Algorithms 1 and 2.

    Args:
        input: x, (N, C) or (N, C, *), floating point; channels are the second dimension.
        running_mean, running_var: (C,), both or neither; needed when training is False.
        weight, bias: gamma and beta, (C,); by default 1 and 0.
        training: normalize by the batch's statistics and update the running ones.
        momentum: the weight of the new batch in the running statistics.
        eps: added to the variance; > 0 in training, >= 0 otherwise.
        residual: added before the activation, of the input's shape. It is never saved for backward, and may change
            after this call. Saved tensors are those of PyTorch's operators: the input, and the activation's output
            (relu, sigmoid, tanh) or input (all others).
        act: the activation: None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid" or
            "tanh".
        negative_slope: the slope of leaky_relu below 0.

    Returns:
        y, of the input's shape; of its type, unless a wider residual promotes it.

    Raises the error types of torch.nn.functional.batch_norm on the same input; the message says what to do.
    """
    if has_torch_function((input, running_mean, running_var, weight, bias, residual)):
        tensors = (input, running_mean, running_var, weight, bias)
        settings: Any = {"residual": residual, "act": act, "negative_slope": negative_slope}
        return handle_torch_function(batch_norm, (*tensors, residual), *tensors, training, momentum, eps, **settings)
    check_act(act)
    epilogue = Epilogue(weight, bias, residual, act, negative_slope)
    return transform(Call(input, (running_mean, running_var), training, momentum, eps, epilogue))


def transform(call: Call) -> Tensor:
    """Run one call: `batch_norm` for layers, with a tap and over processes. Raises the errors of `batch_norm`."""
    x, running, training, _, eps, epilogue, tap, merge = call
    if not isinstance(x, Tensor):
        raise errors.not_a_tensor("input", x)
    if training and merge is None:
        _check_more_than_one_value(x)
    if eps <= 0.0:
        if training:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}: the default is 1e-5")
        if eps < 0.0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}: the default is 1e-5")
    if epilogue.residual is not None:
        check_residual(x, epilogue.residual)
    if not training and isinstance(running[0], Tensor) and isinstance(running[1], Tensor):
        call = call._replace(running=eval_averages(running))
    kind, kernel, _ = route(call) if torch.compiler.is_compiling() or on_made.get() is None else unseen(route, call)
    if kind == "kernel":
        if tap is not None and tap.look is not None:
            tap.look(x)
        return by_kernel(kernel, call)
    if kind == "operator":
        return by_operator(call)
    try:
        if merge is not None:
            raise RuntimeError("a batch norm over several processes takes plain tensors, outside of torch.func")
        return composite(call)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        _, running, training, momentum, eps, epilogue, _, _ = call
        message = errors.batch_norm_error(x, *running, epilogue.gamma, epilogue.beta, training, momentum, eps)
        if message is None:
            raise
        raise type(error)(message) from error


class Route(NamedTuple):
    """How one call runs: by a kernel, as a compiled operator, or by PyTorch's operators (composite)."""

    kind: Literal["kernel", "operator", "composite"]
    kernel: Kernel
    why: str


@lru_cache(maxsize=256)
def _composite(why: str) -> Route:
    return Route("composite", ATEN, why)


_OPERATOR = Route("operator", ATEN, "a compiled step that calls a kernel, a tap or other processes")
_COMPILED = _composite("torch.compile and torch.export see into PyTorch's operators")
_TRACED = _composite("a trace records PyTorch's operators")


def route(call: Call) -> Route:
    """Decide how a call runs, and why."""
    x, _, training, _, _, epilogue, tap, merge = call
    if torch.compiler.is_compiling():
        listening = tap is not None and not torch.compiler.is_exporting()
        by_operator = training and (merge is not None or listening or kernels.compiled(x))
        return _OPERATOR if by_operator else _COMPILED
    if torch._C._get_tracing_state() is not None:
        return _TRACED
    listening = tap is not None or merge is not None
    act = epilogue.act
    choice = kernels.choose(x, training, act is not None or epilogue.residual is not None, listening)
    covered = act in choice.kernel.activations
    if choice.differentiable and not listening:
        return _composite(choice.why)
    if not (covered or listening):
        return _composite(f"PyTorch's own operators: the {choice.name} kernel has no {act}")
    if not x.numel() and merge is None:
        return _composite("PyTorch's own operators: the input has no values")
    obstacle = _why_no_kernel(call)
    if obstacle is not None:
        return _composite(f"PyTorch's own operators: {obstacle}")
    return Route("kernel", choice.kernel if covered and x.numel() else ATEN, choice.why)


def _why_no_kernel(call: Call) -> str | None:
    """Why PyTorch's operators must run this call: a PyTorch mode, or arguments for which they raise."""
    x, running, training, momentum, _, epilogue, _, _ = call
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms them"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation sees into them"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode sees them"
    if type(x) not in _PLAIN:
        return f"{type(x).__name__} is a subclass of Tensor, which may override operators"
    if x.dim() < 2 or not isinstance(training, bool) or not isinstance(momentum, int | float):
        return "they say what is wrong with the arguments"
    if (running[0] is None) is not (running[1] is None) or (running[0] is None and not training):
        return "they say which running statistics are missing"
    channels, dtype, device, narrow, wide = x.shape[1:2], x.dtype, x.device, 0, 0
    for vector in (*running, epilogue.gamma, epilogue.beta):
        if vector is not None:
            if type(vector) not in _PLAIN or vector.shape != channels or vector.device != device:
                return "they say which vector has another shape, type or device"
            if vector.dtype == dtype:
                narrow += 1
            elif vector.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16):
                wide += 1
            else:
                return f"a vector is of {vector.dtype}, the input of {dtype}"
    if narrow and wide:
        return f"some vectors are of {dtype}, some of float32"
    if any(vector is not None and vector.requires_grad for vector in running):
        return "they refuse running statistics that require a gradient"
    return None


def _check_more_than_one_value(x: Tensor) -> None:
    if x.dim() > 1 and x.numel() != x.size(1):
        return
    shape = x.size()
    if not shape:
        raise IndexError(errors.too_few_dimensions(x))
    values = shape[0]
    for length in shape[2:]:
        values = values * length
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}: one value has no variance; "
            "use a larger batch, drop_last=True in the DataLoader, or .eval()"
        )


def check_residual(x: Tensor, residual: object) -> None:
    """Raise TypeError, ValueError or RuntimeError for a wrong residual, before running statistics are updated."""
    if not isinstance(residual, Tensor):
        raise errors.not_a_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the input's shape {tuple(x.shape)}, got {tuple(residual.shape)}: "
            "project or expand it first"
        )
    if residual.device != x.device:
        raise RuntimeError(
            f"residual is on {residual.device}, the input on {x.device}: move it with .to({str(x.device)!r})"
        )
    if not residual.is_floating_point() or residual.layout != torch.strided:
        raise TypeError(
            f"residual must be dense and of a floating-point type, got {residual.dtype} with layout {residual.layout}: "
            "convert it first"
        )
