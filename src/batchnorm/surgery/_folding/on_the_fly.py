"""Apply a frozen batch norm through the weights of the map before it, in every forward and inside autograd.

The map (a convolution or linear layer) computes y = W'x + b' with W' = scale·W and b' = scale·b + shift, where
scale = gamma·rstd and shift = beta - mean·scale. Its weights keep their gradients, and the norm saves nothing. The
norm returns its input, or applies its fused activation.

Only classes change. The map has a reference to the norm and reads the norm's tensors in every forward. If the norm is
no longer folded, the map runs as usual.

If the next map saves the output of the activation, an activation that saves its output saves nothing more. PyTorch's
ReLU, Sigmoid and Tanh do; for ReLU6, LeakyReLU and ELU the function here does. If nothing else saves the output, as
where it is padded first, a mask is saved: a byte for each value.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from batchnorm.activations import BY_Y
from batchnorm.functional import check_residual
from batchnorm.kernels.aten import activate
from batchnorm.restoring import set_class
from batchnorm.surgery._fusing.classes import subclass
from batchnorm.surgery._shared.activations import Activation

# The class attribute of a folded norm; modules that must not import this one read it, such as the recording.
_FOLDED = "_batchnorm_folded"
# The instance attribute of a map: the norm that it applies. It is no submodule, so the state dict does not change.
# Copies and pickles of the model keep the two together.
_NORM = "_batchnorm_applies"
# The class attribute with the original class of a map or an activation.
_BASE = "_batchnorm_applied_base"

_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def is_folded(norm: nn.Module) -> bool:
    """Whether the layer is applied through the weights of the map before it."""
    return bool(getattr(type(norm), _FOLDED, False))


def apply_through(module: nn.Module, norm: nn.Module) -> None:
    """Make the map apply the norm, whose class the caller changes."""
    cls: Any = type(module)
    set_class(module, map_class(cls))
    vars(module)[_NORM] = norm


def unfold(model: nn.Module) -> None:
    """Restore the classes of maps whose norm is not folded; of activations if no folded norm is left in the model."""
    modules = list(model.modules())
    some = any(map(is_folded, modules))
    for module in modules:
        base = vars(type(module)).get(_BASE)
        norm = vars(module).get(_NORM)
        if norm is not None and not is_folded(norm):
            del vars(module)[_NORM]
            if base is not None:  # a parametrization that came later made another class
                set_class(module, base)
        elif base is not None and norm is None and not some:
            vars(module).pop(_KEEPS, None)
            set_class(module, base)


# --- maps -------------------------------------------------------------------------------------------------------------


@cache
def map_class(cls: Any) -> type:
    """The subclass of a map's class that applies a norm; copies and pickles have it too."""

    def forward(self: Any, input: Tensor, *output_size: Any, **named: Any) -> Any:
        norm = self.__dict__.get(_NORM)
        if norm is None or not is_folded(norm):
            return cls.forward(self, input, *output_size, **named)
        return run_with(self, norm, input, *output_size, **named)

    forward.__qualname__ = f"{cls.__qualname__}.forward"
    return subclass(cls, (), {"forward": forward, _BASE: cls}, map_class)


