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
from batchnorm.kernels.aten import ACTIVATIONS, ATEN, activate, composite
from batchnorm.kernels.contract import Epilogue, GradSums, InputGrads, Kernel, Tap, UnavailableError

__all__ = ["batch_norm"]

# What is no subclass: a subclass may mean anything by its operators, and a kernel does not call them.
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


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
    running = running_mean, running_var
    if not (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None):
        choice = kernels.choose(x, training, epilogue.act is not None or epilogue.residual is not None)
        covered = epilogue.act in choice.kernel.activations
        by_kernel = tap is not None or (covered and not choice.differentiable)
        if by_kernel and _plain(x, running, epilogue, training, momentum):
            kernel = choice.kernel if covered else ATEN
            return _by_kernel(kernel, x, running, training, momentum, eps, epilogue, tap)
    try:
        return composite(x, running_mean, running_var, training, momentum, eps, epilogue)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        message = explain.batch_norm_error(x, *running, epilogue.gamma, epilogue.beta, training, momentum, eps)
        if message is None:
            raise
        raise type(error)(message) from error


def _plain(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    epilogue: Epilogue,
    training: object,
    momentum: object,
) -> bool:
    """Whether a kernel may run it: what is special (a mode of PyTorch's, empty input) or wrong is the composite's."""
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or type(x) not in _PLAIN
        or x.dim() < 2
        or x.numel() == 0
        or not isinstance(training, bool)
        or not isinstance(momentum, int | float)
        or (running[0] is None) is not (running[1] is None)
        or (running[0] is None and not training)
    ):
        return False
    types = {x.dtype}
    for vector in (*running, epilogue.gamma, epilogue.beta):
        if vector is not None:
            if type(vector) not in _PLAIN or vector.shape != x.shape[1:2] or vector.device != x.device:
                return False
            types.add(vector.dtype)
    mixed = types - {x.dtype}
    wide_parameters = mixed == {torch.float32} and x.dtype in (torch.float16, torch.bfloat16)
    if mixed and not (wide_parameters and _all_of(torch.float32, *running, epilogue.gamma, epilogue.beta)):
        return False
    return not any(vector is not None and vector.requires_grad for vector in running)


def _all_of(dtype: torch.dtype, *vectors: Tensor | None) -> bool:
    return all(vector is None or vector.dtype == dtype for vector in vectors)


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
    running: tuple[Tensor | None, Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
    epilogue: Epilogue,
    tap: Tap | None,
) -> Tensor:
    if epilogue.residual is not None and epilogue.residual.dtype != x.dtype:
        z = _by_kernel(kernel, x, running, training, momentum, eps, Epilogue(epilogue.gamma, epilogue.beta), tap)
        return activate(z + epilogue.residual, epilogue.act, epilogue.slope)
    statistics = None if training else running
    arguments = (
        x, epilogue.gamma, epilogue.beta, epilogue.residual, statistics, kernel, eps, epilogue.act, epilogue.slope, tap
    )  # fmt: skip
    y, mean, var = _Transform.apply(*arguments)  # type: ignore[no-untyped-call]
    if training:
        m = math.prod(x.shape) // x.shape[1]
        if tap is not None:
            tap.count, tap.mean, tap.var = m, mean, var
        if running[0] is not None and running[1] is not None:
            _move(running[0], mean, float(momentum))
            _move(running[1], var * (m / (m - 1)), float(momentum))
    return y  # type: ignore[no-any-return]


def _move(average: Tensor, batch: Tensor, momentum: float) -> None:
    """average ← (1 - momentum)·average + momentum·batch, in float32 at least."""
    with torch.no_grad():
        if average.dtype in (torch.float32, torch.float64):
            average.lerp_(batch.to(average.dtype), momentum)
        else:
            average.copy_(torch.lerp(average.to(batch.dtype), batch, momentum))


