"""What the tests of fold share: statistics that leave nothing at its initial value, and a comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MAPS = (nn.Linear, nn.modules.conv._ConvNd)


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode; running mean N(0, 0.5²) and variance log-uniform in 0.2..5 around what they are, gamma ±0.5..1.5.

    A model that has run in training mode before keeps a trace of its input in its output.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            c, dtype = layer.num_features, torch.float64
            with torch.no_grad():
                if layer.running_mean is not None:
                    shift = torch.randn(c, generator=generator, dtype=dtype) / 2 * layer.running_var.sqrt()
                    layer.running_mean.add_(shift)
                    layer.running_var.mul_(25 ** torch.rand(c, generator=generator, dtype=dtype) / 5)
                if layer.weight is not None:
                    sign = torch.randint(2, (c,), generator=generator) * 2 - 1
                    layer.weight.copy_(sign * (0.5 + torch.rand(c, generator=generator)))
                if layer.bias is not None:
                    layer.bias.copy_(torch.randn(c, generator=generator) / 2)
    return model.eval()


@torch.no_grad()
def moved(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest magnitude."""
    assert before.dtype == after.dtype
    return float((before.double() - after.double()).abs().max() / before.double().abs().max())


def norms(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
