"""pool_statistics(): running statistics that each process has gathered by itself become those of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from batchnorm.moments import Moments, merge_rows
from batchnorm.records import Record, Skipped, called
from batchnorm.restoring import all_or_nothing
from batchnorm.running_stats import Buffers, store
from batchnorm.surgery._shared.layers import Norm, find
from batchnorm.variants.domains import suffix
from batchnorm.words import plural

__all__ = ["Pooling", "pool_statistics"]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """How far apart the processes were in one layer: the largest value over its channels and the processes.

    Attributes:
        name: the layer's name.
        mean: |running_mean - pooled mean|, in pooled standard deviations sqrt(var + eps).
        scale: |log(s/s_pooled)|, with s = sqrt(running_var + eps) of a process.
    """

    name: str
    mean: float
    scale: float


@dataclass(frozen=True, slots=True, repr=False)
class Pooling(Record):
    """What `pool_statistics` did.

    Attributes:
        processes: how many processes were pooled; 1 where there was nothing to pool.
        layers: one record for each layer; those that differed most between the processes come first.
        skipped: the layers that were left alone, each with the reason.
    """

    processes: int
    layers: tuple[Disagreement, ...]
    skipped: tuple[Skipped, ...]

    _left = "not pooled"

    def _head(self) -> list[str]:
        processes = plural(self.processes, "process", "processes")
        worst = [
            f"  {called(each.name)}: means up to {each.mean:.3g} deviations apart from the pooled one, "
            f"scales by a factor of up to {math.exp(each.scale):.3g}"
            for each in self.layers[:3]
        ]
        return [f"{plural(len(self.layers), 'batch norm layer')} pooled over {processes}", *worst]


@torch.no_grad()
def pool_statistics(
    model: nn.Module,
    weight: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
    also: Sequence[type[nn.Module]] = (),
) -> Pooling:
    """Pool the running statistics of all processes, in place, so that every process has the same ones.

    mean = Σ w·mean_i/Σ w and var = Σ w·(var_i + (mean_i - mean)²)/Σ w over the processes i, with their weights w.

    Without `sync`, every process's layers see that process's batches alone; DistributedDataParallel then keeps what
    process 0 saw, and what the others saw is lost. Call this in all processes after training and before evaluating or
    saving, with DistributedDataParallel(..., broadcast_buffers=False) during training, so that there is something left
    to pool. The pooled statistics are the same bits in every process; num_batches_tracked becomes the largest.

    Args:
        model: changed in place; the same layers in every process.
        weight: the weight w of this process's statistics, such as the number of its samples; 0 for none.
        process_group: the processes; by default all of them.
        also: subclasses of torch.nn's layers that normalize as these do, which the caller vouches for.

    Returns:
        How far apart the processes were, layer by layer. Without torch.distributed there is nothing to pool.

    Raises TypeError if `model` is not a torch.nn.Module, and ValueError in every process alike, with all layers as they
    were, where the models or weights do not fit or statistics are not finite.
    """
    norms, skipped = find("pool_statistics", model, also)
    tracked: list[tuple[Norm, Any]] = [
        (norm, Buffers.of(norm.layer, suffix(number)))
        for norm in norms
        for number in range(getattr(norm.layer, "domains", 1))
    ]
    world = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return Pooling(world, tuple(Disagreement(norm.name, 0.0, 0.0) for norm, _ in tracked), tuple(skipped))
    parts = [torch.zeros(0, dtype=torch.float64)]
    for _, (mean, var, batches) in tracked:
        parts += [mean.double(), var.double(), parts[0].new_zeros(1) if batches is None else batches.double().view(1)]
    units = [own.mean.numel() for _, own in tracked]
    packed = torch.cat(parts)
    weights = _weights(weight, units, packed, world, process_group)
    rows = _gathered(packed, world, process_group)[weights[:, 0] > 0]
    weights = weights[weights[:, 0] > 0]
    pooled = []
    for (norm, own), n, part in zip(tracked, units, torch.split(rows, [2 * n + 1 for n in units], dim=1), strict=True):
        if not part.isfinite().all():
            raise ValueError(
                f"{norm.name}: a process has statistics that are not finite: batchnorm.recalibrate mends it"
            )
        means, variances, batches = torch.split(part, [n, n, 1], dim=1)
        whole = merge_rows(Moments(weights, means, variances * weights))
        s = (whole.var + norm.eps).sqrt()
        apart = float(((means - whole.mean) / s).abs().max())
        scales = float(((variances + norm.eps).sqrt() / s).log().abs().max())
        pooled.append((own, whole, batches.max(), Disagreement(norm.name, apart, scales)))
    with all_or_nothing(model, (buffer for _, own in tracked for buffer in own if buffer is not None)):
        for own, whole, batches, _ in pooled:
            store(own, (whole.mean, whole.var), batches)
    layers = sorted((apart for *_, apart in pooled), key=lambda each: -max(each.mean, each.scale))
    return Pooling(world, tuple(layers), tuple(skipped))


def _weights(weight: float, units: Sequence[int], like: Tensor, world: int, group: dist.ProcessGroup | None) -> Tensor:
    """The weights of all processes (processes, 1), once it is known that their layers fit."""
    layers = [len(units), sum(units), sum(at * each for at, each in enumerate(units))]
    heads = _gathered(like.new_tensor([float(weight), *layers]), world, group)
    weights = heads[:, 0].tolist()
    if not all(math.isfinite(each) and each >= 0 for each in weights) or sum(weights) == 0:
        raise ValueError(f"weight must be a number >= 0, not 0 in all processes, got {weights}")
    if not (heads[:, 1:] == heads[0, 1:]).all():
        raise ValueError("the processes have different batch norm layers: pool the same model in each of them")
    return heads[:, :1]


def _gathered(own: Tensor, world: int, group: dist.ProcessGroup | None) -> Tensor:
    rows = own.new_empty(world, own.numel())
    dist.all_gather(list(rows), own, group=group)
    return rows
