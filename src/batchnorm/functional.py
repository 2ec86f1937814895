"""batch_norm(): a tensor in, a tensor out. The only place with a backward.

    y = act(gamma·(x - mean)/sqrt(var + eps) + beta [+ residual])

`kernels.choose` names the kernel. Where PyTorch differentiates the kernel's own operators, it does; else `_Transform`
gives it the formulas of `batchnorm.spec`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm import explain, kernels
from batchnorm.kernels.aten import ACTIVATIONS, composite
from batchnorm.kernels.contract import Epilogue, GradSums, Kernel, Tap
from batchnorm.moments import Moments

__all__ = ["batch_norm"]


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
    act: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """y = act(weight·(x - mean)/sqrt(var + eps) + bias [+ residual]), as torch.nn.functional.batch_norm and fused.

    In training, mean and var are the batch's (var biased, divided by m) and the running statistics move in place,
    running ← (1 - momentum)·running + momentum·batch, there with the unbiased variance (divided by m - 1). Otherwise
    mean and var are the running statistics. Ioffe and Szegedy 2015, Algorithms 1 and 2.

    Args:
        input: x, (N, C) or (N, C, *), floating point; channels are the second dimension.
        running_mean, running_var: (C,), both or neither; needed when training is False.
        weight, bias: gamma and beta, (C,); None stands for 1 and for 0.
        training: normalize by the batch's statistics and update the running ones.
        momentum: the weight of the new value.
        eps: added to the variance; > 0 in training, >= 0 otherwise.
        residual: added before the activation, of the input's shape.
        act: None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid" or "tanh".
        negative_slope: of leaky_relu.

    Returns:
        y, of the input's shape; of its type, unless a wider residual promotes it.

    Raises the types of error that torch.nn.functional.batch_norm raises on the same input; the message says what to do.
    """
    if has_torch_function((input, running_mean, running_var, weight, bias, residual)):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias, residual),
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            act=act,
            negative_slope=negative_slope,
        )
    check_act(act)
    return transform(
        input,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        Epilogue(weight, bias, residual, act, negative_slope),
    )


def check_act(act: object) -> None:
    """Refuse what is not the name of an activation: TypeError, or ValueError that lists the names."""
    if act is None:
        return
    names = ", ".join(repr(name) for name in sorted([*ACTIVATIONS, "leaky_relu"]))
    if not isinstance(act, str):
        raise TypeError(
            f"act must be None or one of {names}, got {type(act).__name__}: pass the activation by its name"
        )
    if act not in ACTIVATIONS and act != "leaky_relu":
        raise ValueError(f"unknown act {act!r}: use None or one of {names}")


def transform(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    epilogue: Epilogue,
    tap: Tap | None = None,
) -> Tensor:
    """`batch_norm` for the layers: momentum may be a tensor, and `tap` receives the by-products of a training step."""
    if not isinstance(x, Tensor):
        raise explain.not_a_tensor("input", x)
    if tap is not None and training:
        tap.clear()
    if training:
        _check_more_than_one_value(x)
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}: the default is 1e-5")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}: the default is 1e-5")
    if epilogue.residual is not None:
        _check_residual(x, epilogue.residual)
    if isinstance(momentum, Tensor):
        if running_mean is not None and running_var is not None:
            return _with_tensor_momentum(x, running_mean, running_var, training, momentum, eps, epilogue, tap)
        momentum = 0.0
    choice = kernels.choose(x)
    vectors = (running_mean, running_var, epilogue.gamma, epilogue.beta)
    if (tap is not None or not choice.differentiable) and _plain(x, vectors, training, momentum, eps):
        return _by_kernel(choice.kernel, x, running_mean, running_var, training, momentum, eps, epilogue, tap)
    try:
        return composite(x, running_mean, running_var, training, momentum, eps, epilogue)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        message = explain.batch_norm_error(x, *vectors, training, momentum, eps)
        if message is None:
            raise
        raise type(error)(message) from error


def _plain(
    x: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
) -> bool:
    """Whether a kernel may run it: empty input, forward mode, functorch and refusals are the composite's."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and x.numel() > 0
        and explain.batch_norm_error(x, *vectors, training, momentum, eps) is None
    )


def _with_tensor_momentum(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: Tensor,
    eps: float,
    epilogue: Epilogue,
    tap: Tap | None,
) -> Tensor:
    """The batch's own statistics come back through copies of the buffers at momentum 1, and move them by a tensor.

    So a cumulative average (momentum = 1/n, n a buffer) needs no value on the host: no synchronization, no graph break.
    """
    mean, var = running_mean.clone(), running_var.clone()
    y = transform(x, mean, var, training, 1.0, eps, epilogue, tap)
    if training:
        wide = torch.promote_types(running_mean.dtype, torch.float32)
        with torch.no_grad():
            for running, batch in ((running_mean, mean), (running_var, var)):
                running.copy_(torch.lerp(running.to(wide), batch.to(wide), momentum.to(wide)))
    return y


