"""The paper's MNIST network in the four arms that the study compares, and their training.

Three fully connected hidden layers of 100 units, batch norm before each activation; Ioffe and Szegedy 2015, sec. 4.1.

    none       no batch norm
    learned    gamma and beta are learned from gamma = 1, beta = 0
    fixed      gamma = 1 and beta = 0 are constants
    undone     gamma and beta are learned from gamma = sqrt(var + eps), beta = mean: the same function as `none`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm import quantities as q
from batchnorm.functional import batch_norm
from batchnorm.kernels.aten import activate
from batchnorm.layers import BatchNorm1d

ARMS = ("none", "learned", "fixed", "undone")
HIDDEN = (100, 100, 100)
EPS = 1e-5


class Hidden(NamedTuple):
    """A hidden layer on some rows: x is the output of its weights, y the activation's input."""

    x: Tensor
    y: Tensor


class Network(nn.Module):
    """inputs → 100 → 100 → 100 → classes, with batch norm (or nothing, in arm `none`) before each activation.

    Weights are N(0, 0.1²) with a sigmoid and N(0, 2/fan_in) with a ReLU; biases are 0. A linear layer before batch norm
    has no bias, since beta replaces it.
    """

    def __init__(self, inputs: int, classes: int, arm: str, act: str, generator: torch.Generator) -> None:
        super().__init__()
        if arm not in ARMS:
            raise ValueError(f"unknown arm {arm!r}: use one of {', '.join(ARMS)}")
        self.act = act
        widths = (inputs, *HIDDEN)
        self.linears = nn.ModuleList(nn.Linear(i, o, bias=arm == "none") for i, o in pairwise(widths))
        self.norms = nn.ModuleList(
            nn.Identity() if arm == "none" else BatchNorm1d(width, EPS, affine=arm != "fixed") for width in HIDDEN
        )
        self.output = nn.Linear(HIDDEN[-1], classes)
        for linear in [*self.linears, self.output]:
            deviation = 0.1 if act == "sigmoid" else (2 / linear.in_features) ** 0.5
            nn.init.normal_(linear.weight, std=deviation, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits (N, classes)."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            rows = activate(norm(linear(rows)), self.act, 0.0)
        return self.output(rows)  # type: ignore[no-any-return]

    def hidden(self, rows: Tensor) -> tuple[list[Hidden], Tensor]:
        """The hidden layers and the logits, by the statistics of these rows as in training; buffers do not change."""
        layers = []
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = y = linear(rows)
            if isinstance(norm, BatchNorm1d):
                y = batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
            layers.append(Hidden(x, y))
            rows = activate(y, self.act, 0.0)
        return layers, self.output(rows)

    def batch_norms(self) -> Iterator[BatchNorm1d]:
        """The batch norm layers from the input to the output; none in arm `none`."""
        return (norm for norm in self.norms if isinstance(norm, BatchNorm1d))


def build(arm: str, inputs: int, classes: int, act: str, seed: int, train_x: Tensor) -> Network:
    """Build the network of an arm. Arms of one seed have equal weights; `undone` is undone on the rows `train_x`."""
    network = Network(inputs, classes, arm, act, torch.Generator().manual_seed(seed))
    if arm == "undone":
        undo(network, train_x)
    return network


@torch.no_grad()
def undo(network: Network, rows: Tensor) -> None:
    """Set gamma = sqrt(var + eps), beta = mean and the running statistics to (mean, var) of all rows, per layer.

    The rows are the whole population, so running_var is set to the biased var (divided by m). Then y = x in inference
    mode, up to rounding, and the network computes the same as without batch norm.
    """
    for linear, norm in zip(network.linears, network.batch_norms(), strict=True):
        x = linear(rows)
        var, mean = torch.var_mean(x.double(), 0, correction=0)
        state = {"weight": (var + norm.eps).sqrt(), "bias": mean, "running_mean": mean, "running_var": var}
        norm.load_state_dict(state, strict=False)
        rows = activate(norm.eval()(x), network.act, 0.0)
        norm.train()


def sgd_step(parameters: Sequence[Tensor], loss: Tensor, rate: float) -> None:
    """w ← w - rate·∂loss/∂w for every parameter w."""
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=rate)


RATE = 0.1


def train_identity(
    x: Tensor, batches: Iterator[Tensor], steps: int, at: set[int]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Run SGD on |y - x|²/2 from gamma = 1, beta = 0; yield each step in `at` with its columns per unit.

    x: all rows of the input (N, C). batches: row numbers. The rate falls linearly from 0.1 to 0, so that gamma and beta
    average over many batches.
    """
    layer = BatchNorm1d(x.shape[1])
    mean, var = x.double().mean(0).numpy(), x.double().var(0, correction=0).numpy()
    for step in range(steps + 1):
        if step in at:
            gamma, beta = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            undo = q.undoing(mean, var, layer.eps, gamma, beta)
            classes = np.array(q.class_names(q.unit_class(mean, var, layer.eps, gamma, beta)))
            yield step, {"gamma": gamma, "beta": beta, "mean": mean, **undo, "class": classes}
        rows = x[next(batches)]
        loss = 0.5 * (layer(rows) - rows).square().mean(0).sum()
        sgd_step(list(layer.parameters()), loss, RATE * (1 - step / steps))
