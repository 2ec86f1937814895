"""Inference of a whole network: as it is, after `batchnorm.convert`, and after `batchnorm.fold`.

All three have the same weights and statistics, those that a few steps of training left, and see the same images. No
speed without correctness: a network whose outputs are not the stock one's, beyond what a fold may move them, is not
timed, and neither is one that was not folded whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.bench import timing
from batchnorm.surgery._folding.trials import difference
from batchnorm.surgery.fold import Folding, fold

Network = torch.nn.Module
Fold = Callable[[Network, Tensor], Folding]


class Inference:
    """One network in eval mode, timed as a contender."""

    apart = False

    def __init__(self, network: Network, images: Tensor) -> None:
        self.network, self.images = network.eval(), images

    def forward(self) -> Tensor:
        y: Tensor = self.network(self.images)
        return y

    def backward(self, y: Tensor) -> None:
        """There is none."""


@torch.no_grad()
def measure_inference(
    stock: Network,
    convert: Callable[[Network], Any],
    images: Tensor,
    *,
    rounds: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    fold: Fold = fold,
) -> dict[str, Any]:
    """Times of all three, interleaved, or what is wrong with one of them. `stock` is only read, and put in eval mode.

    ratio      the time of stock, and of ours (converted), over that of folded, round by round
    """
    ours, folded = copy.deepcopy(stock.eval()), copy.deepcopy(stock.eval())
    convert(ours)
    folding = fold(folded, images)
    sides = {name: Inference(network, images) for name, network in (("stock", stock), ("ours", ours))}
    sides["folded"] = Inference(folded, images)
    expected = [sides["stock"].forward()]
    bound = folding.bound or 0.0
    moved, errors = {}, []
    for name in ("ours", "folded"):
        found = difference(expected, [sides[name].forward()])
        moved[name] = float("inf") if found is None else found.max
        if not moved[name] <= bound:
            errors.append(f"{name}: the outputs differ by {moved[name]:.1e} of their largest, over {bound:.1g}")
    if folding.skipped:
        errors.append(f"folded: {len(folding.skipped)} layers are left, the first one since {folding.skipped[0].why}")
    result: dict[str, Any] = {
        "gate": {"passed": not errors, "errors": errors},
        "folded": len(folding.layers),
        "difference": moved,
    }
    if errors:
        return result
    samples = timing.interleaved(sides, train=False, seconds=0.0, rounds=rounds, seed=seed, stop=stop)
    return result | {
        "contenders": {name: timing.summary(one, False) for name, one in samples.items()},
        "ratio": {name: timing.ratio(samples[name].whole, samples["folded"].whole) for name in ("stock", "ours")},
    }
