"""The transform by a kernel, with the kernel's own backward. The only place with a backward.

Where a `Tap` listens, each training forward adds a `Pass` to it, and each backward through it that pass's sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.kernels.aten import add_and_activate, composite, gradient_by_y
from batchnorm.kernels.contract import (
    Count,
    Epilogue,
    Forward,
    GradSums,
    InputGrads,
    Kernel,
    Merge,
    Moving,
    Pass,
    Tap,
)


def by_kernel(
    kernel: Kernel,
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
    epilogue: Epilogue,
    tap: Tap | None,
    merge: Merge | None = None,
) -> Tensor:
    """y = act(BN(x) [+ residual]); moves the running statistics in training, and fills the tap.

    With `merge`, in training x is a part of the batch: statistics and sums are those of all parts, and gamma and beta
    get the gradient of this one.
    """
    fused, rest = epilogue.split(x.dtype)
    statistics = None if training else running
    moving = None
    if training and running[0] is not None and running[1] is not None:
        moving = Moving(running[0], running[1], float(momentum))
    arguments = (
        x, fused.gamma, fused.beta, fused.residual, statistics, kernel, eps, fused.act, fused.slope, tap, merge, moving,
    )  # fmt: skip
    return add_and_activate(_Transform.apply(*arguments), rest)  # type: ignore[no-untyped-call]


class _Transform(torch.autograd.Function):
    """One kernel's forward and backward, as PyTorch's autograd wants them.

    Saved for backward are x and, where a residual precedes an activation, y: never the residual, and nothing that
    PyTorch's own operators would not save. Differentiated twice, backward is the composite's, which PyTorch
    differentiates on.
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
        merge: Merge | None,
        moving: Moving | None,
    ) -> Tensor:
        epilogue = Epilogue(gamma, beta, residual, act, slope)
        ctx.passed = None
        if statistics is None:
            y, moments, rstd = forward_by(kernel, x, eps, epilogue, merge, moving)
            ctx.m, mean, var = moments.count, moments.mean, None
            if tap is not None and (merge is None or merge.speaks):
                ctx.passed = tap.add(ctx.m, mean, moments.var)
        else:
            mean, var = (running.to(kernel.accumulation_dtype(running.dtype)) for running in statistics)
            rstd = torch.rsqrt(var + eps)
            y = kernels.or_aten(kernel, lambda by: by.normalize(x, mean, rstd, epilogue))
            ctx.m = x.numel() // x.shape[1]
        saved_y = None if act is None or residual is None else y
        ctx.save_for_backward(x, gamma, beta, saved_y, mean, var, rstd)
        ctx.training, ctx.kernel, ctx.eps, ctx.act, ctx.slope = statistics is None, kernel, eps, act, slope
        ctx.merge = merge
        ctx.has_residual = residual is not None
        ctx.statistics_dtype = mean.dtype if statistics is None else statistics[0].dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, y, mean, var, rstd = ctx.saved_tensors
        epilogue = Epilogue(gamma, beta, None, ctx.act, ctx.slope, y)
        passed: Pass | None = ctx.passed
        if torch.is_grad_enabled():
            if ctx.merge is not None:
                raise RuntimeError(
                    "a synchronized batch norm cannot be differentiated twice: use create_graph=False, or normalize "
                    "each process's batch by itself"
                )
            if passed is not None:
                with torch.no_grad():
                    passed.grads.append(ctx.kernel.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=True))
            dx, dgamma, dbeta, dresidual = _differentiable_backward(ctx, grad_y, x, mean, var, epilogue)
        else:
            through_batch = ctx.training and (ctx.needs_input_grad[0] or ctx.merge is not None)
            arguments = grad_y, x, mean, rstd, epilogue, ctx.m if through_batch else None, ctx.merge
            (dx, dresidual), sums, whole = sums_and_grads(ctx.kernel, *arguments, energy=passed is not None)
            if passed is not None:
                passed.grads.append(whole)
            dgamma = None if gamma is None else sums.dgamma.to(gamma.dtype)
            dbeta = None if beta is None else sums.dbeta.to(beta.dtype)
        if ctx.has_residual and dresidual is None:  # without an activation it is what arrives
            dresidual = grad_y
        return (dx, dgamma, dbeta, dresidual, *[None] * 8)


def forward_by(
    kernel: Kernel, x: Tensor, eps: float, epilogue: Epilogue, merge: Merge | None, moving: Moving | None
) -> Forward:
    """y, and the moments and rstd of the batch that it was computed with; `moving` moves by them.

    Each verb falls back by itself: what stands between two of them, other processes wait for once.
    """
    if merge is None:
        return kernels.or_aten(kernel, lambda by: by.forward(x, eps, epilogue, moving))
    moments = merge.moments(kernels.or_aten(kernel, lambda by: by.statistics(x)))
    rstd = torch.rsqrt(moments.var + eps)
    y = kernels.or_aten(kernel, lambda by: by.normalize(x, moments.mean, rstd, epilogue))
    if moving is not None:
        moving.move(moments)
    return Forward(y, moments, rstd)


def sums_and_grads(
    kernel: Kernel,
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    m: Count | None,
    merge: Merge | None,
    *,
    energy: bool,
) -> tuple[InputGrads, GradSums, GradSums]:
    """dx and dresidual, the sums over x, and those over the whole batch that x is a part of, then with the energy.

    m is the number of values of a channel; None where mean and rstd are constants, as in inference.
    """
    given = grad_y, x, mean, rstd, epilogue
    if m is not None and merge is None:
        grads, sums = kernels.or_aten(kernel, lambda by: by.backward(*given, int(m), energy=energy))
        return grads, sums, sums
    energy = energy or merge is not None  # all places send the same, whoever listens
    sums = kernels.or_aten(kernel, lambda by: by.reduce_grad(*given, energy=energy))
    whole = sums if m is None or merge is None else merge.sums(sums)
    through = (None, 1) if m is None else (whole, m)
    return kernels.or_aten(kernel, lambda by: by.input_grad(*given, *through)), sums, whole


def _differentiable_backward(
    ctx: Any, grad_y: Tensor, x: Tensor, mean: Tensor, var: Tensor | None, epilogue: Epilogue
) -> tuple[Tensor | None, ...]:
    """dx, dgamma, dbeta and dresidual, each differentiable in grad_y and in what forward was given."""
    dresidual = None
    with torch.enable_grad():
        if epilogue.y is not None:
            assert epilogue.act is not None
            # y is this function's output: what follows from it is differentiated through this backward. relu is
            # piecewise linear, where nothing does.
            y = epilogue.y.detach() if epilogue.act == "relu" else epilogue.y
            grad_y = dresidual = gradient_by_y(grad_y, y, epilogue.act)
            epilogue = Epilogue(epilogue.gamma, epilogue.beta)
        if var is None:  # the batch's own, which x has
            again = composite(x, None, None, True, 0.0, ctx.eps, epilogue)
        else:
            mean, var = mean.to(ctx.statistics_dtype), var.to(ctx.statistics_dtype)
            again = composite(x, mean, var, False, 0.0, ctx.eps, epilogue)
    wanted = [x, epilogue.gamma, epilogue.beta]
    inputs = [tensor for tensor in wanted if tensor is not None and tensor.requires_grad]
    grads = iter(torch.autograd.grad(again, inputs, grad_y, create_graph=True))
    found = [next(grads) if tensor is not None and tensor.requires_grad else None for tensor in wanted]
    return (*found, dresidual)