def _scaled(module: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """W' and b', with the gradients of W and b; in the type of W, computed in float32 at least."""
    weight, bias = module.weight, module.bias
    dtype = torch.promote_types(torch.promote_types(weight.dtype, norm.running_var.dtype), torch.float32)
    # To the device of a replica of nn.DataParallel, whose norm is the original.
    to = {"dtype": dtype, "device": weight.device}
    scale = torch.rsqrt(norm.running_var.to(**to) + norm.__dict__["eps"])
    if norm.weight is not None:
        scale = scale * norm.weight.to(**to)
    shift = -norm.running_mean.to(**to) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(**to)
    if bias is not None:
        shift = shift + bias * scale
    return (weight * _along(scale, module)).to(weight.dtype), shift.to(weight.dtype)


def _along(scale: Tensor, module: Any) -> Tensor:
    """The scales of the output channels, shaped to multiply the weight."""
    ones = (1,) * (module.weight.dim() - 2)
    if not isinstance(module, _ConvTransposeNd):
        return scale.reshape(-1, 1, *ones)
    # (in, out of a group, ...): the inputs of a group have the outputs of that group.
    rows = scale.reshape(module.groups, -1)
    return rows.repeat_interleave(module.in_channels // module.groups, 0).reshape(*module.weight.shape[:2], *ones)


def run_with(module: Any, norm: nn.Module, input: Tensor, output_size: Any = None) -> Any:
    """The map and the norm after it, without the norm's activation."""
    weight, bias = _scaled(module, norm)
    if isinstance(module, nn.Linear):
        if input.dim() != 2:
            raise ValueError(
                f"a batch norm is folded into this Linear, which takes (N, {module.in_features}) then, got "
                f"{tuple(input.shape)}: batchnorm.unfreeze the model first"
            )
        return F.linear(input, weight, bias)
    if not isinstance(module, _ConvTransposeNd):
        return module._conv_forward(input, weight, bias)
    axes = len(module.kernel_size)
    # Typed as lists, which only TorchScript needs.
    sizes: Any = module.stride, module.padding, module.kernel_size, axes, module.dilation
    padding = module._output_padding(input, output_size, *sizes)
    return _TRANSPOSED[axes](
        input, weight, bias, module.stride, module.padding, padding, module.groups, module.dilation
    )


# --- norms ------------------------------------------------------------------------------------------------------------


class FoldedNorm:
    """Mixin of torch.nn's layers that the map before them applies."""

    _batchnorm_folded = True

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, which is normalized already."""
        self._check_input_dim(input)  # type: ignore[attr-defined]
        return input


class FoldedLayer:
    """Mixin of this package's layers that the map before them applies."""

    _batchnorm_folded = True

    def _fused(self, input: Tensor, residual: Tensor | None, act: str | None, slope: float) -> Tensor:
        """act(input [+ residual]): the input is normalized already."""
        self._check_input_dim(input)  # type: ignore[attr-defined]
        if residual is not None:
            check_residual(input, residual)
        return apply_activation(input if residual is None else input + residual, Activation(act, slope))

    def _masked(self, *_: object) -> Tensor:
        """Refuse a mask or lengths: the map normalizes all positions."""
        raise RuntimeError(
            "a batch norm that is folded into the map before it takes no mask and no lengths: batchnorm.unfreeze it, "
            "and give batchnorm.freeze an example that has them"
        )


def mixin_of(cls: type[_BatchNorm]) -> type:
    """The mixin of a layer's class."""
    return FoldedLayer if hasattr(cls, "_fused") else FoldedNorm


# --- activations ------------------------------------------------------------------------------------------------------

_GRADIENTS: dict[str, Any] = {
    "relu": lambda g, y, _: torch.ops.aten.threshold_backward(g, y, 0),
    "relu6": lambda g, y, _: torch.ops.aten.hardtanh_backward(g, y, 0, 6),
    "leaky_relu": lambda g, y, slope: torch.ops.aten.leaky_relu_backward(g, y, slope, True),
    "elu": lambda g, y, _: torch.ops.aten.elu_backward(g, 1, 1, 1, True, y),
}
# Piecewise linear: the derivative is 1 where the mask of y is True, and else 0 or the slope. Comparisons take twice as
# long as these, and give another mask for NaN than PyTorch's derivatives.
_MASKS: dict[str, Any] = {
    "relu": lambda y: y.bool(),
    "relu6": lambda y: torch.ops.aten.hardtanh_backward(y, y, 0, 6).bool(),
    "leaky_relu": lambda y: y > 0,
}
_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
}
# The instance attribute of an activation module: what it saves, "output" or "mask".
_KEEPS = "_batchnorm_keeps"


def can_use_output(activation: Activation) -> bool:
    """Whether backward can use y = act(z): with a slope that is not negative, z > 0 where y > 0."""
    act, slope = activation
    return act in BY_Y or (act in _GRADIENTS and not (act == "leaky_relu" and slope < 0))


def can_use_mask(activation: Activation) -> bool:
    """Whether backward can use a bool for each value."""
    return activation.act in _MASKS and can_use_output(activation)


def apply_activation(z: Tensor, activation: Activation, mask: bool = False) -> Tensor:
    """act(z), which saves its output for backward where it can, or a mask."""
    act, slope = activation
    # A compiler and an exporter choose by themselves what to save, and torch.jit.trace knows no such function.
    tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    own = (mask or act != "relu") and act in _GRADIENTS and can_use_output(activation)
    if not own or tracing or not (torch.is_grad_enabled() and z.requires_grad):
        return activate(z, act, slope)
    y: Tensor = _ByOutput.apply(z, act, slope, mask)  # type: ignore[no-untyped-call]
    return y


class _ByOutput(torch.autograd.Function):
    """y = act(z), differentiated from y or from a mask of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, act: str, slope: float, mask: bool) -> Tensor:
        return activate(z, act, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, float, bool], output: Tensor) -> None:
        _, act, slope, mask = inputs
        saved = _MASKS[act](output) if mask else output
        ctx.save_for_backward(saved)
        ctx.save_for_forward(saved)
        ctx.how = act, slope, mask

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        return _gradient(grad_y, ctx.saved_tensors[0], *ctx.how), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _gradient(tangent, ctx.saved_tensors[0], *ctx.how)


def _gradient(g: Tensor, saved: Tensor, act: str, slope: float, mask: bool) -> Tensor:
    # 1 has the derivative of all values where the mask is True, 0 of all others. torch.where is ten times as slow.
    return _GRADIENTS[act](g, saved.to(g.dtype) if mask else saved, slope)  # type: ignore[no-any-return]


@cache
def activation_class(cls: Any) -> type:
    """The subclass of an activation that saves its output or a mask; copies and pickles have it too."""

    def forward(self: Any, input: Tensor) -> Any:
        activation = Activation(_NAMES[cls], getattr(self, "negative_slope", 0.0))
        if getattr(self, "alpha", 1.0) != 1.0:  # changed since
            return cls.forward(self, input)
        return apply_activation(input, activation, self.__dict__.get(_KEEPS) == "mask")

    forward.__qualname__ = f"{cls.__qualname__}.forward"
    return subclass(cls, (), {"forward": forward, _BASE: cls}, activation_class)


def save_instead(module: nn.Module, what: str) -> None:
    """Make an activation save its "output" or a "mask"; nothing changes if PyTorch's saves its output."""
    cls: Any = type(module)
    if cls in _NAMES and not (what == "output" and cls is nn.ReLU):
        set_class(module, activation_class(cls))
        vars(module)[_KEEPS] = what
