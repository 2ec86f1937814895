"""Test a kernel's accuracy: its error against float64 may be about twice that of PyTorch's operators.

>>> from batchnorm.testing import Call, assert_accurate, truth
>>> call = Call(x=torch.randn(8, 3), grad_y=torch.randn(8, 3), act="relu")
>>> assert_accurate({"y": my_kernel(call.x)}, {"y": torch.relu(torch.nn.functional.batch_norm(...))}, truth(call))

An output passes if, in every channel,

    max|ours - truth| <= 2·max|reference - truth| + allowance
    allowance = 8·eps_a·(the largest magnitude that the output's formula sums) + 2·eps_t·max|truth|

With a residual before an activation, the cost of rounding the saved tensor is added. For a running statistic, |truth|
is at least the larger of the two averaged terms, since these may cancel. eps_t is the machine epsilon of the
tensor's type, eps_a that of the type in which sums are accumulated (float32 for 16-bit types). The truth is
`batchnorm.spec` on the same input in float64. The first term is the cost of rounding each intermediate value once
(`_tolerances`); it grows with mean/std, but not with its square as E[x²] - E[x]² would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from batchnorm import spec
from batchnorm.activations import ACTIVATIONS, BY_Y, Array

__all__ = ["Call", "Outputs", "Truth", "Verdict", "assert_accurate", "truth", "verdicts"]

Outputs = Mapping[str, Tensor | None]
"""Tensors by the names of `spec`: y, dx, dgamma, dbeta, dresidual, running_mean, running_var and so on."""


@dataclass(repr=False)
class Call:
    """The arguments of one batch norm call, and the gradient at y."""

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

    def away_from_kinks(self) -> Call:
        """The call with zero gradient where z is so close to a kink that rounding decides the derivative."""
        z = self.preactivation()
        margin = 8 * torch.finfo(self.x.dtype).eps * (1 + np.abs(z) + _terms(self))
        for kink in () if self.act is None else ACTIVATIONS[self.act].kinks:
            is_close = torch.from_numpy(np.abs(z - kink) <= margin).to(self.grad_y.device)
            self = replace(self, grad_y=self.grad_y.masked_fill(is_close, 0.0))
        return self

    def preactivation(self) -> Array:
        """z in float64."""
        constants = (*self.statistics(), f64(self.gamma), f64(self.beta))
        return spec.forward_inference(f64(self.x), *constants, eps=self.eps, residual=f64(self.residual))

    def statistics(self) -> tuple[Array, Array]:
        """The mean and variance that normalize: the batch's in training, else the running ones."""
        if self.training:
            return spec.statistics(f64(self.x))
        assert self.running_mean is not None
        assert self.running_var is not None
        return f64(self.running_mean), f64(self.running_var)

    def channels(self, chosen: Tensor) -> Call:
        """The same call on some of its channels; channels are independent, so their truth is the same."""
        parts: dict[str, Any] = {
            name: select(value, chosen) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **parts)


def select(tensor: Tensor, chosen: Tensor) -> Tensor:
    """The chosen channels of a (C,) or (N, C, *) tensor."""
    return tensor.index_select(0 if tensor.dim() == 1 else 1, chosen.to(tensor.device))


@overload
def f64(tensor: Tensor) -> Array: ...
@overload
def f64(tensor: Tensor | None) -> Array | None: ...
def f64(tensor: Tensor | None) -> Array | None:
    """The values as a float64 NumPy array."""
    return None if tensor is None else tensor.detach().double().cpu().numpy()


@dataclass(frozen=True)
class Truth:
    """The exact outputs of a call by the names of `spec`, and the parts of the allowance per channel.

    Attributes:
        call: the call.
        values: the outputs in float64.
        magnitudes: the largest magnitude that each output's formula sums.
        roundings: how much rounding to the type of x changes each output, if a residual precedes an activation.
    """

    call: Call
    values: Mapping[str, Array]
    magnitudes: Mapping[str, Array]
    roundings: Mapping[str, Array]


