"""Operators for torch.compile: kernels, taps and collectives run in training without a graph break.

    batchnorm::forward          runs a kernel. It has no side effects, does not synchronize, and takes tensors of x's
                                device only, so that torch.compile may capture it in a CUDA graph. The compiler may
                                choose the memory layout of all tensors.
    batchnorm::tapped_forward   for recorded or synchronized steps. It takes the tap and the merge by number, because
                                compiled code holds no Python objects; a tap that no longer exists receives nothing.

Each has a backward operator. `layers.py` has how torch.fx traces a layer; `functional.route` decides what export sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.autograd import run_backward, run_forward, running_of, split
from batchnorm.kernels.aten import ATEN, add_and_activate
from batchnorm.kernels.contract import Call, Epilogue, Forward, Kernel, Merge, Tap
from batchnorm.moments import Moments

ABSENT = -1
"""The number that means no tap, no merge or no pass."""

# The registration of operators ends with this object. torch.library.custom_op would take twice as long for each call.
_LIBRARY: Any = torch.library.Library("batchnorm", "FRAGMENT")  # type: ignore[no-untyped-call]
_FLEXIBLE = (torch.Tag.flexible_layout,)
# A replayed CUDA graph runs kernels only: neither the tap nor other processes would receive anything.
_TAPPED = (*_FLEXIBLE, *([torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []))


def by_operator(call: Call) -> Tensor:
    """Return y = act(BN(x) [+ residual]) in training; update the running statistics, and fill the tap at run time."""
    fused, rest = split(call.epilogue, call.x.dtype)
    tap, merge = call.tap, call.merge
    if tap is None and merge is None:
        y, moments = normalized(call.x, call.eps, fused)
    else:
        gamma, beta, residual, act, slope, *_ = fused
        handles = (ABSENT if tap is None else tap.handle, ABSENT if merge is None else merge.handle)
        y, statistics, m, _ = torch.ops.batchnorm.tapped_forward(
            call.x, gamma, beta, residual, call.eps, act or "", slope, *handles
        )
        moments = Moments(m, statistics[0], statistics[1])
    moving = running_of(call)
    if moving is not None:
        moving.move(moments)
    return add_and_activate(y, rest)


def normalized(x: Tensor, eps: float, epilogue: Epilogue) -> tuple[Tensor, Moments]:
    """y = act(BN(x) [+ residual]), and the batch's moments; `autograd.split` must leave the epilogue unchanged."""
    gamma, beta, residual, act, slope, *_ = epilogue
    y, statistics = torch.ops.batchnorm.forward(x, gamma, beta, residual, eps, act or "", slope)
    return y, Moments(x.numel() // x.shape[1], statistics[0], statistics[1])


def _operator(schema: str, fake: Callable[..., Any], tags: tuple[torch.Tag, ...]) -> Callable[[Any], Any]:
    """Decorator: register a function as an operator of `batchnorm`, with its shapes for the compiler."""

    def register(function: Any) -> Any:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=tags)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"batchnorm::{name}", fake, lib=_LIBRARY)
        return function

    return register


# --- operators without side effects ----------------------------------------------------------------------------------

_EPILOGUE = "Tensor? gamma, Tensor? beta, Tensor? residual, float eps, str act, float slope"
_SAVED = "Tensor x, Tensor? gamma, Tensor? beta, Tensor? y, Tensor statistics"


def _forward_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((3, x.shape[1]), dtype=_statistics_dtype(x))


@_operator(f"forward(Tensor x, {_EPILOGUE}) -> (Tensor, Tensor)", _forward_fake, _FLEXIBLE)
def _forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    """y; and mean, m2 and rstd as rows."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope)
    forward = run_forward(_kernel(x, act), x, eps, epilogue, None, None)
    return _strided_like(forward.y, x), _rows(forward).to(_statistics_dtype(x))


def _backward_fake(grad_y: Tensor, x: Tensor, gamma: Any, beta: Any, y: Tensor | None, *_: object) -> Any:
    vectors = (x.new_empty(x.shape[1], dtype=_sums_dtype(x)) for _ in range(2))
    return torch.empty_like(x), *vectors, x.new_empty(0) if y is None else torch.empty_like(x)


@_operator(
    f"backward(Tensor grad_y, {_SAVED}, str act, float slope) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    _FLEXIBLE,
)
def _backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    y: Tensor | None,
    statistics: Tensor,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dgamma, dbeta, and the residual's gradient if an activation follows the residual; else an empty tensor."""
    epilogue = Epilogue(gamma, beta, None, act or None, slope, y)
    m = x.numel() // x.shape[1]
    (dx, dresidual), sums, _ = run_backward(_kernel(x, act), grad_y, x, (statistics,), epilogue, m, None, energy=False)
    return _strided_like(dx, x), _sums(sums.dgamma, x), _sums(sums.dbeta, x), _or_empty(dresidual, x)


