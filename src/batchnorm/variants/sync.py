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
    """Merges statistics and sums over the processes of a group; None means all processes."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def __deepcopy__(self, memo: object) -> Processes:
        """Copy with the same group, which cannot be copied."""
        return Processes(self.group)

    def __reduce__(self) -> tuple[type[Processes], tuple[()]]:
        """Pickle without the group, which other programs do not have."""
        return Processes, ()

    @staticmethod
    def needed(group: dist.ProcessGroup | None = None) -> bool:
        """Whether the group has more than one process."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1

    def moments(self, local: Moments) -> Moments:
        """Merge in float64; every process gets the same bits. Raises ValueError for fewer than two values."""
        mean: Tensor = local.mean
        count = torch.full((1,), float(local.count), dtype=torch.float64, device=mean.device)
        packed = torch.cat([count, mean.double(), local.m2.double()])
        parts = packed.new_empty(dist.get_world_size(self.group), packed.numel())
        dist.all_gather(list(parts), packed, group=self.group)
        channels = mean.numel()
        merged = merge_rows(Moments(parts[:, :1], parts[:, 1 : 1 + channels], parts[:, 1 + channels :]))
        total = merged.count.squeeze()
        # On a device the count is copied to the host only if it may be too small; all processes decide alike.
        on_host = int(total) if mean.device.type == "cpu" or local.count < 2 else None
        if on_host is not None and on_host < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {on_host} in {len(parts)} processes "
                "together: use larger batches, or .eval()"
            )
        self.count = on_host if mean.device.type == "cpu" and on_host is not None else total
        return Moments(self.count, merged.mean.to(mean.dtype), merged.m2.to(mean.dtype))

    def sums(self, local: GradSums) -> GradSums:
        """Add in float64, so that many processes lose no accuracy."""
        packed = torch.stack([vector.double() for vector in local if vector is not None])
        dist.all_reduce(packed, group=self.group)
        return GradSums(*packed.to(local.dbeta.dtype))

    @property
    def fills_tap(self) -> bool:
        """The first process of the group records."""
        return dist.get_rank(self.group) == 0


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over the batches of all processes of a group, as if they were one batch.

    y = act(gamma·(x - mean)/sqrt(var + eps) + beta [+ residual]) with mean and var (biased) of all values of a channel
    in all processes. Counts, means and squared deviations are merged exactly, so batches may differ in size and be
    empty. Every process updates its running statistics alike, with the unbiased variance of the global batch. gamma and
    beta get the gradient of the process's local batch, which DistributedDataParallel averages like all others.

    In eval mode, without torch.distributed, and in a group of one process it equals `BatchNorm2d`, for inputs of any
    dimensions. A training forward and its backward run one collective each: every process of the group must call the
    layer equally often, and in the same mode.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of the new batch in the running statistics; None for the mean over all batches so far.
        affine: learn gamma (`weight`, starts at 1) and beta (`bias`, starts at 0).
        track_running_stats: maintain `running_mean`, `running_var` and `num_batches_tracked`.
        device, dtype: of parameters and buffers.
        options: bias, act, negative_slope, accumulate and batch_of_one, as of `BatchNorm2d`.
        process_group: the processes; by default all. It is not pickled: an unpickled layer uses all processes.

    Raises the errors of torch.nn.BatchNorm2d on the same input, for any number of dimensions.

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

    def _transform(self, call: Call) -> Tensor:
        """Widen gamma and beta to the statistics' type: `fully_shard` casts parameters, but not buffers."""
        gamma, beta, mean = call.epilogue.gamma, call.epilogue.beta, call.running[0]
        if mean is not None and gamma is not None and gamma.dtype == call.x.dtype != mean.dtype:
            wide = call.epilogue._replace(
                gamma=gamma.to(mean.dtype), beta=None if beta is None else beta.to(mean.dtype)
            )
            call = call._replace(epilogue=wide)
        return super()._transform(call)

    def _merge(self) -> Merge | None:
        return self._processes if Processes.needed(self._processes.group) else None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that share statistics; None means all processes."""
        return self._processes.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._processes = Processes(group)
