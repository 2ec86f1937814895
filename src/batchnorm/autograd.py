"""The transform by a kernel, with the kernel's own backward. The only place with a backward.

Where a `Tap` listens, each training forward adds a `Pass` to it, and each backward through it that pass's sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.activations import BY_Y
from batchnorm.kernels.aten import add_and_activate, composite, gradient_by_y
from batchnorm.kernels.contract import Call, Count, Epilogue, Forward, GradSums, InputGrads, Kernel, Merge, Pass
from batchnorm.running_stats import Moving

NOTHING = Epilogue()


def split(epilogue: Epilogue, dtype: torch.dtype) -> tuple[Epilogue, Epilogue]:
    """What a kernel computes for an x of this type, and what PyTorch's operators compute from the result.

    The first saves x, and y where a residual precedes an activation, but no residual. PyTorch saves y as well for the
    activations of `BY_Y`. For all others it saves z, and so do we: the kernel computes z = BN(x) + residual, and the
    activation follows. A residual of another type is added afterwards, too.
    """
    gamma, beta, residual, act, slope, _ = epilogue
    if residual is None or (residual.dtype == dtype and (act is None or act in BY_Y)):
        return epilogue, NOTHING
    if residual.dtype == dtype:
        return Epilogue(gamma, beta, residual), Epilogue(act=act, slope=slope)
    return Epilogue(gamma, beta), Epilogue(residual=residual, act=act, slope=slope)


def by_kernel(kernel: Kernel, call: Call) -> Tensor:
    """y = act(BN(x) [+ residual]); moves the running statistics in training, and fills the tap.

    With `merge`, in training x is a part of the batch: statistics and sums are those of all parts, and gamma and beta
    get the gradient of this one.
    """
    fused, rest = split(call.epilogue, call.x.dtype)
    y: Tensor = _Transform.apply(call.x, fused.gamma, fused.beta, fused.residual, kernel, fused, call)  # type: ignore[no-untyped-call]
    return y if rest is NOTHING else add_and_activate(y, rest)


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
        kernel: Kernel,
        epilogue: Epilogue,
        call: Call,
    ) -> Tensor:
        eps, tap, merge = call.eps, call.tap, call.merge
        ctx.passed = None
        if call.training:
            y, moments, rstd = forward_by(kernel, x, eps, epilogue, merge, moving_of(call))
            ctx.m, mean, var = moments.count, moments.mean, None
            if tap is not None and (merge is None or merge.speaks):
                ctx.passed = tap.add(ctx.m, mean, moments.var)
            ctx.statistics_dtype = mean.dtype
        else:
            statistics = [running for running in call.running if running is not None]
            mean, var = (running.to(kernel.accumulation_dtype(running.dtype)) for running in statistics)
            rstd = torch.rsqrt(var + eps)
            y = kernels.or_aten(kernel, lambda by: by.normalize(x, mean, rstd, epilogue))
            ctx.m, ctx.statistics_dtype = x.numel() // x.shape[1], statistics[0].dtype
        saved_y = None if epilogue.act is None or residual is None else y
        ctx.save_for_backward(x, gamma, beta, saved_y, mean, var, rstd)
        ctx.how = kernel, call.training, eps, epilogue.act, epilogue.slope, merge, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, y, mean, var, rstd = ctx.saved_tensors
        kernel, training, eps, act, slope, merge, has_residual = ctx.how
        epilogue = Epilogue(gamma, beta, None, act, slope, y)
        passed: Pass | None = ctx.passed
        if torch.is_grad_enabled():
            if merge is not None:
                raise RuntimeError(
                    "a synchronized batch norm cannot be differentiated twice: use create_graph=False, or normalize "
                    "each process's batch by itself"
                )
            if passed is not None:
                with torch.no_grad():
                    passed.grads.append(kernel.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=True))
            statistics = None if var is None else (mean.to(ctx.statistics_dtype), var.to(ctx.statistics_dtype))
            dx, dgamma, dbeta, dresidual = _differentiable_backward(grad_y, x, statistics, eps, epilogue)
        else:
            m = ctx.m if training and (ctx.needs_input_grad[0] or merge is not None) else None
            energy = passed is not None
            (dx, dresidual), sums, whole = sums_and_grads(
                kernel, grad_y, x, mean, rstd, epilogue, m, merge, energy=energy
            )
            if passed is not None:
                passed.grads.append(whole)
            dgamma = None if gamma is None else sums.dgamma.to(gamma.dtype)
            dbeta = None if beta is None else sums.dbeta.to(beta.dtype)
        if has_residual and dresidual is None:  # without an activation it is what arrives
            dresidual = grad_y
        return dx, dgamma, dbeta, dresidual, None, None, None


def moving_of(call: Call) -> Moving | None:
    """The running statistics that a training call moves."""
    mean, var = call.running
    return None if mean is None or var is None else Moving(mean, var, float(call.momentum))


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
    grad_y: Tensor, x: Tensor, statistics: tuple[Tensor, Tensor] | None, eps: float, epilogue: Epilogue
) -> tuple[Tensor | None, ...]:
    """dx, dgamma, dbeta and dresidual, each differentiable in grad_y and in what forward was given."""
    dresidual = None
    gamma, beta, _, act, slope, y = epilogue
    with torch.enable_grad():
        if y is not None:
            assert act is not None
            # y is this function's output: what follows from it is differentiated through this backward. relu is
            # piecewise linear, where nothing does.
            grad_y = dresidual = gradient_by_y(grad_y, y.detach() if act == "relu" else y, act, slope)
            epilogue = Epilogue(gamma, beta)
        training = statistics is None  # x has the batch's own
        again = composite(Call(x, statistics or (None, None), training, 0.0, eps, epilogue))
    wanted = [x, gamma, beta]
    inputs = [tensor for tensor in wanted if tensor is not None and tensor.requires_grad]
    grads = iter(torch.autograd.grad(again, inputs, grad_y, create_graph=True))
    found = [next(grads) if tensor is not None and tensor.requires_grad else None for tensor in wanted]
    return (*found, dresidual)
