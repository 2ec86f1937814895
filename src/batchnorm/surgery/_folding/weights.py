"""The arithmetic of a fold: a convolution's or linear map's weights with a batch norm's scale and shift in them.

In eval mode a batch norm is y = scale·x + shift per channel, scale = gamma·rstd and shift = beta - mean·scale, with
rstd = 1/sqrt(running_var + eps). All is computed in float64 and cast at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from batchnorm.kernels.aten import activate
from batchnorm.surgery._shared.activations import Activation, module_of
from batchnorm.surgery._shared.layers import act_of


class Weights(NamedTuple):
    """New parameters for a map."""

    weight: nn.Parameter
    bias: nn.Parameter

    def put(self, module: nn.Module) -> None:
        """The map has these weights from now on, in a new dictionary."""
        module._parameters = {**module._parameters, "weight": self.weight, "bias": self.bias}


def units(module: Any) -> tuple[int, int]:
    """Channels in and out of a convolution or linear map."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def folded(module: Any, norm: _BatchNorm, before: bool) -> Weights | str:
    """The map's weights with the norm in them, in the map's types and memory format; or why there are none.

    Of a map before the norm, norm(Wx + b) = W'x + b': W' = W·scale and b' = b·scale + shift, per output unit. Of one
    after it, W norm(x) + b = W'x + b': W' = W·scale per input unit and b' = b + Σ W·shift. That sum is over all inputs
    of an output: at a border padded with zeros some are missing, so that a shift cannot be folded there.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.double(), norm.running_var.double() + vars(norm)["eps"]
    if not bool(mean.isfinite().all() and var.isfinite().all()):
        return "its running statistics are not finite: recalibrate it first"
    if bool((var <= 0).any()):
        return "running_var + eps is not positive: recalibrate it first"
    scale = var.rsqrt() if norm.weight is None else var.rsqrt() * norm.weight.double()
    shift = -mean * scale if norm.bias is None else norm.bias.double() - mean * scale
    why = None if before or not bool((shift != 0).any()) else _uneven(module)
    if why is not None:
        return why
    # The weight as (groups, out of a group, in of a group, kernel).
    groups, transposed = getattr(module, "groups", 1), isinstance(module, _ConvTransposeNd)
    weight = module.weight.double().reshape(groups, module.weight.shape[0] // groups, module.weight.shape[1], -1)
    weight = weight.transpose(1, 2) if transposed else weight
    bias = weight.new_zeros(units(module)[1]) if module.bias is None else module.bias.double()
    if before:
        weight, bias = weight * scale.reshape(groups, -1, 1, 1), bias * scale + shift
    else:
        bias = bias + (weight * shift.reshape(groups, 1, -1, 1)).sum((2, 3)).flatten()
        weight = weight * scale.reshape(groups, 1, -1, 1)
    weight = weight.transpose(1, 2) if transposed else weight
    old, kind = module.weight, module.weight if module.bias is None else module.bias
    new = torch.empty_like(old, memory_format=torch.preserve_format).copy_(weight.reshape(old.shape))
    cast = bias.to(kind.dtype)
    if not bool(new.isfinite().all() and cast.isfinite().all()):
        return f"the folded weights are not finite in {str(old.dtype).removeprefix('torch.')}"
    return Weights(nn.Parameter(new, old.requires_grad), nn.Parameter(cast, kind.requires_grad))


def _uneven(module: Any) -> str | None:
    """Why not every output of the map sums over the same inputs; None where each does."""
    if isinstance(module, nn.Linear):
        return None
    if isinstance(module, _ConvTransposeNd):
        crops: Any = zip(module.padding, module.output_padding, strict=True)
        reaches = zip(module.dilation, module.kernel_size, strict=True)
        # Cropped by what a kernel reaches, only outputs that every weight contributes to are left.
        cropped = all(p - o >= d * (k - 1) for (p, o), (d, k) in zip(crops, reaches, strict=True))
        even = cropped and set(module.stride) == {1}
        return None if even else "at the border of a transposed convolution the norm's shift has fewer weights"
    zeros = module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice)
    return "the convolution pads with zeros, which the norm's shift does not reach" if zeros else None


class Epilogue(nn.Module):
    """y = act(x [+ residual]): what is left of a layer of this package that is called with a residual."""

    def __init__(self, act: str | None = None, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.act = act
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The residual, of the input's shape, is added before the activation."""
        return activate(input if residual is None else input + residual, self.act, self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.act == "leaky_relu" else ""
        return f"act={self.act}{slope}"


def remainder(norm: nn.Module, residual: bool) -> nn.Module:
    """A module that does what the norm does besides scaling and shifting: torch.nn's own where there is one for it."""
    activation = Activation(act_of(norm), vars(norm).get("negative_slope", 0.01))
    made = Epilogue(activation.act, activation.slope) if residual else module_of(activation)
    return made.eval()
