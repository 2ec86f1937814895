"""Statistics and gradient sums of several processes become those of one batch, over torch.distributed.

One collective a layer and direction: forward gathers every process's count, mean and m2 and merges them exactly;
backward adds the sums. Processes may have batches of different sizes, or none at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm.kernels.contract import GradSums, Merge
from batchnorm.moments import Moments, merge


class Processes(Merge):
    """The processes of a group; None stands for all of them."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @staticmethod
    def needed(group: dist.ProcessGroup | None = None) -> bool:
        """Whether there is anybody to talk to."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1

    def moments(self, own: Moments) -> Moments:
        """Exact to rounding in float64, whatever the order of the processes; the same bits in each of them."""
        mean: Tensor = own.mean
        count = torch.full((1,), float(own.count), dtype=torch.float64, device=mean.device)
        packed = torch.cat([count, mean.double(), own.m2.double()])
        parts = packed.new_empty(dist.get_world_size(self.group), packed.numel())
        dist.all_gather(list(parts), packed, group=self.group)
        counts = [int(each) for each in parts[:, 0].tolist()]
        units = mean.numel()
        if sum(counts) < 2:  # in every process alike, so that none waits for the others
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {sum(counts)} in {len(counts)} processes "
                "together: use larger batches, or .eval()"
            )
        whole = merge(Moments(n, part[1 : 1 + units], part[1 + units :]) for n, part in zip(counts, parts, strict=True))
        self.count = int(whole.count)
        return Moments(self.count, whole.mean.to(mean.dtype), whole.m2.to(mean.dtype))

    def sums(self, own: GradSums) -> GradSums:
        """Added in float64, so that the sum over many processes is as good as that of one."""
        given = [each for each in own if each is not None]
        packed = torch.stack([each.double() for each in given])
        dist.all_reduce(packed, group=self.group)
        dbeta, dgamma, *energy = (each.to(own.dbeta.dtype) for each in packed)
        return GradSums(dbeta, dgamma, energy[0] if energy else None)
