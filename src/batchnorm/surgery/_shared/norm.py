"""A batch norm layer that a tool works on: its tensors and settings by their roles, whatever its class calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from batchnorm import layers as ours
from batchnorm.records import Skipped
from batchnorm.restoring import use_batch_statistics, use_tensors
from batchnorm.running_stats import Buffers
from batchnorm.surgery._shared.activations import Activation, activation_of
from batchnorm.variants.libraries import TORCH, Kind

# By a frozen layer's class: the original class. Filled by `batchnorm.surgery.freeze`.
FROZEN: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A layer and all its names in the model; the name is empty if it is the model itself."""

    names: tuple[str, ...]
    layer: nn.Module
    kind: Kind = TORCH

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_frozen(self) -> bool:
        """Whether its statistics are frozen by `batchnorm.freeze`."""
        return type(self.layer) in FROZEN

    @property
    def is_constant(self) -> bool:
        """Whether its class never changes its statistics, gamma and beta."""
        return self.kind.training == "frozen"

    @property
    def has_statistics(self) -> bool:
        """Whether it has running statistics."""
        return self.tensor("mean") is not None and self.tensor("var") is not None

    @property
    def eps(self) -> float:
        return self.kind.eps_of(self.layer)

    @property
    def channels(self) -> int:
        """The number of its channels."""
        count = getattr(self.layer, "num_features", None)
        tensor = self.tensor("mean") if count is None else None
        return int(count if tensor is None else tensor.numel())  # type: ignore[arg-type]

    def buffers(self, suffix: str = "") -> Buffers:
        """Its running statistics, and its number of batches; of one domain with its `suffix`."""
        return Buffers(*(self.kind.tensor(self.layer, role, suffix) for role in ("mean", "var", "batches")))

    def tensor(self, role: str) -> Tensor | None:
        """Its tensor "mean", "var", "batches", "gamma" or "beta"; None without one."""
        return self.kind.tensor(self.layer, role)

    @property
    def scale(self) -> Tensor | None:
        """The factor of its normalized input; None for 1."""
        return self.kind.scale(self.layer)

    def gamma_of(self, scale: Any) -> Any:
        """The gamma with which its factor is `scale`, a positive number or tensor."""
        return scale - self.eps if self.kind.magnitude else scale

    def uses(self, role: str) -> bool:
        """Whether its forward uses "gamma" or "beta"."""
        return self.kind.affine is None or bool(getattr(self.layer, self.kind.affine))

    def tensor_name(self, role: str) -> str:
        """What its class calls the tensor."""
        return str(getattr(self.kind, role))

    @property
    def follows(self) -> Mapping[str, nn.Module]:
        """The modules that its forward applies after the normalization, by name."""
        return self.kind.follows(self.layer)

    @property
    def activation(self) -> Activation | None:
        """What it computes after the normalization, if a layer of this package can fuse it; else None."""
        if isinstance(self.layer, ours._BatchNorm):
            return Activation(self.layer.act, vars(self.layer).get("negative_slope", 0.01))
        found = [activation_of(module, (), {}) for module in self.follows.values()]
        return Activation(None) if not found else found[0] if len(found) == 1 else None

    def normalize_by_batch(self) -> None:
        """Make it normalize by each batch's statistics, without other processes, and update nothing."""
        if self.kind is TORCH:
            use_batch_statistics(self.layer)  # type: ignore[arg-type]
        else:
            self.layer.training = True
            vars(self.layer)["forward"] = partial(_by_batch, self)

    def use(self, **tensors: Tensor) -> None:
        """Put it in eval mode with other tensors, by role."""
        if self.kind is not TORCH:
            vars(self.layer).pop("forward", None)
        use_tensors(self.layer, **{self.tensor_name(role): tensor for role, tensor in tensors.items()})

    def __str__(self) -> str:
        """For error messages."""
        return f"layer {self.name!r}" if self.name else "the layer"

    def skipped(self, why: str) -> Skipped:
        """The record of a layer that a tool skips."""
        return Skipped(self.name, type(self.layer).__name__, why)


def _by_batch(norm: Norm, input: Tensor) -> Tensor:
    return norm.kind.finish(norm.layer, norm.kind.normalize(norm.layer, input, alone=True))
