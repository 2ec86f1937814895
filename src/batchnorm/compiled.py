"""The transform as an operator of PyTorch's own, for a compiled training step that is recorded or synchronized.

A compiled graph runs the operator as it stands, kernel, tap and collectives included, so that nothing breaks the graph.
The tap and the merge are known to it by number: what is compiled holds no Python object, and where nobody listens any
more, nothing is told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels, operators
from batchnorm.autograd import forward_by, sums_and_grads
from batchnorm.kernels.aten import ATEN, add_and_activate
from batchnorm.kernels.contract import Epilogue, Kernel, Merge, Moving, Tap
from batchnorm.moments import Moments
from batchnorm.operators import dresidual_of, laid_out, saved_y

NOBODY = -1
"""The number of no tap, of no merge, of no pass."""

# A replayed CUDA graph runs kernels and no Python: it would tell a tap nothing, and speak with no other process.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def by_operator(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    epilogue: Epilogue,
    tap: Tap | None,
    merge: Merge | None,
) -> Tensor:
    """y = act(BN(x) [+ residual]) in training; moves the running statistics, and fills the tap when it runs.

    With neither tap nor merge by the operators that only compute (`operators`), which are for the GPU.
    """
    fused, rest = epilogue.split(x.dtype)
    if tap is None and merge is None:
        y, moments = operators.normalized(x, eps, fused)
    else:
        gamma, beta, residual, act, slope, _ = fused
        handles = (NOBODY if tap is None else tap.handle, NOBODY if merge is None else merge.handle)
        y, mean, m2, _, m, _ = _forward(x, gamma, beta, residual, eps, act or "", slope, *handles)
        moments = Moments(m, mean, m2)
    if running[0] is not None and running[1] is not None:
        Moving(running[0], running[1], momentum).move(moments)
    return add_and_activate(y, rest)


@torch.library.custom_op("batchnorm::tapped_forward", mutates_args=(), tags=_TAGS)
def _forward(
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
    y, moments, rstd = forward_by(_kernel(x, epilogue), x, eps, epilogue, others, None)
    m, mean = moments.count, moments.mean
    listening = Tap.of(tap) if others is None or others.speaks else None
    ticket = NOBODY if listening is None else listening.add(m, mean, moments.var).number
    count = (
        m.double() if isinstance(m, Tensor) else x.new_full((), m, dtype=torch.float64)
    )  # a copy would be waited for
    return laid_out(y, x), _wide(mean), _wide(moments.m2), _wide(rstd), count, torch.tensor(ticket)


@_forward.register_fake
def _(
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
    mean, m2, rstd = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(3))
    count = x.new_empty((), dtype=torch.float64)
    return torch.empty_like(x), mean, m2, rstd, count, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("batchnorm::tapped_backward", mutates_args=(), tags=_TAGS)
def _backward(
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
    """dx, dgamma, dbeta, and where an activation follows a residual g, which is the residual's gradient; else empty."""
    epilogue = Epilogue(gamma, beta, None, act or None, slope, y)
    kernel = _kernel(x, epilogue)
    narrow = kernel.accumulation_dtype(x.dtype)
    m = x.numel() // x.shape[1] if merge == NOBODY else count
    (dx, dresidual), sums, whole = sums_and_grads(
        kernel, grad_y, x, mean.to(narrow), rstd.to(narrow), epilogue, m, Merge.of(merge), energy=tap != NOBODY
    )
    listening = Tap.of(tap)
    passed = None if listening is None else listening.find(int(ticket))
    if passed is not None:
        passed.grads.append(whole)
    added = x.new_empty(0) if dresidual is None else laid_out(dresidual, x)
    return laid_out(dx, x), _wide(sums.dgamma), _wide(sums.dbeta), added


@_backward.register_fake
def _(
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
    dgamma, dbeta = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    added = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), dgamma, dbeta, added


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, residual, _, act, slope, tap, merge = inputs
    y, mean, _, rstd, count, ticket = output
    ctx.has_residual, ctx.act, ctx.slope, ctx.listening = residual is not None, act, slope, (tap, merge)
    ctx.save_for_backward(x, gamma, beta, saved_y(y, residual, act), mean, rstd, count, ticket)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dgamma, dbeta, added = _backward(grad_y, *ctx.saved_tensors, ctx.act, ctx.slope, *ctx.listening)
    _, gamma, beta, y, *_ = ctx.saved_tensors
    return (
        dx,
        None if gamma is None else dgamma.to(gamma.dtype),
        None if beta is None else dbeta.to(beta.dtype),
        dresidual_of(ctx.has_residual, y, added, grad_y),
        *[None] * 5,
    )


_forward.register_autograd(_differentiate, setup_context=_keep)


def _kernel(x: Tensor, epilogue: Epilogue) -> Kernel:
    kernel = kernels.choose(x, tapped=True).kernel
    return kernel if epilogue.act in kernel.activations and x.numel() else ATEN


def _wide(vector: Tensor) -> Tensor:
    """A copy in float64: what the graph changes in place must not be what the tap holds."""
    return vector.to(torch.float64, copy=True)
