"""What the study looks at in a network at one step: one row for each unit, and how it does on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm import quantities as q
from batchnorm.kernels.contract import Tap
from batchnorm.layers import BatchNorm1d
from batchnorm.study.networks import Hidden, Network

Array = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]

_diverging = np.errstate(invalid="ignore", over="ignore")
"""Around what reduces activations: those of a network on its way to infinity give infinities and NaN, not warnings."""


class Score(NamedTuple):
    """On held-out data in inference mode: mean cross-entropy (nats), share classified right, logits (N, classes)."""

    loss: float
    accuracy: float
    logits: Tensor


@torch.no_grad()
def score(network: Network, x: Tensor, y: Tensor) -> Score:
    network.eval()
    logits = network(x)
    network.train()
    return Score(float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean()), logits)


class State(NamedTuple):
    """A layer's distributions at one moment: its input's (mean, var) on the probe, its output's (beta, gamma)."""

    mean: Array
    var: Array
    beta: Array
    gamma: Array


@torch.no_grad()
@_diverging
def states(network: Network, probe: Tensor) -> tuple[list[State], list[Hidden]]:
    """Each hidden layer's state on the probe, a fixed set of training rows. In arm `none`, beta and gamma are NaN."""
    hidden, _ = network.look(probe)
    found = []
    for layer, norm in zip(hidden, network.norms, strict=True):
        x = _f64(layer.x)
        gamma, beta = _affine(norm, x.shape[1])
        found.append(State(x.mean(0), x.var(0), beta, gamma))
    return found, hidden


@torch.no_grad()
@_diverging
def noise(network: Network, batches: Sequence[Tensor], eps: float) -> list[q.BatchNoise]:
    """Each hidden layer's batch noise over training batches, at the weights of this moment."""
    seen = [[_f64(layer.x) for layer in network.look(batch)[0]] for batch in batches]
    return [
        q.batch_noise([x.mean(0) for x in layer], [x.var(0) for x in layer], eps) for layer in zip(*seen, strict=True)
    ]


def state_columns(
    states: Sequence[State], hidden: Sequence[Hidden], noises: Sequence[q.BatchNoise], act: str, eps: float
) -> list[Columns]:
    """Every quantity that a moment's state gives, per layer."""
    return [
        _layer_columns(state, layer, noise, act, eps)
        for state, layer, noise in zip(states, hidden, noises, strict=True)
    ]


@_diverging
def _layer_columns(state: State, layer: Hidden, noise: q.BatchNoise, act: str, eps: float) -> Columns:
    x, y = _f64(layer.x), _f64(layer.y)
    mean, var, beta, gamma = state
    has_norm = not np.isnan(gamma).all()  # without a norm y is x: as if gamma were s
    in_percentiles, out_percentiles = (q.percentiles(values.detach().numpy()) for values in layer)
    positive_out = q.positive_share(y)
    silent = q.silent(act, positive_out)
    return {
        "mean": mean,
        "gamma": gamma,
        "beta": beta,
        **q.undoing(mean, var, eps, gamma, beta),
        "class": np.array(q.class_names(q.unit_class(mean, var, eps, gamma, beta, silent))),
        "position_in": q.position_in(mean, var, eps),
        "position_out": q.position_out(gamma, beta),
        "positive_in": q.positive_share(x),
        "positive_out": positive_out,
        "noise_mean": noise.mean,
        "noise_log_scale": noise.log_scale,
        "linear_share": q.linear_share(y, act),
        "dead": q.dead(var, eps, gamma if has_norm else q.scale(var, eps), silent),
        **{f"in_p{p}": values for p, values in zip(q.PERCENTILES, in_percentiles, strict=True)},
        **{f"out_p{p}": values for p, values in zip(q.PERCENTILES, out_percentiles, strict=True)},
    }


def step_columns(taps: Sequence[Tap], eps: float) -> list[Columns]:
    """What a training step's own sums give, per layer: the gradient's share that stays in beta and gamma."""
    columns = []
    for tap in taps:
        (passed,) = tap.passes
        (sums,) = passed.grads
        diverted = q.gradient_diverted(
            _f64(sums.dgamma), _f64(sums.dbeta), _f64(sums.energy), _f64(passed.var), eps, passed.count
        )
        columns.append({"gradient_diverted": diverted})
    return columns


def drift_columns(before: Sequence[State], after: Sequence[State], eps: float) -> list[Columns]:
    """What one update moved, per layer: the input's distribution on the probe, and the output's."""
    columns = []
    for old, new in zip(before, after, strict=True):
        inward = q.drift(old.mean, q.scale(old.var, eps), new.mean, q.scale(new.var, eps))
        outward = q.drift(old.beta, old.gamma, new.beta, new.gamma)
        columns.append(
            {
                "drift_in_location": inward.location,
                "drift_in_log_scale": inward.log_scale,
                "drift_out_location": outward.location,
                "drift_out_log_scale": outward.log_scale,
            }
        )
    return columns


def _affine(norm: torch.nn.Module, width: int) -> tuple[Array, Array]:
    if not isinstance(norm, BatchNorm1d):
        return np.full(width, np.nan), np.full(width, np.nan)
    gamma = np.ones(width) if norm.weight is None else _f64(norm.weight)
    beta = np.zeros(width) if norm.bias is None else _f64(norm.bias)
    return gamma, beta


def _f64(tensor: Tensor | None) -> Array:
    assert tensor is not None, "the sums of a tapped layer hold the energy"
    return tensor.detach().to(torch.float64).numpy()
