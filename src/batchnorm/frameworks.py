"""What frameworks call the parts of a batch norm layer, and their defaults: the one table of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Framework:
    """One framework.

    Attributes:
        names: its names of gamma, beta, running_mean, running_var and batches (the count of them), where it has them.
        eps: its default.
        momentum: its default.
        momentum_weighs_batch: whether momentum is the weight of the new batch, or of the old statistics.
    """

    names: Mapping[str, str]
    eps: float
    momentum: float
    momentum_weighs_batch: bool

    @property
    def roles(self) -> dict[str, str]:
        """The part of a layer by this framework's name of it."""
        return {name: role for role, name in self.names.items()}


def _named(gamma: str, beta: str, running_mean: str, running_var: str) -> dict[str, str]:
    return {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}


FRAMEWORKS = {
    "PyTorch": Framework(
        _named("weight", "bias", "running_mean", "running_var") | {"batches": "num_batches_tracked"}, 1e-5, 0.1, True
    ),
    "Keras": Framework(_named("gamma", "beta", "moving_mean", "moving_variance"), 1e-3, 0.99, False),
    "Flax": Framework(_named("scale", "bias", "mean", "var"), 1e-5, 0.99, False),
    "ONNX": Framework({}, 1e-5, 0.9, False),
}
