"""How a layer's running statistics move by a training batch: by it alone, together with others, or not at all.

    running ← (1 - momentum)·running + momentum·batch, with the unbiased variance

The kernel moves what it is given: the layer's buffers, or copies of them where something stands between the batch and
the buffers. What has become of the copies is put into the buffers at the end, or dropped.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm import moments
from batchnorm.kernels.contract import Merge
from batchnorm.moments import Moments

Averages: TypeAlias = tuple[Tensor | None, Tensor | None]
"""A running mean and a running variance, or None for both."""


class Buffers(NamedTuple):
    """running_mean, running_var and num_batches_tracked, each a layer's own tensor or None."""

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None


def kept(averages: Averages) -> Averages:
    """The averages to normalize by in inference, such that backward finds them as they were.

    A training forward before backward moves them in place: backward must find those that forward used. What is
    exported or traced has no training forward, and tools look there for the buffers themselves.
    """
    if torch.compiler.is_compiling():
        exporting = torch.compiler.is_exporting()
        return averages if exporting or not torch.is_grad_enabled() else _copied_in_graphs(averages)
    recorded = torch.is_grad_enabled() and torch._C._get_tracing_state() is None
    return copied(averages) if recorded or overwritten_by_others() else averages


def copied(averages: Averages) -> Averages:
    """Both as tensors of their own."""
    mean, var = averages
    return None if mean is None else mean.clone(), None if var is None else var.clone()


def _copied_in_graphs(averages: Averages) -> Averages:
    mean, var = averages
    if mean is None or var is None or mean.requires_grad or var.requires_grad:
        return copied(averages)
    copies: Averages = _copy(mean, var)
    return copies


# An operator of its own, since torch.compile would make the copies a second time in backward, where that seems cheaper
# than to keep them: from averages that have moved since.
@torch.library.custom_op("batchnorm::kept", mutates_args=())
def _copy(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return mean.clone(), var.clone()


@_copy.register_fake
def _(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(var)


class Movement:
    """What one training forward does to running statistics: the kernel moves `running` by `momentum`, then `finish`.

    Here these are the layer's own buffers, and the batch is counted before anybody looks at it, as torch.nn does.
    """

    __slots__ = ("_buffers", "momentum", "running")

    running: Averages
    momentum: float | Tensor

    def __init__(self, buffers: Buffers, momentum: float | None) -> None:
        self._buffers = buffers
        self.running = buffers.mean, buffers.var
        self.momentum = 0.0 if momentum is None else momentum
        if buffers.batches is not None:
            buffers.batches.add_(1)
            if momentum is None:
                self.momentum = 1.0 / buffers.batches.to(_momentum_dtype(buffers.mean))

    def finish(self, x: Tensor, merge: Merge | None) -> None:
        """The kernel has moved `running` by the batch x, or by that which x is merged into."""


class Apart(Movement):
    """The kernel moves copies: nothing moves or counts but `finish`."""

    __slots__ = ()

    def __init__(self, buffers: Buffers, momentum: float | None) -> None:
        copies = Buffers(*(None if each is None else each.clone() for each in buffers))
        super().__init__(copies, momentum)
        self._buffers = buffers

    def finish(self, x: Tensor, merge: Merge | None) -> None:
        self._put(self.running)

    @torch.no_grad()
    def _put(self, averages: Averages) -> None:
        for buffer, value in zip(self._buffers, averages, strict=False):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        if self._buffers.batches is not None:
            self._buffers.batches.add_(1)


class Unmoved(Apart):
    """Nothing moves: backward runs a forward again, or momentum is 0 (the second pass of SAM)."""

    __slots__ = ()

    def finish(self, x: Tensor, merge: Merge | None) -> None:
        pass


class Together(Apart):
    """So many batches move the statistics once, by the moments of all their values.

    gathered: the batches since the last movement. This one is appended; once complete, they are emptied.
    """

    __slots__ = ("_batches", "_gathered", "_weight")

    def __init__(self, buffers: Buffers, momentum: float | None, gathered: list[Moments], batches: int) -> None:
        super().__init__(buffers, momentum)
        self._gathered, self._batches = gathered, batches
        self._weight, self.momentum = self.momentum, 1.0  # so that `running` becomes the batch's own

    def finish(self, x: Tensor, merge: Merge | None) -> None:
        mean, var = self.running
        if mean is None or var is None:
            return self._put(self.running)
        count = x.numel() // x.shape[1] if merge is None else merge.count
        self._gathered.append(Moments.of_variance(count, mean.double(), var.double(), unbiased=True))
        if len(self._gathered) < self._batches:
            return None
        whole = moments.merge(self._gathered)
        self._gathered.clear()
        return self._put(
            (self._moved(self._buffers.mean, whole.mean), self._moved(self._buffers.var, whole.unbiased_var))
        )

    def _moved(self, average: Tensor | None, batch: Tensor) -> Tensor | None:
        weight = self._weight.to(batch.dtype) if isinstance(self._weight, Tensor) else self._weight
        return None if average is None else torch.lerp(average.to(batch.dtype), batch, weight)


def movement(buffers: Buffers, momentum: float | None, gathered: list[Moments], together: int) -> Movement:
    """How this forward, in training, moves these statistics: `together` batches at once."""
    if recomputing() or (together > 1 and momentum == 0):
        return Unmoved(buffers, momentum)
    if together > 1:
        return Together(buffers, momentum, gathered, together)
    return Apart(buffers, momentum) if overwritten_by_others() else Movement(buffers, momentum)


def recomputing() -> bool:
    """Whether backward runs this forward again (activation checkpointing): the statistics have moved already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def overwritten_by_others() -> bool:
    """Whether DistributedDataParallel may write into the buffers before backward: it must not find them kept there."""
    return not torch.compiler.is_compiling() and dist.is_available() and dist.is_initialized()


def _momentum_dtype(running_mean: Tensor | None) -> torch.dtype:
    narrow = running_mean is None or running_mean.dtype != torch.float64
    return torch.float32 if narrow else torch.float64
