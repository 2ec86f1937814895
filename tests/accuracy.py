"""How far ours is from float64 and how far PyTorch's own is: the yardstick of the tests of kernels and layers.

Every output passes, channel by channel, where

    max|ours - truth| <= 2·max|PyTorch's - truth| + allowance
    allowance = 8·eps_a·(the largest magnitude that the output's formula sums) + 2·eps_t·max|truth|

where for a running statistic |truth| is the largest of it and the two terms that are averaged, since they may cancel.
eps_t is the last digit of the tensor's type, eps_a of the type that sums are accumulated in (float32 for 16-bit types).
The truth is `batchnorm.spec` on the same input in float64. The first term is what one rounding of each intermediate
value costs (`_magnitudes`); it grows with mean/std, but not with its square as E[x²] - E[x]² would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm import spec

ACTIVATIONS = {
    None: lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "elu": lambda z, _: F.elu(z),
    "gelu": lambda z, _: F.gelu(z),
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
}
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}

Outputs = dict[str, Tensor]


@dataclass(repr=False)
class Case:
    """One call: the tensors as they are handed over, and the gradient that arrives at y."""

    x: Tensor
    grad_y: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    act: str | None = None
    slope: float = 0.01

    def __repr__(self) -> str:
        return (
            f"{tuple(self.x.shape)} {self.x.dtype}, strides {self.x.stride()} and {self.grad_y.stride()}, "
            f"eps={self.eps} act={self.act} training={self.training} residual={self.residual is not None}"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what hypothesis shows; the tensors' values follow from the seed in its note

    def away_from_kinks(self) -> Case:
        """Without gradient where z lies within rounding of a kink, where the derivative is anyone's guess."""
        mean, var = self.statistics()
        z = spec.forward_inference(f64(self.x), mean, var, *self.affine(), eps=self.eps, residual=f64(self.residual))
        close = 8 * torch.finfo(self.x.dtype).eps * (1 + np.abs(z) + _terms(self))
        for kink in KINKS.get(self.act, ()):
            blurred = torch.from_numpy(np.abs(z - kink) <= close)
            self = replace(self, grad_y=self.grad_y.masked_fill(blurred, 0.0))
        return self

    def affine(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        return f64(self.gamma), f64(self.beta)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return spec.statistics(f64(self.x)) if self.training else (f64(self.running_mean), f64(self.running_var))


def f64(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().numpy()


def truth(case: Case) -> dict[str, np.ndarray]:
    """What `batchnorm.spec` says: y, all gradients, the statistics, the running statistics afterwards, Σg²."""
    x, grad_y = f64(case.x), f64(case.grad_y)
    mean, var = case.statistics()
    how = {"eps": case.eps, "residual": f64(case.residual), "act": case.act, "slope": case.slope}
    if case.training:
        y = spec.forward(x, *case.affine(), **how)
        grads = spec.backward(grad_y, x, *case.affine(), **how)
    else:
        y = spec.forward_inference(x, mean, var, *case.affine(), **how)
        grads = spec.backward_inference(grad_y, x, mean, var, *case.affine(), **how)
    energy = (grads.dresidual**2).sum(_axes(x))
    known = {"y": y, **grads._asdict(), "mean": mean, "var": var, "energy": energy}
    if case.running_mean is not None:
        running = f64(case.running_mean), f64(case.running_var)
        moved = spec.update_running(*running, x, case.momentum) if case.training else running
        known["running_mean"], known["running_var"] = moved
    return known


def pytorchs(case: Case) -> Outputs:
    """PyTorch's own batch_norm, a separate addition and a separate activation."""
    x, gamma, beta, residual = leaves(case)
    running = [None if t is None else t.clone() for t in (case.running_mean, case.running_var)]
    z = F.batch_norm(x, *running, gamma, beta, case.training, case.momentum, case.eps)
    z = z if residual is None else z + residual
    y = ACTIVATIONS[case.act](z, case.slope)
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
    expected, theirs = truth(case), pytorchs(case)
    magnitudes = _magnitudes(case)
    wide = torch.finfo(torch.float64 if case.x.dtype == torch.float64 else torch.float32).eps
    for name, got in ours.items():
        if got is None:
            continue
        want = expected[name]
        assert tuple(got.shape) == want.shape, f"{name}: shape {tuple(got.shape)}, not {want.shape} {note}"
        largest = np.maximum(_per_channel(np.abs(want)), _averaged(name, case))
        allowance = 8 * wide * magnitudes[name] + 2 * torch.finfo(got.dtype).eps * largest
        other = theirs.get(name)
        their_error = 0.0 if other is None else _error(other, want)
        our_error = _error(got, want)
        good = our_error <= 2 * their_error + allowance
        assert good.all(), (
            f"{name}: error {our_error} where PyTorch's is {their_error} and the allowance {allowance} {note}\n{case}"
        )


def _averaged(name: str, case: Case) -> np.ndarray | float:
    """The larger term of a running statistic: both are held in its type, and may cancel."""
    if not name.startswith("running"):
        return 0.0
    old, batch = {"running_mean": case.running_mean, "running_var": case.running_var}[name], truth(case)[name[8:]]
    return np.maximum(np.abs(f64(old) * (1 - case.momentum)), np.abs(batch * case.momentum))


def _error(got: Tensor, want: np.ndarray) -> np.ndarray:
    """Per channel, the largest; infinite where 16 bits overflowed, to infinity or on to NaN."""
    return _per_channel(np.nan_to_num(np.abs(f64(got) - want), nan=np.inf, posinf=np.inf))


def _magnitudes(case: Case) -> dict[str, np.ndarray]:
    """Per channel, the largest magnitude that each output's formula sums, and what a rounding of z moves in it."""
    x, grad_y = f64(case.x), np.abs(f64(case.grad_y))
    mean, var = case.statistics()
    axes = _axes(x)
    m = max(spec.count(x), 1)
    rstd = 1 / np.sqrt(var + case.eps)
    gamma = np.ones_like(mean) if case.gamma is None else np.abs(f64(case.gamma))
    slope = max(1.0, abs(case.slope)) if case.act == "leaky_relu" else 1.2  # the steepest act', and more than act''
    x_term = _per_channel(np.abs(x)) + np.abs(mean)
    xhat_term = rstd * x_term
    z_term = 1 + _per_channel(_terms(case))
    g_term = slope * _per_channel(grad_y) * z_term
    dbeta_term = slope * grad_y.sum(axes) * z_term
    xhat = _per_channel(np.abs(spec.normalize(x, mean, var, case.eps)))
    dgamma_term = xhat * dbeta_term + xhat_term * slope * grad_y.sum(axes)
    below = dbeta_term / m + xhat * dgamma_term / m + xhat_term * slope * grad_y.sum(axes) * xhat / m
    spread = var + np.sqrt(var) * x_term
    return {
        "y": slope * z_term,
        "dx": gamma * rstd * (g_term + below),
        "dgamma": dgamma_term,
        "dbeta": dbeta_term,
        "dresidual": g_term,
        "energy": 2 * slope**2 * (grad_y**2).sum(axes) * z_term,
        "mean": x_term,
        "var": spread,
        "running_mean": x_term + np.abs(0 if case.running_mean is None else f64(case.running_mean)),
        "running_var": 2 * spread + np.abs(0 if case.running_var is None else f64(case.running_var)),
    }


def _terms(case: Case) -> np.ndarray:
    """|gamma|·rstd·(|x| + |mean|) + |beta| + |residual|: what is summed on the way to z."""
    x = f64(case.x)
    mean, var = (v.reshape(1, -1, *[1] * (x.ndim - 2)) for v in case.statistics())
    gamma, beta = (0 if v is None else np.abs(v).reshape(mean.shape) for v in case.affine())
    terms = (np.abs(x) + np.abs(mean)) / np.sqrt(var + case.eps) * (1 if case.gamma is None else gamma) + beta
    return terms if case.residual is None else terms + np.abs(f64(case.residual))


def _axes(x: np.ndarray) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _per_channel(values: np.ndarray) -> np.ndarray:
    """The largest of each channel; of a (C,) vector, itself."""
    return values if values.ndim == 1 else values.max(_axes(values), initial=0.0)
