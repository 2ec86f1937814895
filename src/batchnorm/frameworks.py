"""What frameworks call the parts of a batch norm layer, and their defaults: the one table of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

STAMP = "batchnorm"
"""The entry of a layer in a state dict's `_metadata` in which `batchnorm.stamp` keeps its eps and momentum."""

LARGEST = 1e300
"""A larger setting is damage; an integer without end would not fit a float."""


def stamped(metadata: object) -> Iterator[tuple[str, dict[str, float | bool]]]:
    """The layers in a state dict's `_metadata` that have eps and momentum there, as settings.

    `cumulative` is momentum None. Entries of other kinds are left out: the metadata may come from any file.
    """
    for name, entry in metadata.items() if isinstance(metadata, Mapping) else ():
        stamp = entry.get(STAMP) if isinstance(entry, Mapping) else None
        if isinstance(name, str) and isinstance(stamp, Mapping):
            settings: dict[str, float | bool] = {
                key: float(value)
                for key, value in stamp.items()
                if key in ("eps", "momentum") and type(value) in (int, float) and abs(value) < LARGEST
            }
            yield name, settings | ({"cumulative": True} if stamp.get("momentum", 0) is None else {})
