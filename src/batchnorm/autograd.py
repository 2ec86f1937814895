"""torch.autograd.Function over a kernel: the only place with a backward.

A `Tap` receives a `Pass` per training forward, and each backward adds its sums to that pass. Under torch.func (vmap,
grad) PyTorch's operators run instead: see `functional.route`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from batchnorm import kernels
from batchnorm.activations import BY_Y
from batchnorm.kernels.aten import add_and_activate, composite, gradient_by_y
from batchnorm.kernels.contract import (
    Call,
    Count,
    Epilogue,
    Forward,
    GradSums,
    InputGrads,
    Kernel,
    Merge,
    Pass,
    UnavailableError,
    mean_and_rstd,
)
from batchnorm.kernels.cpu import products
from batchnorm.running_stats import RunningUpdate

Result = TypeVar("Result")
NOTHING = Epilogue()


class Made(NamedTuple):
    """A result y of a kernel, equal to `kernel.normalize(x, *mean_and_rstd(statistics), epilogue)`."""

    y: Tensor
    kernel: Kernel
    x: Tensor
    statistics: Sequence[Tensor]
    epilogue: Epilogue
    call: Call


on_made: ContextVar[Callable[[Made], object] | None] = ContextVar("batchnorm_on_made", default=None)
"""Called with each result that autograd will differentiate, while `batchnorm.lean` follows a forward."""


def unseen(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of this package past the mode with which `batchnorm.lean` follows PyTorch's functions."""
    with torch._C.DisableTorchFunction():
        return function(*arguments)


def split(epilogue: Epilogue, dtype: torch.dtype) -> tuple[Epilogue, Epilogue]:
    """Split an epilogue: the part that the kernel fuses, and the part that PyTorch's operators run on its result.

    The kernel never saves the residual. After a residual it fuses the activations of `BY_Y`, for which y is saved. For
    all others PyTorch saves z, so the kernel computes z = BN(x) + residual and the activation follows. A residual of
    another type is added by PyTorch's operators.
    """
    gamma, beta, residual, act, slope, *_ = epilogue
    if residual is None or (residual.dtype == dtype and (act is None or act in BY_Y)):
        return epilogue, NOTHING
    if residual.dtype == dtype:
        return Epilogue(gamma, beta, residual), Epilogue(act=act, slope=slope)
    return Epilogue(gamma, beta), Epilogue(residual=residual, act=act, slope=slope)


def by_kernel(kernel: Kernel, call: Call) -> Tensor:
    """Return y = act(BN(x) [+ residual]); update the running statistics in training, and fill the tap.

    With `merge`, x is one process's part of the batch: statistics and sums cover all parts, dgamma and dbeta this one.
    """
    fused, rest = split(call.epilogue, call.x.dtype)
    run = _Transform.apply if on_made.get() is None else partial(unseen, _Transform.apply)
    y: Tensor = run(call.x, fused.gamma, fused.beta, fused.residual, kernel, fused, call)  # type: ignore[no-untyped-call]
    return y if rest is NOTHING else add_and_activate(y, rest)


