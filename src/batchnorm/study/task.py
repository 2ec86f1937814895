"""The task where undoing is optimal: one batch norm layer whose target is its own input, before normalization.

    minimize E |y - x|²,  y = gamma·xhat + beta

Its minimum over the population is gamma = s·(1 - O(1/m)) and beta = mean, that is y = x. If gamma and beta undo the
normalization anywhere, they do so here; the study's networks are read against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from batchnorm import quantities as q
from batchnorm.layers import BatchNorm1d
from batchnorm.study.sgd import sgd_step

RATE = 0.1


def train(
    x: Tensor, batches: Iterator[Tensor], steps: int, at: set[int], report: Callable[[int, dict[str, np.ndarray]], None]
) -> None:
    """SGD on |y - x|²/2 from gamma = 1, beta = 0; calls `report(step, columns per unit)` after the steps `at`.

    x: all rows of the input (N, C). batches: row numbers. The rate falls linearly from 0.1 to 0, so that gamma and beta
    end at the average over many batches and not at the last few.
    """
    layer = BatchNorm1d(x.shape[1])
    mean, var = x.double().mean(0).numpy(), x.double().var(0, correction=0).numpy()
    for step in range(steps + 1):
        if step in at:
            report(step, _columns(layer, mean, var))
        rows = x[next(batches)]
        loss = 0.5 * (layer(rows) - rows).square().mean(0).sum()
        sgd_step(list(layer.parameters()), loss, RATE * (1 - step / steps))


def _columns(layer: BatchNorm1d, mean: np.ndarray, var: np.ndarray) -> dict[str, np.ndarray]:
    gamma, beta = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    return {
        "gamma": gamma,
        "beta": beta,
        "mean": mean,
        **q.undoing(mean, var, layer.eps, gamma, beta),
        "class": np.array(q.class_names(q.unit_class(mean, var, layer.eps, gamma, beta))),
    }
