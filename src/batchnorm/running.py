"""How a layer's running statistics move by a training batch: by it alone, together with others, or not at all.

    running ← (1 - momentum)·running + momentum·batch, with the unbiased variance

The kernel moves what it is given: the layer's buffers, or copies of them where something stands between the batch and
the buffers. What has become of the copies is put into the buffers at the end, or dropped.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm.moments import Moments, merge

Averages: TypeAlias = tuple[Tensor | None, Tensor | None]
"""A running mean and a running variance, or None for both."""


class Buffers(NamedTuple):
    """running_mean, running_var and num_batches_tracked, each a layer's own tensor or None."""

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None

    def inferring(self) -> Averages:
        """The two averages for inference, such that backward finds them as they were."""
        averages = self.mean, self.var
        return copied(averages) if overwritten_by_others() else averages


def copied(averages: Averages) -> Averages:
    """Both as tensors of their own."""
    mean, var = averages
    return None if mean is None else mean.clone(), None if var is None else var.clone()


class Movement:
    """What one training forward does to running statistics: the kernel moves `running` by `momentum`, then `finish`.

    Args:
        buffers: what moves in the end.
        momentum: the weight of the new value; None for the cumulative average.
        gathered: the batches since the last movement, this one to be appended; emptied where they are complete.
        together: how many batches move them together.
    """

    __slots__ = ("_again", "_buffers", "_gathered", "_momentum", "_together", "momentum", "running")

    def __init__(self, buffers: Buffers, momentum: float | None, gathered: list[Moments], together: int) -> None:
        self._buffers, self._gathered, self._together = buffers, gathered, together
        self._again = recomputing()
        self._momentum: float | Tensor = 0.0 if momentum is None else momentum
        if momentum is None and buffers.batches is not None:
            self._momentum = 1.0 / (buffers.batches + 1).to(_momentum_dtype(buffers.mean))
        apart = self._again or together > 1 or overwritten_by_others()
        averages = buffers.mean, buffers.var
        self.running = copied(averages) if apart else averages
        self.momentum = 1.0 if together > 1 else self._momentum

    def finish(self, count: Any) -> None:
        """The kernel has moved `running` by a batch of so many values a channel."""
        if self._again:
            return
        mean, var, batches = self._buffers
        moved = self.running
        if self._together > 1 and moved[0] is not None and moved[1] is not None:
            self._gathered.append(Moments.of_variance(count, moved[0].double(), moved[1].double(), unbiased=True))
            if len(self._gathered) < self._together:
                return
            whole = merge(self._gathered)
            self._gathered.clear()
            moved = (self._towards(mean, whole.mean), self._towards(var, whole.unbiased_var))
        with torch.no_grad():
            for buffer, value in ((mean, moved[0]), (var, moved[1])):
                if buffer is not None and value is not None and value is not buffer:
                    buffer.copy_(value)
            if batches is not None:
                batches.add_(1)

    def _towards(self, average: Tensor | None, batch: Tensor) -> Tensor | None:
        return None if average is None else torch.lerp(average.to(batch.dtype), batch, self._weight(batch))

    def _weight(self, batch: Tensor) -> Any:
        return self._momentum.to(batch.dtype) if isinstance(self._momentum, Tensor) else self._momentum


def recomputing() -> bool:
    """Whether backward runs this forward again (activation checkpointing): the statistics have moved already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def overwritten_by_others() -> bool:
    """Whether DistributedDataParallel may write into the buffers before backward: it must not find them kept there."""
    return not torch.compiler.is_compiling() and dist.is_available() and dist.is_initialized()


def _momentum_dtype(running_mean: Tensor | None) -> torch.dtype:
    narrow = running_mean is None or running_mean.dtype != torch.float64
    return torch.float32 if narrow else torch.float64