class _Transform(torch.autograd.Function):
    """Forward and backward of one kernel.

    Saves x, and y if a residual precedes an activation; never the residual. Double backward differentiates PyTorch's
    operators.
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
        _, _, training, _, eps, _, tap, merge = call
        passed: Pass | None = None
        signs = None
        if training:
            forward = run_forward(kernel, x, eps, epilogue, merge, running_of(call))
            y, m, statistics, signs = forward
            var = None
            if tap is not None and (merge is None or merge.fills_tap):
                passed = tap.add(m, forward.moments.mean, forward.moments.var)
            statistics_dtype = None
        else:
            averages = [running for running in call.running if running is not None]
            mean, var = (running.to(kernel.accumulation_dtype(running.dtype)) for running in averages)
            statistics = (mean, torch.rsqrt(var + eps))
            y = kernels.or_aten(kernel, lambda by: by.normalize(x, *statistics, epilogue))
            m, statistics_dtype = None, averages[0].dtype
        follow = on_made.get()
        if follow is not None and any(ctx.needs_input_grad):
            follow(Made(y, kernel, x, statistics, epilogue, call))
        act = epilogue.act
        saved_y = None if act is None or residual is None else y
        ctx.save_for_backward(x, gamma, beta, saved_y, signs, var, *statistics)
        ctx.how = kernel, m, eps, act, epilogue.slope, merge, passed, statistics_dtype, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, y, signs, var, *statistics = ctx.saved_tensors
        kernel, m, eps, act, slope, merge, passed, statistics_dtype, has_residual = ctx.how
        epilogue = Epilogue(gamma, beta, None, act, slope, y, signs)
        if torch.is_grad_enabled():
            mean, rstd = mean_and_rstd(statistics)
            if merge is not None:
                raise RuntimeError(
                    "a synchronized batch norm cannot be differentiated twice: use create_graph=False, or normalize "
                    "each process's batch by itself"
                )
            if passed is not None:
                with torch.no_grad():
                    passed.grads.append(kernel.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=True))
            running = None if var is None else (mean.to(statistics_dtype), var.to(statistics_dtype))
            dx, dgamma, dbeta, dresidual = _differentiable_backward(grad_y, x, running, eps, epilogue)
        else:
            if m is not None and merge is None and not ctx.needs_input_grad[0]:
                m = None
            (dx, dresidual), sums, global_sums = run_backward(
                kernel, grad_y, x, statistics, epilogue, m, merge, energy=passed is not None
            )
            if passed is not None:
                passed.grads.append(global_sums)
            dgamma = None if gamma is None else _as(sums.dgamma, gamma.dtype)
            dbeta = None if beta is None else _as(sums.dbeta, beta.dtype)
        if has_residual and dresidual is None:  # no activation: the residual gets grad_y
            dresidual = grad_y
        return dx, dgamma, dbeta, dresidual, None, None, None


def _as(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """`vector.to(dtype)`; the check costs a tenth of a conversion that changes nothing."""
    return vector if vector.dtype is dtype else vector.to(dtype)


def running_of(call: Call) -> RunningUpdate | None:
    """The running statistics that a training call updates."""
    mean, var = call.running
    return None if mean is None or var is None else RunningUpdate(mean, var, float(call.momentum))


def run_forward(
    kernel: Kernel, x: Tensor, eps: float, epilogue: Epilogue, merge: Merge | None, moving: RunningUpdate | None
) -> Forward:
    """Compute y with the batch's moments and rstd, and update `moving`.

    With `merge` each kernel call falls back separately, so that the collective between them runs once.
    """
    if merge is None:
        return kernels.or_aten(kernel, lambda by: by.forward(x, eps, epilogue, moving))
    moments = merge.moments(kernels.or_aten(kernel, lambda by: by.statistics(x)))
    rstd = torch.rsqrt(moments.var + eps)
    y = kernels.or_aten(kernel, lambda by: by.normalize(x, moments.mean, rstd, epilogue))
    if moving is not None:
        moving.move(moments)
    return Forward(y, moments.count, (moments.mean, moments.m2, rstd))


def run_backward(
    kernel: Kernel,
    grad_y: Tensor,
    x: Tensor,
    statistics: Sequence[Tensor],
    epilogue: Epilogue,
    m: Count | None,
    merge: Merge | None,
    *,
    energy: bool,
) -> tuple[InputGrads, GradSums, GradSums]:
    """Return input gradients, local sums and global sums (with grad_energy when requested).

    `statistics` is `Forward.statistics`, or mean and rstd. m is the number of values per channel; None in
    inference, where mean and rstd are constants.
    """
    if m is not None and merge is None:
        grads, sums = kernels.or_aten(
            kernel, lambda by: by.backward_of(grad_y, x, statistics, epilogue, int(m), energy=energy)
        )
        return grads, sums, sums
    tensors = grad_y, x, *mean_and_rstd(statistics), epilogue
    energy = energy or merge is not None  # all processes must send the same sums
    sums = kernels.or_aten(kernel, lambda by: by.reduce_grad(*tensors, energy=energy))
    global_sums = sums if m is None or merge is None else merge.sums(sums)
    through = (None, 1) if m is None else (global_sums, m)
    return kernels.or_aten(kernel, lambda by: by.input_grad(*tensors, *through)), sums, global_sums


def _differentiable_backward(
    grad_y: Tensor, x: Tensor, statistics: tuple[Tensor, Tensor] | None, eps: float, epilogue: Epilogue
) -> tuple[Tensor | None, ...]:
    """dx, dgamma, dbeta and dresidual, differentiable in grad_y and in the inputs of forward."""
    dresidual = None
    gamma, beta, _, act, slope, y, _ = epilogue
    with torch.enable_grad():
        if y is not None:
            assert act is not None
            # y is this function's output, so gradients of y pass through this backward again. relu's derivative is
            # piecewise constant and needs none.
            grad_y = dresidual = gradient_by_y(grad_y, y.detach() if act == "relu" else y, act, slope)
            epilogue = Epilogue(gamma, beta)
        training = statistics is None
        again = composite(Call(x, statistics or (None, None), training, 0.0, eps, epilogue))
    needs_grad = [tensor is not None and tensor.requires_grad for tensor in (x, gamma, beta)]
    inputs = [tensor for tensor in (x, gamma, beta) if tensor is not None and tensor.requires_grad]
    grads = iter(torch.autograd.grad(again, inputs, grad_y, create_graph=True))
    return *(next(grads) if needed else None for needed in needs_grad), dresidual


# --- squeeze-and-excite gates -----------------------------------------------------------------------------------------


def gate(y: Tensor, s: Tensor) -> Tensor:
    """y·s with a factor s for each sample and channel of y, contiguous or channels_last (`kernels.cpu.products`).

    PyTorch multiplies and then sums for the gradient of s; here Σ grad·y is one pass without a result of y's size. A
    TorchFunctionMode sees the call.
    """
    if torch._C._len_torch_function_stack():
        return handle_torch_function(gate, (y, s), y, s)
    return _Gate.apply(y, s)  # type: ignore[no-untyped-call,no-any-return]


def average(y: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    """by(y), which averages over the positions of each sample and channel. The gradient is expanded, not stored."""
    return _Average.apply(y, by)  # type: ignore[no-untyped-call,no-any-return]


class _Gate(torch.autograd.Function):
    """y·s: dy = grad·s, ds = Σ grad·y over the positions."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(y, s)
        return y * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, s = ctx.saved_tensors
        dy = grad * s if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dy, None
        return dy, _sums_of_products(grad, y).to(s.dtype).view_as(s)


def _sums_of_products(grad: Tensor, y: Tensor) -> Tensor:
    """Σ grad·y over the positions, by PyTorch's operators where the result is differentiated again."""
    if not torch.is_grad_enabled() and grad.stride() == y.stride():
        try:
            return products.sums_of_products(grad, y)
        except UnavailableError as error:
            kernels.disable(kernels.choose(y).kernel, error)
    return (grad * y).flatten(2).sum(2)


class _Average(torch.autograd.Function):
    """The mean over the positions of each sample and channel; its gradient is an expanded tensor."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.shape = y.shape
        return by(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad / math.prod(ctx.shape[2:])).expand(ctx.shape), None
