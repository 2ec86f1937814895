"""sync(): make a model's batch norms normalize over the batches of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import distributed as dist
from torch import nn

from batchnorm.records import Record, Skipped
from batchnorm.restoring import all_or_nothing, set_class
from batchnorm.surgery._shared.layers import find
from batchnorm.variants.libraries import TORCH
from batchnorm.variants.sync import SyncBatchNorm
from batchnorm.words import plural

__all__ = ["Syncing", "sync"]


@dataclass(frozen=True, slots=True, repr=False)
class Syncing(Record):
    """What `sync` did.

    Attributes:
        layers: the names of the synchronized layers.
        skipped: the layers that were not changed, each with the reason.
    """

    layers: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    _left = "not synchronized"

    def _head(self) -> list[str]:
        return [f"{plural(len(self.layers), 'batch norm layer')} synchronized"]


def sync(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, also: Sequence[type[nn.Module]] = ()
) -> Syncing:
    """Turn every batch norm layer into a `SyncBatchNorm` of this package, in place: on CPU (gloo) and GPU (NCCL).

    Only the class changes: parameters, buffers, names, hooks and modes stay, and so do the fused activation and
    residual of this package's layers and of converted models. An activation that a layer of another library applies
    becomes its `act`. Call it before wrapping the model
    (DistributedDataParallel, fully_shard).

    Args:
        model: changed in place; nothing if an error is raised.
        process_group: the processes that share statistics; by default all.
        also: subclasses that normalize as their base class does, to be included. What else they do is lost.

    Returns:
        The changed and the skipped layers; `print` it. Frozen layers are skipped: they use no batch statistics.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    norms, skipped = find("sync", model, also)
    with all_or_nothing(model):
        for norm in norms:
            activation = norm.activation
            if norm.kind is not TORCH:
                norm.layer._modules.clear()
            set_class(norm.layer, SyncBatchNorm)
            norm.layer.process_group = process_group  # type: ignore[assignment]
            if norm.kind is not TORCH and activation is not None:
                norm.layer.act, norm.layer.negative_slope = activation  # type: ignore[assignment]
    return Syncing(tuple(norm.name for norm in norms), tuple(skipped))
