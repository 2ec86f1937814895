"""The transform as an operator of PyTorch's own, for a training step that is recorded under torch.compile.

A compiled graph runs the operator as it stands, kernel and tap included, so that nothing breaks the graph. The tap is
known to it by number: what is compiled holds no Python object, and where nobody listens any more, nothing is told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.autograd import update
from batchnorm.kernels.aten import ATEN, activate
from batchnorm.kernels.contract import Epilogue, GradSums, Kernel, Tap, UnavailableError


def by_operator(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    epilogue: Epilogue,
    tap: Tap,
) -> Tensor:
    """y = act(BN(x) [+ residual]) in training; moves the running statistics, and fills the tap when it runs."""
    gamma, beta, residual, act, slope, _ = epilogue
    apart = residual is not None and residual.dtype != x.dtype
    inside, name = (None, "") if apart else (residual, act or "")
    y, mean, var, *_ = _forward(x, gamma, beta, inside, eps, name, slope, tap.handle)
    update(running, mean, var, x.numel() // x.shape[1], momentum)
    return activate(y + residual, act, slope) if apart and residual is not None else y


@torch.library.custom_op("batchnorm::tapped_forward", mutates_args=())
def _forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
    tap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y; mean, var and rstd in float64; and the pass's number, -1 for none."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope)
    y, moments, rstd = _by_kernel(x, epilogue, lambda kernel: kernel.forward(x, eps, epilogue))
    listening = Tap.of(tap)
    ticket = -1 if listening is None else listening.add(moments.count, moments.mean, moments.var).number
    return _laid_out(y, x), _wide(moments.mean), _wide(moments.var), _wide(rstd), torch.tensor(ticket)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, var, rstd = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(3))
    return torch.empty_like(x), mean, var, rstd, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("batchnorm::tapped_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    ticket: Tensor,
    act: str,
    slope: float,
    tap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dgamma, dbeta, and g, which is the residual's gradient; empty where there is none to be had."""
    epilogue = Epilogue(gamma, beta, residual, act or None, slope, y)
    m = x.numel() // x.shape[1]

    def backward(kernel: Kernel) -> tuple[Any, GradSums]:
        narrow = kernel.accumulation_dtype(x.dtype)
        return kernel.backward(grad_y, x, mean.to(narrow), rstd.to(narrow), epilogue, m, energy=True)

    (dx, dresidual), sums = _by_kernel(x, epilogue, backward)
    listening = Tap.of(tap)
    passed = None if listening is None else listening.find(int(ticket))
    if passed is not None:
        passed.grads.append(sums)
    added = x.new_empty(0) if dresidual is None else _laid_out(dresidual, x)
    return _laid_out(dx, x), _wide(sums.dgamma), _wide(sums.dbeta), added


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    ticket: Tensor,
    act: str,
    slope: float,
    tap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgamma, dbeta = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    added = torch.empty_like(x) if residual is not None or y is not None else x.new_empty(0)
    return torch.empty_like(x), dgamma, dbeta, added


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, residual, _, act, slope, tap = inputs
    y, mean, _, rstd, ticket = output
    told_by_y = Epilogue(None, None, residual, act or None, slope).told_by_y
    added = None if not act else residual
    ctx.has_residual, ctx.act, ctx.slope, ctx.tap = residual is not None, act, slope, tap
    kept_y = y if added is not None and told_by_y else None
    ctx.save_for_backward(x, gamma, beta, None if kept_y is not None else added, kept_y, mean, rstd, ticket)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, gamma, beta, residual, y, mean, rstd, ticket = ctx.saved_tensors
    dx, dgamma, dbeta, added = _backward(
        grad_y, x, gamma, beta, residual, y, mean, rstd, ticket, ctx.act, ctx.slope, ctx.tap
    )
    dresidual = None
    if ctx.has_residual:  # without an activation it is what arrives
        dresidual = added if residual is not None or y is not None else grad_y
    return (
        dx,
        None if gamma is None else dgamma.to(gamma.dtype),
        None if beta is None else dbeta.to(beta.dtype),
        dresidual,
        *[None] * 4,
    )


_forward.register_autograd(_differentiate, setup_context=_keep)


def _by_kernel(x: Tensor, epilogue: Epilogue, run: Any) -> Any:
    choice = kernels.choose(x, tapped=True)
    try:
        return run(choice.kernel if epilogue.act in choice.kernel.activations else ATEN)
    except UnavailableError as error:
        kernels.give_up(error)
        return run(ATEN)


def _wide(vector: Tensor) -> Tensor:
    """A copy in float64: what the graph changes in place must not be what the tap holds."""
    return vector.to(torch.float64, copy=True)


def _laid_out(values: Tensor, x: Tensor) -> Tensor:
    """In memory as torch.empty_like(x) is, which the compiler counts on."""
    if values.stride() == torch.empty_like(x, device="meta").stride():
        return values
    return torch.empty_like(x).copy_(values)