def truth(call: Call) -> Truth:
    """Compute y, all gradients, the statistics, the updated running statistics and Σg² by `batchnorm.spec`."""
    x, grad_y, residual = f64(call.x), f64(call.grad_y), f64(call.residual)
    mean, var = call.statistics()
    gamma, beta = f64(call.gamma), f64(call.beta)
    options: dict[str, Any] = {"eps": call.eps, "residual": residual, "act": call.act, "slope": call.slope}
    y = spec.activation(call.preactivation(), call.act, call.slope)
    if call.training:
        grads = spec.backward(grad_y, x, gamma, beta, **options)
    else:
        grads = spec.backward_inference(grad_y, x, mean, var, gamma, beta, **options)
    energy = (grads.dresidual**2).sum(spec.reduced_axes(x))
    values = {"y": y, **grads._asdict(), "mean": mean, "var": var, "energy": energy}
    running = f64(call.running_mean), f64(call.running_var)
    if running[0] is not None and running[1] is not None:
        updated = spec.update_running(running[0], running[1], x, call.momentum) if call.training else running
        values["running_mean"], values["running_var"] = updated
    return Truth(call, values, *_tolerances(call))


@dataclass(frozen=True)
class Verdict:
    """One output, per channel: the maximum error, PyTorch's, and the allowance beyond twice PyTorch's."""

    name: str
    error: Array
    theirs: Array
    allowance: Array

    @property
    def good(self) -> bool:
        """Whether every channel is within its limit."""
        return bool((self.error <= self._limit).all())

    @property
    def _limit(self) -> Array:
        return 2 * self.theirs + self.allowance

    def worst(self) -> str:
        """The numbers of the channel that exceeds its limit most."""
        at = int(np.argmax(np.where(np.isfinite(self.error), self.error - self._limit, np.inf)))
        return (
            f"{self.name}: error {self.error[at]:.1e} where PyTorch's is {self.theirs[at]:.1e} "
            f"and the allowance {self.allowance[at]:.1e}"
        )


def assert_accurate(ours: Outputs, reference: Outputs, truth: Truth, *, note: object = "") -> None:
    """Raise AssertionError if a tensor in `ours` violates the criterion.

    Args:
        ours: the tensors under test by the names of `batchnorm.spec`: y, dx, dgamma, dbeta, dresidual, mean, var,
            energy (Σg²), running_mean and running_var; None for an output that does not exist.
        reference: PyTorch's results by the same names. A missing one counts as exact: ours may differ by the allowance.
        truth: `truth(call)` of the call that both computed. Use `call.away_from_kinks()` for an activation that is not
            differentiable everywhere, since rounding decides its derivative at a kink.
        note: added to the message.

    The message has the maximum error, the reference's and the allowance of the worst channel of each wrong tensor.
    """
    wrong = [verdict.worst() for verdict in verdicts(ours, reference, truth) if not verdict.good]
    if wrong:
        raise AssertionError("\n".join(filter(None, (*wrong, str(note), repr(truth.call)))))


def verdicts(ours: Outputs, reference: Outputs, truth: Truth) -> list[Verdict]:
    """Compare every tensor in `ours` with the truth. Raises ValueError if a shape differs."""
    call, results = truth.call, []
    eps_a = torch.finfo(torch.float64 if call.x.dtype == torch.float64 else torch.float32).eps
    for name, actual in ours.items():
        if actual is None:
            continue
        expected = truth.values[name]
        if tuple(actual.shape) != expected.shape:
            raise ValueError(f"{name}: shape {tuple(actual.shape)}, not {expected.shape}")
        largest = np.maximum(_per_channel(np.abs(expected)), _running_terms(name, truth))
        allowance = 8 * eps_a * truth.magnitudes[name] + 2 * torch.finfo(actual.dtype).eps * largest
        allowance = allowance + truth.roundings.get(name, 0.0)
        theirs = reference.get(name)
        their_error = np.zeros_like(allowance) if theirs is None else _error(theirs, expected)
        results.append(Verdict(name, _error(actual, expected), their_error, allowance))
    return results


def _running_terms(name: str, truth: Truth) -> Array | float:
    """The larger of the two terms of a running statistic, which are rounded to its type and may cancel."""
    if not name.startswith("running"):
        return 0.0
    call = truth.call
    old = f64(call.running_mean if name == "running_mean" else call.running_var)
    assert old is not None
    batch = truth.values[name.removeprefix("running_")]
    return np.maximum(np.abs(old * (1 - call.momentum)), np.abs(batch * call.momentum))


def _error(actual: Tensor, expected: Array) -> Array:
    """The maximum per channel; infinite if a 16-bit type overflowed to infinity or NaN."""
    return _per_channel(np.nan_to_num(np.abs(f64(actual) - expected), nan=np.inf, posinf=np.inf))


