"""The transform in training as operators of PyTorch's own, for a compiled step.

A compiled graph runs an operator as it is, kernel, tap and collectives included, so that nothing breaks the graph. Two
pairs of forward and backward:

    batchnorm::forward          for a kernel of this package. It changes nothing, waits for nothing and holds only
                                tensors of x's device: torch.compile may capture it as a CUDA graph. Statistics are
                                float32: it is for the kernels that sum in it.
    batchnorm::tapped_forward   for a step that is recorded or synchronized. The tap and the merge are known to it by
                                number: compiled code holds no Python object, and a tap that is gone receives nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.autograd import forward_by, moving_of, split, sums_and_grads
from batchnorm.kernels.aten import ATEN, add_and_activate
from batchnorm.kernels.contract import Call, Epilogue, Kernel, Merge, Tap
from batchnorm.moments import Moments

NOBODY = -1
"""The number of no tap, of no merge, of no pass."""

# A replayed CUDA graph runs kernels and no Python: its tap would receive nothing, and no other process an answer.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def by_operator(call: Call) -> Tensor:
    """y = act(BN(x) [+ residual]) in training; moves the running statistics, and fills the tap when it runs."""
    fused, rest = split(call.epilogue, call.x.dtype)
    tap, merge = call.tap, call.merge
    if tap is None and merge is None:
        y, moments = normalized(call.x, call.eps, fused)
    else:
        gamma, beta, residual, act, slope, _ = fused
        handles = (NOBODY if tap is None else tap.handle, NOBODY if merge is None else merge.handle)
        y, mean, m2, _, m, _ = _tapped_forward(call.x, gamma, beta, residual, call.eps, act or "", slope, *handles)
        moments = Moments(m, mean, m2)
    moving = moving_of(call)
    if moving is not None:
        moving.move(moments)
    return add_and_activate(y, rest)


def normalized(x: Tensor, eps: float, epilogue: Epilogue) -> tuple[Tensor, Moments]:
    """y = act(BN(x) [+ residual]), and the batch's moments; the epilogue is one that `autograd.split` leaves whole."""
    gamma, beta, residual, act, slope, _ = epilogue
    y, mean, m2, _ = _forward(x, gamma, beta, residual, eps, act or "", slope)
    return y, Moments(x.numel() // x.shape[1], mean, m2)


# --- the operators that only compute ---------------------------------------------------------------------------------


@torch.library.custom_op("batchnorm::forward", mutates_args=())
def _forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, m2 and rstd."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope)
    y, moments, rstd = forward_by(_kernel(x, act), x, eps, epilogue, None, None)
    return _laid_out(y, x), _own(moments.mean), _own(moments.m2), _own(rstd)


@_forward.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_vectors(x, 3, torch.float32)


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
    (dx, dresidual), sums, _ = sums_and_grads(_kernel(x, act), grad_y, x, mean, rstd, epilogue, m, None, energy=False)
    return _laid_out(dx, x), _own(sums.dgamma), _own(sums.dbeta), _added(dresidual, x)


@_backward.register_fake
def _(grad_y: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, y: Tensor | None, *_: object) -> Any:
    return torch.empty_like(x), *_vectors(x, 2, torch.float32), x.new_empty(0) if y is None else torch.empty_like(x)


# --- the operators that a tap or other processes hear of -------------------------------------------------------------


@torch.library.custom_op("batchnorm::tapped_forward", mutates_args=(), tags=_TAGS)
def _tapped_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    tap: int,
    merge: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y; mean, m2 and rstd in float64; how many values a channel has; and the pass's number."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope)
    others = Merge.of(merge)
    y, moments, rstd = forward_by(_kernel(x, act, tapped=True), x, eps, epilogue, others, None)
    m, mean = moments.count, moments.mean
    listening = Tap.of(tap) if others is None or others.speaks else None
    ticket = NOBODY if listening is None else listening.add(m, mean, moments.var).number
    count = (
        m.double() if isinstance(m, Tensor) else x.new_full((), m, dtype=torch.float64)
    )  # a copy would be waited for
    return _laid_out(y, x), _wide(mean), _wide(moments.m2), _wide(rstd), count, torch.tensor(ticket)


@_tapped_forward.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, ...]:
    count = x.new_empty((), dtype=torch.float64)
    ticket = torch.empty((), dtype=torch.int64, device="cpu")
    return torch.empty_like(x), *_vectors(x, 3, torch.float64), count, ticket