class _Transform(torch.autograd.Function):
    """One kernel's forward and backward, as PyTorch's autograd wants them.

    Kept for backward are x and, where there is a residual and an activation, y or the residual: nothing that PyTorch's
    own operators would not keep. Differentiated twice, backward is the composite's, which PyTorch differentiates on.
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
        try:
            y, mean, var, rstd = _forward(kernel, x, statistics, eps, epilogue)
        except UnavailableError as error:
            kernels.give_up(error)
            kernel = ATEN
            y, mean, var, rstd = _forward(kernel, x, statistics, eps, epilogue)
        added = None if act is None else residual
        if added is not None and epilogue.told_by_y:
            added = y
        ctx.save_for_backward(x, gamma, beta, added, mean, None if statistics is None else var, rstd)
        ctx.training, ctx.kernel, ctx.eps, ctx.act, ctx.slope, ctx.tap = (
            statistics is None,
            kernel,
            eps,
            act,
            slope,
            tap,
        )
        ctx.told_by_y = epilogue.told_by_y
        ctx.has_residual = residual is not None
        ctx.statistics_dtype = mean.dtype if statistics is None else statistics[0].dtype
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, added, mean, var, rstd = ctx.saved_tensors
        residual, y = (None, added) if ctx.told_by_y else (added, None)
        epilogue = Epilogue(gamma, beta, residual, ctx.act, ctx.slope, y)
        tap = ctx.tap if ctx.training else None
        m = x.numel() // x.shape[1]
        if torch.is_grad_enabled():
            if tap is not None:
                with torch.no_grad():
                    _fill(tap, ctx.kernel.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=True))
            dx, dgamma, dbeta, dresidual = _differentiable_backward(ctx, grad_y, x, mean, var, epilogue)
        else:
            try:
                grads, sums = _backward(ctx, ctx.kernel, grad_y, x, mean, rstd, epilogue, m, tap is not None)
            except UnavailableError as error:
                kernels.give_up(error)
                grads, sums = _backward(ctx, ATEN, grad_y, x, mean, rstd, epilogue, m, tap is not None)
            if tap is not None:
                _fill(tap, sums)
            dx, dresidual = grads
            dgamma = None if gamma is None else sums.dgamma.to(gamma.dtype)
            dbeta = None if beta is None else sums.dbeta.to(beta.dtype)
        if ctx.has_residual and dresidual is None:  # without an activation it is what arrives
            dresidual = grad_y
        return (dx, dgamma, dbeta, dresidual, *[None] * 6)


def _forward(
    kernel: Kernel, x: Tensor, statistics: tuple[Tensor, Tensor] | None, eps: float, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and the mean, var and rstd that it was computed with."""
    if statistics is None:
        y, moments, rstd = kernel.forward(x, eps, epilogue)
        return y, moments.mean, moments.var, rstd
    mean, var = (running.to(kernel.accumulation_dtype(running.dtype)) for running in statistics)
    rstd = torch.rsqrt(var + eps)
    return kernel.normalize(x, mean, rstd, epilogue), mean, var, rstd


def _backward(
    ctx: Any,
    kernel: Kernel,
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    m: int,
    energy: bool,
) -> tuple[InputGrads, GradSums]:
    if ctx.training and ctx.needs_input_grad[0]:
        return kernel.backward(grad_y, x, mean, rstd, epilogue, m, energy=energy)
    sums = kernel.reduce_grad(grad_y, x, mean, rstd, epilogue, energy=energy)
    return kernel.input_grad(grad_y, x, mean, rstd, epilogue, sums if ctx.training else None, m), sums


def _fill(tap: Tap, sums: GradSums) -> None:
    tap.dgamma, tap.dbeta, tap.energy = sums.dgamma, sums.dbeta, sums.energy


def _differentiable_backward(
    ctx: Any, grad_y: Tensor, x: Tensor, mean: Tensor, var: Tensor | None, epilogue: Epilogue
) -> tuple[Tensor | None, ...]:
    """dx, dgamma, dbeta and dresidual, each differentiable in grad_y and in what forward was given."""
    dresidual = None
    with torch.enable_grad():
        if epilogue.y is not None:
            # Piecewise linear: act' is a constant on this side of the kink, and z is needed for nothing else.
            z = epilogue.y.detach().requires_grad_()
            (grad_y,) = torch.autograd.grad(activate(z, epilogue.act, epilogue.slope), z, grad_y, create_graph=True)
            dresidual = grad_y
            epilogue = Epilogue(epilogue.gamma, epilogue.beta)
        if var is None:  # the batch's own, which x has
            y = composite(x, None, None, True, 0.0, ctx.eps, epilogue)
        else:
            mean, var = mean.to(ctx.statistics_dtype), var.to(ctx.statistics_dtype)
            y = composite(x, mean, var, False, 0.0, ctx.eps, epilogue)
    wanted = [x, epilogue.gamma, epilogue.beta, epilogue.residual]
    inputs = [tensor for tensor in wanted if tensor is not None and tensor.requires_grad]
    grads = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=True))
    found = [next(grads) if tensor is not None and tensor.requires_grad else None for tensor in wanted]
    return (*found[:3], dresidual if dresidual is not None else found[3])


def _check_more_than_one_value(x: Tensor) -> None:
    if x.dim() > 1 and x.numel() != x.size(1):
        return
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
