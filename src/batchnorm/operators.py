"""The transform in training as two operators of PyTorch's own, for a compiled step on a kernel of this package.

They change nothing, wait for nothing and hold nothing but tensors of x's device: a graph that has them is one graph,
which torch.compile may capture as a CUDA graph. Statistics are float32: these are for the kernels that sum in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.kernels.aten import ATEN
from batchnorm.kernels.contract import Epilogue, Kernel
from batchnorm.moments import Moments


def normalized(x: Tensor, eps: float, epilogue: Epilogue) -> tuple[Tensor, Moments]:
    """y = act(BN(x) [+ residual]), and the batch's moments; the epilogue is one that `Epilogue.split` leaves whole."""
    gamma, beta, residual, act, slope, _ = epilogue
    y, mean, m2, _ = _forward(x, gamma, beta, residual, eps, act or "", slope)
    return y, Moments(x.numel() // x.shape[1], mean, m2)


@torch.library.custom_op("batchnorm::forward", mutates_args=())
def _forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, m2 and rstd."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope)
    y, moments, rstd = kernels.or_aten(_kernel(x, act), lambda by: by.forward(x, eps, epilogue))
    return laid_out(y, x), _own(moments.mean), _own(moments.m2), _own(rstd)


@_forward.register_fake
def _(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _vector(x), _vector(x), _vector(x)


@torch.library.custom_op("batchnorm::backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dgamma, dbeta, and where an activation follows a residual g, which is the residual's gradient; else empty."""
    epilogue = Epilogue(gamma, beta, None, act or None, slope, y)
    m = x.numel() // x.shape[1]
    (dx, dresidual), sums = kernels.or_aten(
        _kernel(x, act), lambda by: by.backward(grad_y, x, mean, rstd, epilogue, m, energy=False)
    )
    added = x.new_empty(0) if dresidual is None else laid_out(dresidual, x)
    return laid_out(dx, x), _own(sums.dgamma), _own(sums.dbeta), added


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    added = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), _vector(x), _vector(x), added


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, residual, _, act, slope = inputs
    y, mean, _, rstd = output
    ctx.has_residual, ctx.act, ctx.slope = residual is not None, act, slope
    ctx.save_for_backward(x, gamma, beta, saved_y(y, residual, act), mean, rstd)
    ctx.mark_non_differentiable(mean, output[2], rstd)


def _differentiate(ctx: Any, grad_y: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    _, gamma, beta, y, *_ = ctx.saved_tensors
    dx, dgamma, dbeta, added = _backward(grad_y, *ctx.saved_tensors, ctx.act, ctx.slope)
    return (
        dx,
        None if gamma is None else dgamma.to(gamma.dtype),
        None if beta is None else dbeta.to(beta.dtype),
        dresidual_of(ctx.has_residual, y, added, grad_y),
        *[None] * 3,
    )


_forward.register_autograd(_differentiate, setup_context=_keep)


def saved_y(y: Tensor, residual: Tensor | None, act: str) -> Tensor | None:
    """y where backward needs it for act': where a residual precedes an activation."""
    return None if residual is None or not act else y


def dresidual_of(has_residual: bool, y: Tensor | None, added: Tensor, grad_y: Tensor) -> Tensor | None:
    """The residual's gradient: without an activation it is what arrives."""
    if not has_residual:
        return None
    return grad_y if y is None else added


def laid_out(values: Tensor, x: Tensor) -> Tensor:
    """In memory as torch.empty_like(x) is, which the compiler counts on."""
    if values.stride() == torch.empty_like(x, device="meta").stride():
        return values
    return torch.empty_like(x).copy_(values)


def _kernel(x: Tensor, act: str) -> Kernel:
    kernel = kernels.choose(x).kernel
    return kernel if (act or None) in kernel.activations else ATEN


def _own(vector: Tensor) -> Tensor:
    """float32, and no view of what another output is in: each is its own."""
    return vector.to(torch.float32, copy=vector._is_view())


def _vector(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)
