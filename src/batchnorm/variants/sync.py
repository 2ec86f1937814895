"""SyncBatchNorm: one batch norm over the batches of several processes, on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm.kernels.contract import Call, GradSums, Merge
from batchnorm.layers import _BatchNorm
from batchnorm.moments import Moments, merge_rows

__all__ = ["SyncBatchNorm"]


class Processes(Merge):
    """The processes of a group; None means all of them."""

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


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over the batches of all processes of a group, as if they were one batch.

    y = act(gamma·(x - mean)/sqrt(var + eps) + beta [+ residual]) with mean and var (biased) of all values of a channel
    in all processes: counts, means and squared deviations are merged exactly, so batches may differ in size and be
    empty. The running statistics move alike in every process, with the unbiased variance of the whole batch. gamma and
    beta get the gradient of the process's own part, which DistributedDataParallel averages like all others.

    In eval mode, where torch.distributed is not initialized, and in a group of one process it is `BatchNorm2d` for
    inputs of any dimensions. A training forward and its backward have one collective operation each: every process of
    the group must run the layer equally often, all of them in training mode or none.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of the new batch in the running statistics; None for the mean over all batches so far.
        affine: learn gamma (`weight`, starts at 1) and beta (`bias`, starts at 0).
        track_running_stats: keep `running_mean`, `running_var` and `num_batches_tracked`.
        device, dtype: of parameters and buffers.
        options: bias, act, negative_slope, accumulate and batch_of_one, as of `BatchNorm2d`.
        process_group: the processes; by default all of them. A pickle does not hold it: an unpickled layer has all of
            them.

    Raises what torch.nn.BatchNorm2d raises on the same input, whatever its dimensions.

    Not a subclass of torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on the CPU. Not differentiable
    twice.
    """

    _processes: Processes
    _dims = (2, 3, 4, 5)
    _shapes = "(N, C) or (N, C, *spatial)"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group

    def _normalized(self, call: Call) -> Tensor:
        """With gamma and beta as wide as the statistics: `fully_shard` narrows parameters and leaves buffers alone."""
        gamma, beta, mean = call.epilogue.gamma, call.epilogue.beta, call.running[0]
        if mean is not None and gamma is not None and gamma.dtype == call.x.dtype != mean.dtype:
            wide = call.epilogue._replace(
                gamma=gamma.to(mean.dtype), beta=None if beta is None else beta.to(mean.dtype)
            )
            call = call._replace(epilogue=wide)
        return super()._normalized(call)

    def _merge(self) -> Merge | None:
        return self._processes if Processes.needed(self._processes.group) else None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes whose batches are one; None stands for all of them."""
        return self._processes.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._processes = Processes(group)
