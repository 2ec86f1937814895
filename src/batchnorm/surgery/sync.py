"""sync(): a model's batch norms normalize over the batches of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import distributed as dist
from torch import nn

from batchnorm.records import Record, Skipped
from batchnorm.restoring import all_or_nothing, become
from batchnorm.surgery._shared.layers import find
from batchnorm.variants.sync import SyncBatchNorm
from batchnorm.words import plural

__all__ = ["Syncing", "sync"]


@dataclass(frozen=True, slots=True, repr=False)
class Syncing(Record):
    """What `sync` did.

    Attributes:
        layers: the names of the layers that are synchronized now.
        skipped: the layers that were left alone, each with the reason.
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

    Each changes its class and nothing else: parameters, buffers, names, hooks and modes stay the same objects, and so
    do the activation and the residual of this package's layers, converted models included. Call it before the model is
    wrapped (DistributedDataParallel, fully_shard).

    Args:
        model: changed in place; all of it or, where an error is raised, nothing.
        process_group: the processes whose batches are normalized as one; by default all of them.
        also: subclasses of torch.nn's layers that normalize as these do, which the caller vouches for. What else they
            do in their forward is lost.

    Returns:
        What became of each layer; print it. Frozen layers stay as they are: they have nothing to synchronize.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    norms, skipped = find("sync", model, also)
    with all_or_nothing(model):
        for norm in norms:
            become(norm.layer, SyncBatchNorm)
            norm.layer.process_group = process_group  # type: ignore[assignment]
    return Syncing(tuple(norm.name for norm in norms), tuple(skipped))
