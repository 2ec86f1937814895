"""One step of stochastic gradient descent. torch.optim does the same, and loads the compiler for it (two seconds)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sgd_step(parameters: Sequence[Tensor], loss: Tensor, rate: float) -> None:
    """w ← w - rate·∂loss/∂w, for every parameter w."""
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=rate)
