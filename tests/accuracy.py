"""How far ours is from float64 and how far PyTorch's own is: the yardstick of the tests of kernels and layers.

The criterion itself is `batchnorm.testing`, which `batchnorm bench` holds its cases to as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm import activations, testing
from batchnorm.testing import (
    Call,
    f64,
)

__all__ = [
    "ACTIVATIONS",
    "KINKS",
    "Case",
    "Outputs",
    "activate",
    "assert_accurate",
    "f64",
    "gradients",
    "leaves",
    "pytorchs",
]

ACTIVATIONS = (None, *activations.ACTIVATIONS)
KINKS = {act: row.kinks for act, row in activations.ACTIVATIONS.items()}


def activate(z: Tensor, act: str | None, slope: float) -> Tensor:
    """By PyTorch's function of that name."""
    if act is None:
        return z
    return F.leaky_relu(z, slope) if act == "leaky_relu" else getattr(torch, act, getattr(F, act))(z)


Outputs = dict[str, Tensor]


class Case(Call):
    """A call, as hypothesis shows it: the tensors' values follow from the seed in its note."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def pytorchs(case: Case) -> Outputs:
    """PyTorch's own batch_norm, a separate addition and a separate activation."""
    x, gamma, beta, residual = leaves(case)
    running = [None if t is None else t.clone() for t in (case.running_mean, case.running_var)]
    z = F.batch_norm(x, *running, gamma, beta, case.training, case.momentum, case.eps)
    z = z if residual is None else z + residual
    y = activate(z, case.act, case.slope)
    return {**gradients(y, case, x, gamma, beta, residual), "running_mean": running[0], "running_var": running[1]}


def leaves(case: Case) -> list[Tensor | None]:
    """x, gamma, beta and residual with their strides, as leaves that want a gradient."""
    tensors = (case.x, case.gamma, case.beta, case.residual)
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]


def gradients(y: Tensor, case: Case, *inputs: Tensor | None) -> Outputs:
    """y and its gradients to x, gamma, beta and residual, by the names of `spec`."""
    wanted = {
        name: tensor
        for name, tensor in zip(("dx", "dgamma", "dbeta", "dresidual"), inputs, strict=True)
        if tensor is not None and tensor.requires_grad
    }
    grads = torch.autograd.grad(y, list(wanted.values()), case.grad_y) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_accurate(ours: Outputs, case: Case, *, note: object = "") -> None:
    """Hold every tensor in `ours`, by name, against the truth; PyTorch's own error beside it."""
    testing.assert_accurate(ours, pytorchs(case), testing.truth(case), note=note)