@torch.library.custom_op("batchnorm::tapped_backward", mutates_args=(), tags=_TAGS)
def _tapped_backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
    ticket: Tensor,
    act: str,
    slope: float,
    tap: int,
    merge: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_backward`; the pass of this number gets the sums."""
    epilogue = Epilogue(gamma, beta, None, act or None, slope, y)
    kernel = _kernel(x, act, tapped=True)
    narrow = kernel.accumulation_dtype(x.dtype)
    m = x.numel() // x.shape[1] if merge == NOBODY else count
    (dx, dresidual), sums, whole = sums_and_grads(
        kernel, grad_y, x, mean.to(narrow), rstd.to(narrow), epilogue, m, Merge.of(merge), energy=tap != NOBODY
    )
    listening = Tap.of(tap)
    passed = None if listening is None else listening.find(int(ticket))
    if passed is not None:
        passed.grads.append(whole)
    return _laid_out(dx, x), _wide(sums.dgamma), _wide(sums.dbeta), _added(dresidual, x)


@_tapped_backward.register_fake
def _(grad_y: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, y: Tensor | None, *_: object) -> Any:
    return torch.empty_like(x), *_vectors(x, 2, torch.float64), x.new_empty(0) if y is None else torch.empty_like(x)


# --- what both pairs share -------------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save y where backward needs it for act': where a residual precedes an activation."""
    x, gamma, beta, residual, _, act, slope, *handles = inputs
    y, mean, m2, rstd, *numbers = output
    ctx.has_residual, ctx.how = residual is not None, (act, slope, *handles)
    ctx.save_for_backward(x, gamma, beta, None if residual is None or not act else y, mean, rstd, *numbers)
    if not handles:
        ctx.mark_non_differentiable(mean, m2, rstd)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tapped = len(ctx.how) > 2
    dx, dgamma, dbeta, added = (_tapped_backward if tapped else _backward)(grad_y, *ctx.saved_tensors, *ctx.how)
    _, gamma, beta, y, *_ = ctx.saved_tensors
    dresidual = (grad_y if y is None else added) if ctx.has_residual else None  # without an activation what arrives
    dgamma = None if gamma is None else dgamma.to(gamma.dtype)
    return dx, dgamma, None if beta is None else dbeta.to(beta.dtype), dresidual, *[None] * (1 + len(ctx.how))


_forward.register_autograd(_differentiate, setup_context=_keep)
_tapped_forward.register_autograd(_differentiate, setup_context=_keep)


def _kernel(x: Tensor, act: str, tapped: bool = False) -> Kernel:
    kernel = kernels.choose(x, tapped=tapped).kernel
    return kernel if (act or None) in kernel.activations and x.numel() else ATEN


def _laid_out(values: Tensor, x: Tensor) -> Tensor:
    """In memory as torch.empty_like(x) is, which the compiler counts on."""
    if values.stride() == torch.empty_like(x, device="meta").stride():
        return values
    return torch.empty_like(x).copy_(values)


def _added(dresidual: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if dresidual is None else _laid_out(dresidual, x)


def _own(vector: Tensor) -> Tensor:
    """float32, and no view into the storage of another output."""
    return vector.to(torch.float32, copy=vector._is_view())


def _wide(vector: Tensor) -> Tensor:
    """A copy in float64: what the graph changes in place must not be what the tap holds."""
    return vector.to(torch.float64, copy=True)


def _vectors(x: Tensor, number: int, dtype: torch.dtype) -> list[Tensor]:
    return [x.new_empty(x.shape[1], dtype=dtype) for _ in range(number)]
