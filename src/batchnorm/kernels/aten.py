"""The kernel made of PyTorch's operators: it runs on any device, floating-point type and layout.

Two forms of one transform:

- `composite`: PyTorch's batch_norm, addition and activation, differentiated by PyTorch. It supports double backward,
  forward mode, vmap, meta tensors, torch.compile and torch.export. It is the fallback of all faster kernels.
- `AtenKernel`: the verbs of `kernels.contract`, for callers that need intermediate results.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

from batchnorm.activations import ACTIVATIONS, BY_Y
from batchnorm.kernels.contract import Call, Count, Epilogue, GradSums, InputGrads, Kernel
from batchnorm.moments import Moments


def _in_torch(path: str) -> Callable[..., Tensor]:
    """The function of torch at a path in `activations.Activation.functions`, such as "sigmoid"."""
    return operator.attrgetter(path)(torch)  # type: ignore[no-any-return]


_FUNCTIONS = {act: _in_torch(next(iter(row.functions))) for act, row in ACTIVATIONS.items()}
_IN_PLACE = {
    act: partial(_in_torch(path), inplace=True)
    for act, row in ACTIVATIONS.items()
    for path, names in row.functions.items()
    if "inplace" in names
} | {act: _in_torch(f"{act}_") for act in ("sigmoid", "tanh")}
"""By activation; gelu has none."""
_GRADIENTS = {act: getattr(torch.ops.aten, str(row.backward[0])) for act, row in ACTIVATIONS.items()}


def activate(z: Tensor, act: str | None, slope: float) -> Tensor:
    """act(z); z itself if act is None."""
    if act is None:
        return z
    return _FUNCTIONS[act](z) if ACTIVATIONS[act].slope is None else _FUNCTIONS[act](z, slope)


def gradient_by_y(g: Tensor, y: Tensor, act: str, slope: float = 0.0) -> Tensor:
    """g·act'(z) from y = act(z), for the activations of `activations.BY_Y`."""
    return _gradient(g, act, {"y": y, "slope": slope})


def gradient(g: Tensor, z: Tensor, act: str, slope: float) -> Tensor:
    """g·act'(z), equal to PyTorch's derivative of `activate`; for custom operators, where autograd is off."""
    if act in BY_Y and act != "relu":  # relu: y is positive where z is
        return gradient_by_y(g, activate(z, act, slope), act, slope)
    return _gradient(g, act, {"z": z, "y": z, "slope": slope})


def _gradient(g: Tensor, act: str, values: dict[str, Tensor | float]) -> Tensor:
    arguments = (values.get(name, name) if isinstance(name, str) else name for name in ACTIVATIONS[act].backward[1:])
    return _GRADIENTS[act](g, *arguments)  # type: ignore[no-any-return]


def add_and_activate(z: Tensor, epilogue: Epilogue) -> Tensor:
    """act(z [+ residual]), differentiated by PyTorch."""
    z = z if epilogue.residual is None else z + epilogue.residual
    return activate(z, epilogue.act, epilogue.slope)


def composite(call: Call) -> Tensor:
    """y = act(BN(x) [+ residual]), differentiated by PyTorch; updates the running statistics in training."""
    x, (mean, var), training, momentum, eps, epilogue, _, _ = call
    gamma, beta, residual, act, slope, *_ = epilogue
    z = torch.batch_norm(x, gamma, beta, mean, var, training, momentum, eps, torch.backends.cudnn.enabled)
    if (act is None and residual is None) or not _may_change(z):
        return activate(z if residual is None else z + residual, act, slope)
    if residual is not None:
        z = z.add_(residual) if residual.dtype == z.dtype else z + residual
    if act not in _IN_PLACE:
        return activate(z, act, slope)
    return _IN_PLACE[act](z) if ACTIVATIONS[act].slope is None else _IN_PLACE[act](z, slope)


def _may_change(z: Tensor) -> bool:
    """Whether operators may write their result to z, which only this call knows: nothing differentiates or records."""
    if z.requires_grad or type(z) is not Tensor or torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return False
    return forward_ad._current_level < 0


class AtenKernel(Kernel):
    """The verbs as element-wise operators and reductions in the accumulation type."""

    name: ClassVar[str] = "aten"
    types: ClassVar[frozenset[torch.dtype]] = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
    activations: ClassVar[frozenset[str | None]] = frozenset({None, *ACTIVATIONS})

    def accumulation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float64 for float64, float32 for everything narrower."""
        return torch.float64 if dtype == torch.float64 else torch.float32

    def statistics(self, x: Tensor) -> Moments:
        m = x.numel() // x.shape[1]
        wide = x.to(self.accumulation_dtype(x.dtype))
        if m == 0:  # one process's part of a batch may be empty
            return Moments(0, wide.new_zeros(x.shape[1]), wide.new_zeros(x.shape[1]))
        var, mean = torch.var_mean(wide, _all_but_channels(x), correction=0)
        return Moments.of_variance(m, mean, var)

    def normalize(self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
        z = _preactivation(_xhat(x, mean, rstd), epilogue)
        return _like_x(activate(z, epilogue.act, epilogue.slope), x)

    def reduce_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, *, energy: bool
    ) -> GradSums:
        xhat = _xhat(x, mean, rstd)
        g = _gradient_at_preactivation(grad_y, xhat, epilogue)
        axes = _all_but_channels(x)
        return GradSums(g.sum(axes), (g * xhat).sum(axes), (g * g).sum(axes) if energy else None)

    def input_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, sums: GradSums | None, m: Count
    ) -> InputGrads:
        xhat = _xhat(x, mean, rstd)
        g = _gradient_at_preactivation(grad_y, xhat, epilogue)
        dxhat = g if sums is None else g - _over(sums.dbeta / m, x) - xhat * _over(sums.dgamma / m, x)
        scale = rstd if epilogue.gamma is None else rstd * epilogue.gamma
        residual_like = epilogue.residual if epilogue.y is None else epilogue.y
        dresidual = None if residual_like is None else g.to(residual_like.dtype)
        return InputGrads(_like_x(dxhat * _over(scale, x), x), dresidual)


ATEN = AtenKernel()


def _like_x(values: Tensor, x: Tensor) -> Tensor:
    """Convert to x's type and to the layout of PyTorch's batch_norm: dense, channels last if x is."""
    return values.to(x.dtype).contiguous(memory_format=suggest_memory_format(x))


def _xhat(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _over(mean, x)) * _over(rstd, x)


def _preactivation(xhat: Tensor, epilogue: Epilogue) -> Tensor:
    z = xhat if epilogue.gamma is None else xhat * _over(epilogue.gamma, xhat)
    z = z if epilogue.beta is None else z + _over(epilogue.beta, xhat)
    return z if epilogue.residual is None else z + epilogue.residual


def _gradient_at_preactivation(grad_y: Tensor, xhat: Tensor, epilogue: Epilogue) -> Tensor:
    grad_y = grad_y.to(xhat.dtype)
    if epilogue.act is None:
        return grad_y
    if epilogue.y is not None:
        return gradient_by_y(grad_y, epilogue.y.to(xhat.dtype), epilogue.act)
    return gradient(grad_y, _preactivation(xhat, epilogue), epilogue.act, epilogue.slope)


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _over(per_channel: Tensor, x: Tensor) -> Tensor:
    """Per-channel values (C,) as a view that broadcasts over x."""
    return per_channel.view(1, -1, *[1] * (x.dim() - 2))