def _by_kernel(
    kernel: Kernel,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    epilogue: Epilogue,
    tap: Tap | None,
) -> Tensor:
    m = math.prod(x.shape) // x.shape[1]
    statistics = None if training else (running_mean, running_var)
    y, mean, var = _Transform.apply(  # type: ignore[no-untyped-call]
        x, epilogue.gamma, epilogue.beta, epilogue.residual, statistics, kernel, eps, epilogue.act, epilogue.slope, tap
    )
    if training:
        moments = Moments.of_variance(m, mean, var)
        if tap is not None:
            tap.count, tap.mean, tap.var = m, mean, var
        with torch.no_grad():
            for running, batch in ((running_mean, moments.mean), (running_var, moments.unbiased_var)):
                if running is not None:
                    running.copy_((1 - momentum) * running.to(batch.dtype) + momentum * batch)
    return y  # type: ignore[no-any-return]


class _Transform(torch.autograd.Function):
    """One kernel's forward and backward, as PyTorch's autograd wants them.

    Differentiated twice, backward is the composite's, which PyTorch differentiates as often as wanted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None,
        kernel: Kernel,
        eps: float,
        act: str | None,
        slope: float,
        tap: Tap | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        epilogue = Epilogue(gamma, beta, residual, act, slope)
        if statistics is None:
            y, moments = kernel.forward(x, eps, epilogue)
            mean, var = moments.mean, moments.var
        else:
            mean, var = (running.to(torch.promote_types(running.dtype, torch.float32)) for running in statistics)
            y = kernel.normalize(x, mean, torch.rsqrt(var + eps), epilogue)
        ctx.save_for_backward(x, gamma, beta, residual, mean, var)
        ctx.training, ctx.kernel, ctx.eps = statistics is None, kernel, eps
        ctx.act, ctx.slope, ctx.tap = act, slope, tap
        ctx.statistics_dtype = mean.dtype if statistics is None else statistics[0].dtype
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, residual, mean, var = ctx.saved_tensors
        epilogue = Epilogue(gamma, beta, residual, ctx.act, ctx.slope)
        tap = ctx.tap if ctx.training else None
        rstd = torch.rsqrt(var + ctx.eps)
        if torch.is_grad_enabled():
            if tap is not None:
                with torch.no_grad():
                    _fill(tap, ctx.kernel.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=True))
            return (*_differentiable_backward(ctx, grad_y, x, mean, var, epilogue), *[None] * 6)
        m = x.numel() // x.shape[1]
        if ctx.training:
            (dx, dresidual), sums = ctx.kernel.backward(grad_y, x, mean, rstd, epilogue, m, energy=tap is not None)
        else:
            sums = ctx.kernel.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=False)
            dx, dresidual = ctx.kernel.input_grad(grad_y, x, mean, rstd, epilogue, None, m)
        if tap is not None:
            _fill(tap, sums)
        dgamma = None if gamma is None else sums.dgamma.to(gamma.dtype)
        dbeta = None if beta is None else sums.dbeta.to(beta.dtype)
        return (dx, dgamma, dbeta, dresidual, *[None] * 6)


def _fill(tap: Tap, sums: GradSums) -> None:
    tap.dgamma, tap.dbeta, tap.energy = sums.dgamma, sums.dbeta, sums.energy


def _differentiable_backward(
    ctx: Any, grad_y: Tensor, x: Tensor, mean: Tensor, var: Tensor, epilogue: Epilogue
) -> list[Tensor | None]:
    with torch.enable_grad():
        if ctx.training:
            y = composite(x, None, None, True, 0.0, ctx.eps, epilogue)
        else:
            mean, var = mean.to(ctx.statistics_dtype), var.to(ctx.statistics_dtype)
            y = composite(x, mean, var, False, 0.0, ctx.eps, epilogue)
    wanted = [x, epilogue.gamma, epilogue.beta, epilogue.residual]
    inputs = [tensor for tensor in wanted if tensor is not None and tensor.requires_grad]
    grads = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=True))
    return [next(grads) if tensor is not None and tensor.requires_grad else None for tensor in wanted]


def _check_more_than_one_value(x: Tensor) -> None:
    shape = x.size()
    if not shape:
        raise IndexError(explain.too_few_dimensions(x))
    values = shape[0]
    for length in shape[2:]:
        values = values * length
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}: one value has no variance; "
            "use a larger batch, drop_last=True in the DataLoader, or .eval()"
        )


def _check_residual(x: Tensor, residual: object) -> None:
    """Before anything moves: what the addition would refuse must not be found out after the running statistics."""
    if not isinstance(residual, Tensor):
        raise explain.not_a_tensor("residual", residual)
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
