"""SyncBatchNorm: one batch norm over the batches of several processes, on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm.distributed import Processes
from batchnorm.kernels.contract import Merge
from batchnorm.layers import Call, _BatchNorm

__all__ = ["SyncBatchNorm"]


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
