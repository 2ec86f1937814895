"""Statistics and gradient sums of several processes become those of one batch, over torch.distributed.

One collective a layer and direction: forward gathers every process's count, mean and m2 and merges them exactly;
backward adds the sums. Processes may have batches of different sizes, or none at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm.kernels.contract import GradSums, Merge
from batchnorm.moments import Moments, merge_rows


class Processes(Merge):
    """The processes of a group; None stands for all of them."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def __deepcopy__(self, memo: object) -> Processes:
        """The same group: it is the processes' and no part of what is copied."""
        return Processes(self.group)

    def __reduce__(self) -> tuple[type[Processes], tuple[()]]:
        """All processes: those of the group are not known elsewhere."""
        return Processes, ()

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
        units = mean.numel()
        whole = merge_rows(Moments(parts[:, :1], parts[:, 1 : 1 + units], parts[:, 1 + units :]))
        total = whole.count.squeeze()
        # A host asks a device for the count only where it may be too few. Then all do: none waits for the others.
        on_host = int(total) if mean.device.type == "cpu" or own.count < 2 else None
        if on_host is not None and on_host < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {on_host} in {len(parts)} processes "
                "together: use larger batches, or .eval()"
            )
        self.count = on_host if mean.device.type == "cpu" and on_host is not None else total
        return Moments(self.count, whole.mean.to(mean.dtype), whole.m2.to(mean.dtype))

    def sums(self, own: GradSums) -> GradSums:
        """Added in float64, so that the sum over many processes is as good as that of one."""
        packed = torch.stack([each.double() for each in own if each is not None])
        dist.all_reduce(packed, group=self.group)
        return GradSums(*packed.to(own.dbeta.dtype))

    @property
    def speaks(self) -> bool:
        """The first of the group does."""
        return dist.get_rank(self.group) == 0
