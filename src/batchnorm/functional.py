"""batch_norm(): a tensor in, a tensor out.

    y = act(gamma·(x - mean)/sqrt(var + eps) + beta [+ residual])

`kernels.choose` names the kernel. Where PyTorch differentiates the kernel's own operators, it does; else
`batchnorm.autograd` gives it the formulas of `batchnorm.spec`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm import errors, kernels
from batchnorm.activations import Act, check_act
from batchnorm.autograd import by_kernel
from batchnorm.compiled import by_operator
from batchnorm.kernels.aten import ATEN, composite
from batchnorm.kernels.contract import Epilogue, Merge, Tap

__all__ = ["batch_norm"]

# Plain tensors only: a subclass may override operators that the kernels bypass.
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
    act: Act | None = None,
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
        residual: added before the activation, of the input's shape. It is never saved for backward, and may change
            after this call. Saved is what PyTorch's operators would save: the input, and the output of relu, sigmoid
            and tanh or the input of any other activation.
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


def transform(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    epilogue: Epilogue,
    tap: Tap | None = None,
    merge: Merge | None = None,
) -> Tensor:
    """`batch_norm` for the layers: momentum may be a tensor, and `tap` receives the by-products of a training step.

    With `merge`, a training x is a part of the batch, which may be empty or of one value.
    """
    if not isinstance(x, Tensor):
        raise errors.not_a_tensor("input", x)
    if training and merge is None:
        _check_more_than_one_value(x)
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}: the default is 1e-5")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}: the default is 1e-5")
    if epilogue.residual is not None:
        check_residual(x, epilogue.residual)
    if isinstance(momentum, Tensor):
        if running_mean is not None and running_var is not None:
            return _with_tensor_momentum(x, running_mean, running_var, training, momentum, eps, epilogue, tap, merge)
        momentum = 0.0
    running = running_mean, running_var
    if torch.compiler.is_compiling():
        listening = tap is not None and not torch.compiler.is_exporting()
        if training and (merge is not None or listening or kernels.compiled(x)):
            return by_operator(x, running, momentum, eps, epilogue, tap, merge)
    elif torch._C._get_tracing_state() is None:
        fused = epilogue.act is not None or epilogue.residual is not None
        choice = kernels.choose(x, training, fused, tap is not None or merge is not None)
        covered = epilogue.act in choice.kernel.activations
        wanted = tap is not None or merge is not None or (covered and not choice.differentiable)
        if wanted and (x.numel() or merge is not None) and _plain(x, running, epilogue, training, momentum):
            if tap is not None and tap.look is not None:
                tap.look(x)
            kernel = choice.kernel if covered and x.numel() else ATEN
            return by_kernel(kernel, x, running, training, momentum, eps, epilogue, tap, merge)
    try:
        if merge is not None:
            raise RuntimeError("a batch norm over several processes takes plain tensors, outside of torch.func")
        return composite(x, running_mean, running_var, training, momentum, eps, epilogue)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        message = errors.batch_norm_error(x, *running, epilogue.gamma, epilogue.beta, training, momentum, eps)
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
    """Whether a kernel may run it: what is special (a mode of PyTorch's) or wrong is the composite's."""
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or type(x) not in _PLAIN
        or x.dim() < 2
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
    merge: Merge | None,
) -> Tensor:
    """The batch's own statistics come back through copies of the buffers at momentum 1, and move them by a tensor.

    So a cumulative average (momentum = 1/n, n a buffer) needs no value on the host: no synchronization, no graph break.
    """
    mean, var = running_mean.clone(), running_var.clone()
    y = transform(x, mean, var, training, 1.0, eps, epilogue, tap, merge)
    if training:
        wide = torch.promote_types(running_mean.dtype, torch.float32)
        with torch.no_grad():
            for running, batch in ((running_mean, mean), (running_var, var)):
                running.copy_(torch.lerp(running.to(wide), batch.to(wide), momentum.to(wide)))
    return y


def _check_more_than_one_value(x: Tensor) -> None:
    if x.dim() > 1 and x.numel() != x.size(1):
        return
    shape = x.size()
    if not shape:
        raise IndexError(errors.too_few_dimensions(x))
    values = shape[0]
    for length in shape[2:]:
        values = values * length
    if values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}: one value has no variance; "
            "use a larger batch, drop_last=True in the DataLoader, or .eval()"
        )


def check_residual(x: Tensor, residual: object) -> None:
    """Before anything moves: what the addition would refuse must not be found out after the running statistics."""
    if not isinstance(residual, Tensor):
        raise errors.not_a_tensor("residual", residual)
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