# --- operators with a tap or with other processes --------------------------------------------------------------------


def _tapped_forward_fake(x: Tensor, *_: object) -> tuple[Tensor, ...]:
    statistics = x.new_empty((3, x.shape[1]), dtype=torch.float64)
    count = x.new_empty((), dtype=torch.float64)
    return torch.empty_like(x), statistics, count, torch.empty((), dtype=torch.int64, device="cpu")


@_operator(
    f"tapped_forward(Tensor x, {_EPILOGUE}, int tap, int merge) -> (Tensor, Tensor, Tensor, Tensor)",
    _tapped_forward_fake,
    _TAPPED,
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; mean, m2 and rstd in float64; the number of values per channel; and the number of the pass."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope)
    processes = Merge.of(merge)
    forward = run_forward(_kernel(x, act, tapped=True), x, eps, epilogue, processes, None)
    moments = forward.moments
    m = moments.count
    listener = Tap.of(tap) if processes is None or processes.fills_tap else None
    ticket = ABSENT if listener is None else listener.add(m, moments.mean, moments.var).number
    # new_full: copying m from the host would synchronize.
    count = m.double() if isinstance(m, Tensor) else x.new_full((), m, dtype=torch.float64)
    # A copy: the graph may change its outputs in place, and the tap keeps the original.
    statistics = _rows(forward).to(torch.float64, copy=True)
    return _strided_like(forward.y, x), statistics, count, torch.tensor(ticket)


@_operator(
    f"tapped_backward(Tensor grad_y, {_SAVED}, Tensor count, Tensor ticket, str act, float slope, int tap, int merge)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    _TAPPED,
)
def _tapped_backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    y: Tensor | None,
    statistics: Tensor,
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
    m = x.numel() // x.shape[1] if merge == ABSENT else count
    rows = statistics.to(kernel.accumulation_dtype(x.dtype))
    (dx, dresidual), sums, global_sums = run_backward(
        kernel, grad_y, x, (rows,), epilogue, m, Merge.of(merge), energy=tap != ABSENT
    )
    listener = Tap.of(tap)
    passed = None if listener is None else listener.find(int(ticket))
    if passed is not None:
        passed.grads.append(global_sums)
    return _strided_like(dx, x), _sums(sums.dgamma, x), _sums(sums.dbeta, x), _or_empty(dresidual, x)


# --- shared by both pairs --------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save y if a residual precedes an activation: backward computes act' from it."""
    x, gamma, beta, residual, _, act, slope, *handles = inputs
    y, statistics, *numbers = output
    ctx.has_residual, ctx.how = residual is not None, (act, slope, *handles)
    ctx.save_for_backward(x, gamma, beta, None if residual is None or not act else y, statistics, *numbers)
    if not handles:
        ctx.mark_non_differentiable(statistics)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    operators = torch.ops.batchnorm
    backward = operators.tapped_backward if len(ctx.how) > 2 else operators.backward
    dx, dgamma, dbeta, dresidual = backward(grad_y, *ctx.saved_tensors, *ctx.how)
    _, gamma, beta, y, *_ = ctx.saved_tensors
    if not ctx.has_residual or y is None:  # without an activation the residual gets grad_y
        dresidual = grad_y if ctx.has_residual else None
    dgamma = None if gamma is None else dgamma.to(gamma.dtype)
    return dx, dgamma, None if beta is None else dbeta.to(beta.dtype), dresidual, *[None] * (1 + len(ctx.how))


for _name in ("forward", "tapped_forward"):
    torch.library.register_autograd(f"batchnorm::{_name}", _differentiate, setup_context=_save, lib=_LIBRARY)


def _kernel(x: Tensor, act: str, tapped: bool = False) -> Kernel:
    kernel = kernels.choose(x, tapped=tapped).kernel
    return kernel if (act or None) in kernel.activations and x.numel() else ATEN


def _strided_like(values: Tensor, x: Tensor) -> Tensor:
    """Copy to the strides of torch.empty_like(x), as the compiler expects, if they differ."""
    if values.stride() == x.stride() and x.is_contiguous():
        return values
    if values.stride() == torch.empty_like(x, device="meta").stride():
        return values
    return torch.empty_like(x).copy_(values)


def _or_empty(dresidual: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if dresidual is None else _strided_like(dresidual, x)


def _rows(forward: Forward) -> Tensor:
    """Mean, m2 and rstd, a row each."""
    vectors = forward.statistics
    return vectors[0].view(3, -1) if len(vectors) == 1 else torch.stack(vectors)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """Of the kernels that a compiled step calls on this device."""
    return torch.float64 if x.device.type == "cpu" else torch.float32


def _sums_dtype(x: Tensor) -> torch.dtype:
    """Wide enough for gamma's gradient."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sums(vector: Tensor, x: Tensor) -> Tensor:
    """A new vector: those of one kernel may share memory, or be the tap's."""
    return vector.to(_sums_dtype(x), copy=vector._is_view())
