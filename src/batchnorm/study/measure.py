"""Measure a network of the study at one step: columns per unit, and its score on held-out data."""

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
from batchnorm.study.networks import EPS, Network

Array = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]

_diverging = np.errstate(invalid="ignore", over="ignore")
"""Activations of a diverging network give infinities and NaN without warnings."""


class Score(NamedTuple):
    """On held-out data in inference mode: mean cross-entropy (nats), accuracy (0..1), logits (N, classes)."""

    loss: float
    accuracy: float
    logits: Tensor


@torch.no_grad()
def score(network: Network, x: Tensor, y: Tensor) -> Score:
    """The loss, the accuracy and the logits in inference mode."""
    network.eval()
    logits = network(x)
    network.train()
    return Score(float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean()), logits)


class State(NamedTuple):
    """A hidden layer at one step: mean and var of x on the probe, beta and gamma (NaN without a norm), x and y."""

    mean: Array
    var: Array
    beta: Array
    gamma: Array
    x: Tensor
    y: Tensor


@torch.no_grad()
@_diverging
def states(network: Network, probe: Tensor) -> list[State]:
    """Each hidden layer's state on the probe, a fixed set of training rows."""
    result = []
    for (x, y), norm in zip(network.hidden(probe)[0], network.norms, strict=True):
        wide = _f64(x)
        gamma = beta = np.full(x.shape[1], np.nan)
        if isinstance(norm, BatchNorm1d):
            gamma = np.ones(x.shape[1]) if norm.weight is None else _f64(norm.weight)
            beta = np.zeros(x.shape[1]) if norm.bias is None else _f64(norm.bias)
        result.append(State(wide.mean(0), wide.var(0), beta, gamma, x, y))
    return result


@torch.no_grad()
@_diverging
def noise(network: Network, batches: Sequence[Tensor]) -> list[q.BatchNoise]:
    """Each hidden layer's batch noise over training batches, at the current weights."""
    inputs = [[_f64(layer.x) for layer in network.hidden(batch)[0]] for batch in batches]
    return [q.batch_noise([x.mean(0) for x in xs], [x.var(0) for x in xs], EPS) for xs in zip(*inputs, strict=True)]


@_diverging
def state_columns(state: State, noise: q.BatchNoise, act: str) -> Columns:
    """Every quantity of a layer's state."""
    mean, var, beta, gamma, x, y = state
    has_norm = not np.isnan(gamma).all()  # without a norm y is x: as if gamma were s
    positive_out = q.positive_share(_f64(y))
    silent = q.silent(act, positive_out)
    percentiles = {side: q.percentiles(values.detach().numpy()) for side, values in (("in", x), ("out", y))}
    return {
        "mean": mean,
        "gamma": gamma,
        "beta": beta,
        **q.undoing(mean, var, EPS, gamma, beta),
        "class": np.array(q.class_names(q.unit_class(mean, var, EPS, gamma, beta, silent))),
        "position_in": q.position_in(mean, var, EPS),
        "position_out": q.position_out(gamma, beta),
        "positive_in": q.positive_share(_f64(x)),
        "positive_out": positive_out,
        **{f"noise_{name}": values for name, values in noise._asdict().items()},
        "linear_share": q.linear_share(_f64(y), act),
        "dead": q.dead(var, EPS, gamma if has_norm else q.scale(var, EPS), silent),
        **{
            f"{side}_p{percent}": values
            for side, rows in percentiles.items()
            for percent, values in zip(q.PERCENTILES, rows, strict=True)
        },
    }


def step_columns(tap: Tap) -> Columns:
    """The share of the gradient that stays in beta and gamma, from the sums of a training step."""
    (passed,) = tap.passes
    (sums,) = passed.grads
    dgamma, dbeta, energy, var = (_f64(tensor) for tensor in (sums.dgamma, sums.dbeta, sums.energy, passed.var))
    return {"gradient_diverted": q.gradient_diverted(dgamma, dbeta, energy, var, EPS, passed.count)}


def drift_columns(old: State, new: State) -> Columns:
    """The drift of a layer's input and output by one update: on the probe, and by beta and gamma."""
    drifts = {
        "in": q.drift(old.mean, q.scale(old.var, EPS), new.mean, q.scale(new.var, EPS)),
        "out": q.drift(old.beta, old.gamma, new.beta, new.gamma),
    }
    return {f"drift_{side}_{name}": part for side, drift in drifts.items() for name, part in drift._asdict().items()}


def _f64(tensor: Tensor | None) -> Array:
    assert tensor is not None, "the sums of a tapped layer include the energy"
    return tensor.detach().to(torch.float64).numpy()