def _tolerances(call: Call) -> tuple[dict[str, Array], dict[str, Array]]:
    """Per channel and output, the `magnitudes` and the `roundings` of a Truth.

    A magnitude is the largest that the output's formula sums, including the effect of rounding z.

    If a residual precedes an activation, PyTorch's operators and ours round some values to the type of x. In a small
    case PyTorch's rounding errors may happen to be 0, so they are allowed here:

        the input of act'    z, or y for sigmoid and tanh, is saved in that type: changes act' by at most eps_t, since
                             |z·act''(z)| <= 2 and |y·d(act')/dy| <= 2; by nothing if act' is constant.
        z and g              If act' does not follow from y, the activation is a separate operator: z is passed to it
                             and g is passed back, each rounded by eps_t/2.

    Statistics are not affected, and without a residual nothing between x and y is rounded.
    """
    x, grad_y = f64(call.x), np.abs(f64(call.grad_y))
    mean, var = call.statistics()
    axes, m = spec.reduced_axes(x), max(spec.count(x), 1)
    rstd = 1 / np.sqrt(var + call.eps)
    gamma = np.ones_like(mean) if call.gamma is None else np.abs(f64(call.gamma))
    slope = max(1.0, abs(call.slope)) if call.act == "leaky_relu" else 1.2  # the largest |act'|, and more than act''
    xhat = np.abs(spec.normalize(x, mean, var, call.eps))
    largest_xhat, largest_g, sum_of_g = _per_channel(xhat), _per_channel(grad_y), grad_y.sum(axes)
    x_term = _per_channel(np.abs(x)) + np.abs(mean)
    xhat_term = rstd * x_term
    z_term = 1 + _per_channel(_terms(call))
    g_term = slope * largest_g * z_term
    dbeta_term = slope * sum_of_g * z_term
    dgamma_term = largest_xhat * dbeta_term + xhat_term * slope * sum_of_g
    projected_term = dbeta_term / m + largest_xhat * dgamma_term / m + xhat_term * slope * sum_of_g * largest_xhat / m
    spread = var + np.sqrt(var) * x_term
    energy = (grad_y**2).sum(axes)
    magnitudes = {
        "y": slope * z_term,
        "dx": gamma * rstd * (g_term + projected_term),
        "dgamma": dgamma_term,
        "dbeta": dbeta_term,
        "dresidual": g_term,
        "energy": 2 * slope**2 * energy * z_term,
        "mean": x_term,
        "var": spread,
        "running_mean": x_term + np.abs(0.0 if call.running_mean is None else f64(call.running_mean)),
        "running_var": 2 * spread + np.abs(0.0 if call.running_var is None else f64(call.running_var)),
    }
    if call.residual is None or call.act in (None, "relu"):
        return magnitudes, {}
    eps_t, is_separate = float(torch.finfo(call.x.dtype).eps), call.act not in BY_Y
    g_rounding = eps_t * ((0.0 if call.act in ("relu6", "leaky_relu") else 1.0) + (slope / 2 if is_separate else 0.0))
    dgamma = (grad_y * xhat).sum(axes)
    projected = (sum_of_g + largest_xhat * dgamma) / m if call.training else 0.0
    return magnitudes, {
        "y": (eps_t / 2 * slope if is_separate else 0) * _per_channel(np.abs(call.preactivation())),
        "dx": g_rounding * gamma * rstd * (largest_g + projected),
        "dgamma": g_rounding * dgamma,
        "dbeta": g_rounding * sum_of_g,
        "dresidual": g_rounding * largest_g,
        "energy": g_rounding * 2 * slope * energy,
    }


def _terms(call: Call) -> Array:
    """|gamma|·rstd·(|x| + |mean|) + |beta| + |residual|: the magnitudes that z sums."""
    mean, var = call.statistics()
    gamma, beta, residual = (None if v is None else np.abs(f64(v)) for v in (call.gamma, call.beta, call.residual))
    return spec.forward_inference(np.abs(f64(call.x)), -np.abs(mean), var, gamma, beta, eps=call.eps, residual=residual)


def _per_channel(values: Array) -> Array:
    """The maximum per channel; a (C,) vector is returned unchanged."""
    return values if values.ndim == 1 else np.asarray(values.max(spec.reduced_axes(values), initial=0.0))
