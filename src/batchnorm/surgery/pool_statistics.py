"""pool_statistics(): pool the running statistics of all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from batchnorm.moments import Moments, merge_rows
from batchnorm.records import Record, Skipped, format_names
from batchnorm.restoring import all_or_nothing
from batchnorm.running_stats import store
from batchnorm.surgery._shared.layers import find
from batchnorm.surgery._shared.norm import Norm
from batchnorm.variants.domains import suffix
from batchnorm.words import plural

__all__ = ["Pooling", "pool_statistics"]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """How far apart the processes, or the states, were in one layer: the maximum over its channels and over them.

    Attributes:
        name: the layer's name.
        mean: |running_mean - pooled mean|, in pooled standard deviations sqrt(var + eps).
        scale: |log(s/s_pooled)|, with s = sqrt(running_var + eps) of a process.
    """

    name: str
    mean: float
    scale: float

    @classmethod
    def of(cls, name: str, means: Tensor, variances: Tensor, pooled: Moments, eps: float) -> Disagreement:
        """Compare the rows of means and variances (k, C) with what they were pooled to (C,).

        Args:
            name: the layer's name.
            means, variances: (k, C), a row for each.
            pooled: what they were pooled to, (C,).
            eps: the layer's.
        """
        s = (pooled.var + eps).sqrt()
        mean = float(((means - pooled.mean) / s).abs().max())
        return cls(name, mean, float(((variances + eps).sqrt() / s).log().abs().max()))

    @property
    def largest(self) -> float:
        """The larger of the two numbers, by which records sort layers."""
        return max(self.mean, self.scale)

    def __str__(self) -> str:
        return (
            f"{format_names(self.name)}: means up to {self.mean:.3g} deviations apart from the pooled one, "
            f"scales by a factor of up to {math.exp(self.scale):.3g}"
        )


@dataclass(frozen=True, slots=True, repr=False)
class Pooling(Record):
    """What `pool_statistics` did.

    Attributes:
        processes: the number of processes; with 1 there was nothing to pool.
        layers: one record for each layer; those that differed most come first.
        skipped: the layers that were not changed, each with the reason.
    """

    processes: int
    layers: tuple[Disagreement, ...]
    skipped: tuple[Skipped, ...]

    _left = "not pooled"

    def _head(self) -> list[str]:
        processes = plural(self.processes, "process", "processes")
        worst = [f"  {layer}" for layer in self.layers[:3]]
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

    Without `sync`, the layers of a process see only its batches, and DistributedDataParallel keeps the statistics of
    process 0. To use all of them, train with DistributedDataParallel(..., broadcast_buffers=False), and call this in
    every process before evaluating or saving. The results are bitwise equal in every process; num_batches_tracked
    becomes the maximum.

    Args:
        model: changed in place; the same layers in every process.
        weight: the weight w of this process's statistics, such as the number of its samples; 0 for none.
        process_group: the processes; by default all of them.
        also: subclasses that normalize as their base class does, to be included.

    Returns:
        How far apart the processes were, layer by layer. Without torch.distributed nothing is pooled.

    Raises TypeError if `model` is not a torch.nn.Module; ValueError in every process, without changes, if the models or
    weights do not fit or statistics are not finite.
    """
    norms, skipped = find("pool_statistics", model, also)
    tracked: list[tuple[Norm, Any]] = [
        (norm, norm.buffers(suffix(number))) for norm in norms for number in range(getattr(norm.layer, "domains", 1))
    ]
    world = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return Pooling(world, tuple(Disagreement(norm.name, 0.0, 0.0) for norm, _ in tracked), tuple(skipped))
    parts = [torch.zeros(0, dtype=torch.float64)]
    for _, (mean, var, batches) in tracked:
        parts += [mean.double(), var.double(), parts[0].new_zeros(1) if batches is None else batches.double().view(1)]
    sizes = [buffers.mean.numel() for _, buffers in tracked]
    packed = torch.cat(parts)
    weights = _gather_weights(weight, sizes, packed, world, process_group)
    rows = _all_gather(packed, world, process_group)[weights[:, 0] > 0]
    weights = weights[weights[:, 0] > 0]
    pooled = []
    columns = torch.split(rows, [2 * n + 1 for n in sizes], dim=1)
    for (norm, buffers), n, part in zip(tracked, sizes, columns, strict=True):
        if not part.isfinite().all():
            raise ValueError(f"{norm.name}: a process has statistics that are not finite: call batchnorm.recalibrate")
        means, variances, batches = torch.split(part, [n, n, 1], dim=1)
        merged = merge_rows(Moments(weights, means, variances * weights))
        gaps = Disagreement.of(norm.name, means, variances, merged, norm.eps)
        pooled.append((buffers, merged, batches.max(), gaps))
    with all_or_nothing(model, (tensor for _, buffers in tracked for tensor in buffers if tensor is not None)):
        for buffers, merged, batches, _ in pooled:
            store(buffers, (merged.mean, merged.var), batches)
    layers = sorted((gaps for *_, gaps in pooled), key=lambda gaps: -gaps.largest)
    return Pooling(world, tuple(layers), tuple(skipped))


def _gather_weights(
    weight: float, sizes: Sequence[int], like: Tensor, world: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Check that the layers of all processes match; return the weights (processes, 1)."""
    fingerprint = [len(sizes), sum(sizes), sum(index * size for index, size in enumerate(sizes))]
    heads = _all_gather(like.new_tensor([float(weight), *fingerprint]), world, group)
    weights = heads[:, 0].tolist()
    if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
        raise ValueError(f"weight must be a number >= 0, not 0 in all processes, got {weights}")
    if not (heads[:, 1:] == heads[0, 1:]).all():
        raise ValueError("the processes have different batch norm layers: pool the same model in each of them")
    return heads[:, :1]


def _all_gather(vector: Tensor, world: int, group: dist.ProcessGroup | None) -> Tensor:
    rows = vector.new_empty(world, vector.numel())
    dist.all_gather(list(rows), vector, group=group)
    return rows
