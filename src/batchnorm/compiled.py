"""Custom operators for torch.compile: kernels, taps and collectives run in training without a graph break.

    batchnorm::forward          runs a kernel. It has no side effects, does not synchronize, and takes tensors of x's
                                device only, so that torch.compile may capture it in a CUDA graph. Statistics are
                                float32: for kernels that sum in float32.
    batchnorm::tapped_forward   for recorded or synchronized steps. It takes the tap and the merge by number, because
                                compiled code holds no Python objects; a tap that no longer exists receives nothing.

Each has a backward operator. `layers.py` has how torch.fx traces a layer; `functional.route` decides what export sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.autograd import run_backward, run_forward, running_of, split
from batchnorm.kernels.aten import ATEN, add_and_activate
from batchnorm.kernels.contract import Call, Epilogue, Kernel, Merge, Tap
from batchnorm.moments import Moments

ABSENT = -1
"""The number that means no tap, no merge or no pass."""

# A replayed CUDA graph runs kernels only: neither the tap nor other processes would receive anything.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def by_operator(call: Call) -> Tensor:
    """Return y = act(BN(x) [+ residual]) in training; update the running statistics, and fill the tap at run time."""
    fused, rest = split(call.epilogue, call.x.dtype)
    tap, merge = call.tap, call.merge
    if tap is None and merge is None:
        y, moments = normalized(call.x, call.eps, fused)
    else:
        gamma, beta, residual, act, slope, _ = fused
        handles = (ABSENT if tap is None else tap.handle, ABSENT if merge is None else merge.handle)
        y, mean, m2, _, m, _ = _tapped_forward(call.x, gamma, beta, residual, call.eps, act or "", slope, *handles)
        moments = Moments(m, mean, m2)
    moving = running_of(call)
    if moving is not None:
        moving.move(moments)
    return add_and_activate(y, rest)


def normalized(x: Tensor, eps: float, epilogue: Epilogue) -> tuple[Tensor, Moments]:
    """y = act(BN(x) [+ residual]), and the batch's moments; `autograd.split` must leave the epilogue unchanged."""
    gamma, beta, residual, act, slope, _ = epilogue
    y, mean, m2, _ = _forward(x, gamma, beta, residual, eps, act or "", slope)
    return y, Moments(x.numel() // x.shape[1], mean, m2)


# --- operators without side effects ----------------------------------------------------------------------------------


@torch.library.custom_op("batchnorm::forward", mutates_args=())
def _forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, m2 and rstd."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope)
    forward = run_forward(_kernel(x, act), x, eps, epilogue, None, None)
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    return _strided_like(y, x), _unshared(moments.mean), _unshared(moments.m2), _unshared(rstd)


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
    """dx, dgamma, dbeta, and the residual's gradient if an activation follows the residual; else an empty tensor."""
    epilogue = Epilogue(gamma, beta, None, act or None, slope, y)
    m = x.numel() // x.shape[1]
    (dx, dresidual), sums, _ = run_backward(_kernel(x, act), grad_y, x, (mean, rstd), epilogue, m, None, energy=False)
    return _strided_like(dx, x), _unshared(sums.dgamma), _unshared(sums.dbeta), _or_empty(dresidual, x)


@_backward.register_fake
def _(grad_y: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, y: Tensor | None, *_: object) -> Any:
    return torch.empty_like(x), *_vectors(x, 2, torch.float32), x.new_empty(0) if y is None else torch.empty_like(x)


# --- operators with a tap or with other processes --------------------------------------------------------------------


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
    """y; mean, m2 and rstd in float64; the number of values per channel; and the number of the pass."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope)
    processes = Merge.of(merge)
    forward = run_forward(_kernel(x, act, tapped=True), x, eps, epilogue, processes, None)
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    m, mean = moments.count, moments.mean
    listener = Tap.of(tap) if processes is None or processes.fills_tap else None
    ticket = ABSENT if listener is None else listener.add(m, mean, moments.var).number
    # new_full: copying m from the host would synchronize.
    count = m.double() if isinstance(m, Tensor) else x.new_full((), m, dtype=torch.float64)
    return (
        _strided_like(y, x),
        _float64(mean),
        _float64(moments.m2),
        _float64(rstd),
        count,
        torch.tensor(ticket),
    )


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
    """As `_backward`; the sums are added to the pass with this number."""
    epilogue = Epilogue(gamma, beta, None, act or None, slope, y)
    kernel = _kernel(x, act, tapped=True)
    narrow = kernel.accumulation_dtype(x.dtype)
    m = x.numel() // x.shape[1] if merge == ABSENT else count
    (dx, dresidual), sums, global_sums = run_backward(
        kernel, grad_y, x, (mean.to(narrow), rstd.to(narrow)), epilogue, m, Merge.of(merge), energy=tap != ABSENT
    )
    listener = Tap.of(tap)
    passed = None if listener is None else listener.find(int(ticket))
    if passed is not None:
        passed.grads.append(global_sums)
    return _strided_like(dx, x), _float64(sums.dgamma), _float64(sums.dbeta), _or_empty(dresidual, x)


@_tapped_backward.register_fake
def _(grad_y: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, y: Tensor | None, *_: object) -> Any:
    return torch.empty_like(x), *_vectors(x, 2, torch.float64), x.new_empty(0) if y is None else torch.empty_like(x)


# --- shared by both pairs --------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save y if a residual precedes an activation: backward computes act' from it."""
    x, gamma, beta, residual, _, act, slope, *handles = inputs
    y, mean, m2, rstd, *numbers = output
    ctx.has_residual, ctx.how = residual is not None, (act, slope, *handles)
    ctx.save_for_backward(x, gamma, beta, None if residual is None or not act else y, mean, rstd, *numbers)
    if not handles:
        ctx.mark_non_differentiable(mean, m2, rstd)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tapped = len(ctx.how) > 2
    dx, dgamma, dbeta, dresidual = (_tapped_backward if tapped else _backward)(grad_y, *ctx.saved_tensors, *ctx.how)
    _, gamma, beta, y, *_ = ctx.saved_tensors
    if not ctx.has_residual or y is None:  # without an activation the residual gets grad_y
        dresidual = grad_y if ctx.has_residual else None
    dgamma = None if gamma is None else dgamma.to(gamma.dtype)
    return dx, dgamma, None if beta is None else dbeta.to(beta.dtype), dresidual, *[None] * (1 + len(ctx.how))


_forward.register_autograd(_differentiate, setup_context=_save)
_tapped_forward.register_autograd(_differentiate, setup_context=_save)


def _kernel(x: Tensor, act: str, tapped: bool = False) -> Kernel:
    kernel = kernels.choose(x, tapped=tapped).kernel
    return kernel if (act or None) in kernel.activations and x.numel() else ATEN


def _strided_like(values: Tensor, x: Tensor) -> Tensor:
    """Copy to the strides of torch.empty_like(x), as the compiler expects, if they differ."""
    if values.stride() == torch.empty_like(x, device="meta").stride():
        return values
    return torch.empty_like(x).copy_(values)


def _or_empty(dresidual: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if dresidual is None else _strided_like(dresidual, x)


def _unshared(vector: Tensor) -> Tensor:
    """In float32, without shared storage."""
    return vector.to(torch.float32, copy=vector._is_view())


def _float64(vector: Tensor) -> Tensor:
    """A copy: the graph may change its outputs in place, and the tap keeps the original."""
    return vector.to(torch.float64, copy=True)


def _vectors(x: Tensor, number: int, dtype: torch.dtype) -> list[Tensor]:
    return [x.new_empty(x.shape[1], dtype=dtype) for _ in range(number)]
