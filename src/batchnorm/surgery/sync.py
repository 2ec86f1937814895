"""sync(): a model's batch norms normalize over the batches of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import distributed as dist
from torch import nn

from batchnorm.records import Record
from batchnorm.regimes.kinds import OTHERWISE
from batchnorm.regimes.synced import SyncBatchNorm
from batchnorm.surgery.classes import become
from batchnorm.surgery.conversion import some
from batchnorm.surgery.norms import Skipped, find
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

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for each in self.skipped:
            groups.setdefault(f"{each.kind}  not synchronized ({each.why})", []).append(each.name or "(the model)")
        rows = [f"{len(names):4}  {row}: {some(names)}" for row, names in groups.items()]
        return "\n".join([f"{plural(len(self.layers), 'batch norm layer')} synchronized", *rows])


def sync(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, also: Sequence[type[nn.Module]] = ()
) -> Syncing:
    """Turn every batch norm layer into a `SyncBatchNorm` of this package, in place: on CPU (gloo) and GPU (NCCL).

    Each changes its class and nothing else: parameters, buffers, names, hooks and modes stay the same objects, and so
    do the activation and the residual of this package's layers, converted models included. Call it before the model is
    wrapped (DistributedDataParallel, fully_shard).

    Args:
        model: changed in place.
        process_group: the processes whose batches are normalized as one; by default all of them.
        also: subclasses of torch.nn's layers that normalize as these do, which the caller vouches for. What else they
            do in their forward is lost.

    Returns:
        What became of each layer; print it. Frozen layers stay as they are: they have nothing to synchronize.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    found = find("sync", model, also)
    changed, skipped = [], list(found.skipped)
    for norm in found.norms:
        why = "frozen: it has nothing to synchronize" if norm.frozen else None
        if type(norm.layer) in OTHERWISE:
            why = "it sees less or more than the batch on purpose: make it a BatchNorm first"
        if why is not None:
            skipped.append(Skipped(norm.name, type(norm.layer).__name__, why))
            continue
        become(norm.layer, SyncBatchNorm)
        norm.layer.process_group = process_group  # type: ignore[assignment]
        changed.append(norm.name)
    return Syncing(tuple(changed), tuple(skipped))
