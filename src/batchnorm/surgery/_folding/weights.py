"""Fold a batch norm's scale and shift into the weights of a convolution or linear layer (a map).

In eval mode a batch norm is y = scale·x + shift per channel, scale = gamma·rstd and shift = beta - mean·scale, with
rstd = 1/sqrt(running_var + eps). Computed in float64, cast at the end.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from batchnorm.kernels.aten import activate
from batchnorm.surgery._shared.activations import Activation, module_of
from batchnorm.surgery._shared.norm import Norm


class Weights(NamedTuple):
    """New parameters for a map."""

    weight: nn.Parameter
    bias: nn.Parameter

    def put(self, module: nn.Module) -> None:
        """Set the map's parameters, in a new dictionary."""
        module._parameters = {**module._parameters, "weight": self.weight, "bias": self.bias}


def in_out_channels(module: Any) -> tuple[int, int]:
    """Input and output channels of a convolution or linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def scale_and_shift(norm: Norm) -> tuple[Tensor, Tensor] | str:
    """y = scale·x + shift in eval mode, in float64; or why it has no such values."""
    mean, var, _ = norm.buffers()
    assert mean is not None
    assert var is not None
    mean, var, gamma, beta = mean.double(), var.double() + norm.eps, norm.scale, norm.tensor("beta")
    if not bool(mean.isfinite().all() and var.isfinite().all()):
        return "its running statistics are not finite: recalibrate it first"
    if bool((var <= 0).any()):
        return "running_var + eps is not positive: recalibrate it first"
    scale = var.rsqrt() if gamma is None else var.rsqrt() * gamma.double()
    return scale, -mean * scale if beta is None else beta.double() - mean * scale


def fold_weights(module: Any, norm: Norm, before: bool) -> Weights | str:
    """The map's weights with the norm folded in, in its types and memory format; or why that is impossible.

    If the map comes before the norm, norm(Wx + b) = W'x + b': W' = W·scale and b' = b·scale + shift, per output
    channel. If it comes after, W norm(x) + b = W'x + b': W' = W·scale per input channel and b' = b + Σ W·shift, over
    all inputs of an output. At a border padded with zeros some inputs are missing: a shift cannot be folded there.
    """
    linear = scale_and_shift(norm)
    if isinstance(linear, str):
        return linear
    scale, shift = linear
    if not before and bool((shift != 0).any()) and (why := _why_uneven(module)) is not None:
        return why
    # The weight as (groups, out of a group, in of a group, kernel).
    groups, transposed = getattr(module, "groups", 1), isinstance(module, _ConvTransposeNd)
    weight = module.weight.double().reshape(groups, module.weight.shape[0] // groups, module.weight.shape[1], -1)
    weight = weight.transpose(1, 2) if transposed else weight
    bias = weight.new_zeros(in_out_channels(module)[1]) if module.bias is None else module.bias.double()
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


def _why_uneven(module: Any) -> str | None:
    """Why some outputs of the map sum over fewer inputs; None if all sum over the same."""
    if isinstance(module, nn.Linear):
        return None
    if isinstance(module, _ConvTransposeNd):
        crops: Any = zip(module.padding, module.output_padding, strict=True)
        reaches = zip(module.dilation, module.kernel_size, strict=True)
        # With enough cropping, every weight contributes to each remaining output.
        cropped = all(p - o >= d * (k - 1) for (p, o), (d, k) in zip(crops, reaches, strict=True))
        even = cropped and set(module.stride) == {1}
        return None if even else "at the border of a transposed convolution the norm's shift has fewer weights"
    zeros = module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice)
    return "the convolution pads with zeros, which the norm's shift does not reach" if zeros else None


class Epilogue(nn.Module):
    """y = act(x [+ residual]): the rest of a folded layer that is called with a residual."""

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


def remainder(norm: Norm, residual: bool) -> nn.Module:
    """The module for what the norm computes besides scale and shift; torch.nn's if there is one."""
    if norm.follows:
        sequence = nn.Sequential(OrderedDict(norm.follows))
        sequence.training = False  # its modules keep their modes
        return sequence
    activation = norm.activation or Activation(None)
    return (Epilogue(activation.act, activation.slope) if residual else module_of(activation)).eval()
