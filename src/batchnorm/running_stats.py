"""Every update of running statistics: by a training batch, by accumulated batches, or by a tool that measured.

    running ← (1 - momentum)·running + momentum·batch, with the unbiased variance

The kernel updates the layer's buffers, or copies of them where they cannot be written directly. A `Finish` then updates
the buffers from the copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch import distributed as dist

from batchnorm import moments
from batchnorm.moments import Moments
from batchnorm.restoring import write

Averages: TypeAlias = tuple[Tensor | None, Tensor | None]
"""A running mean and a running variance, or None for both."""

Finish: TypeAlias = Callable[[int | Tensor], None]
"""Called after the kernel has run, with the number of values per channel."""


NAMES = ("running_mean", "running_var", "num_batches_tracked")


class Buffers(NamedTuple):
    """A layer's running_mean, running_var and num_batches_tracked; None if it has none."""

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, suffix: str = "") -> Buffers:
        """Those of a layer, or of one domain with its `suffix`."""
        return cls(*(getattr(layer, name + suffix) for name in NAMES))


def store(buffers: Buffers, averages: Iterable[Tensor], batches: Tensor | int) -> None:
    """Write measured or pooled statistics, and their number of batches."""
    for buffer, value in zip(buffers, (*averages, batches), strict=True):
        if buffer is not None:
            write(buffer, value)


def eval_averages(averages: Averages) -> Averages:
    """The averages that eval mode normalizes by: copies if a training forward may change them before backward.

    Exported and traced models have no training forward, and tools look for the buffers there: no copies.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or not torch.is_grad_enabled():
            return averages
        mean, var = averages
        plain = mean is not None and var is not None and not (mean.requires_grad or var.requires_grad)
        return _copy(mean, var) if plain else copied(averages)
    records_grad = torch.is_grad_enabled() and torch._C._get_tracing_state() is None
    return copied(averages) if records_grad or may_be_overwritten() else averages


class RunningUpdate(NamedTuple):
    """The running statistics (C,) that a kernel updates in training, and the momentum."""

    mean: Tensor
    var: Tensor
    momentum: float

    def move(self, moments: Moments) -> None:
        """Update by a batch of these moments."""
        move(self.mean, moments.mean, self.momentum)
        move(self.var, moments.unbiased_var, self.momentum)

    def moved_in_place(self) -> None:
        """Increment the autograd versions, after compiled code has written the tensors."""
        torch.autograd.graph.increment_version((self.mean, self.var))


@torch.no_grad()
def move(average: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """average ← (1 - momentum)·average + momentum·batch in place, computed in the wider type, at least float32."""
    wide = torch.promote_types(torch.promote_types(average.dtype, batch.dtype), torch.float32)
    weight = momentum.to(wide) if isinstance(momentum, Tensor) else momentum
    if average.dtype == wide:
        average.lerp_(batch.to(wide), weight)
    else:
        average.copy_(torch.lerp(average.to(wide), batch.to(wide), weight))


def move_all(averages: Averages, batch: Averages, momentum: float | Tensor) -> None:
    """`move` the mean and the variance, if present."""
    for average, value in zip(averages, batch, strict=True):
        if average is not None and value is not None:
            move(average, value, momentum)


def copied(averages: Averages) -> Averages:
    """Clones of the mean and the variance, if present."""
    mean, var = averages
    return None if mean is None else mean.clone(), None if var is None else var.clone()


# A custom operator: torch.compile may recompute clones in backward, from averages that have changed since.
@torch.library.custom_op("batchnorm::kept", mutates_args=())
def _copy(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return mean.clone(), var.clone()


@_copy.register_fake
def _(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(var)


def plan_update(
    buffers: Buffers, momentum: float | None, pending: list[Moments] | None, accumulate: int
) -> tuple[Averages, float, Finish | None]:
    """Plan the update of one training forward: what the kernel updates, its momentum, and what to call afterwards.

    `momentum` None is the cumulative average. `pending` has the batches since the last update, if `accumulate` batches
    are pooled into one; it is None otherwise.

    num_batches_tracked is incremented before the kernel runs, as in torch.nn; with several processes afterwards, so
    that a failed step changes nothing; with accumulated batches once per update. Nothing is updated where backward runs
    a forward again, or with accumulated batches if momentum is 0 (SAM's second pass).
    """
    mean, var, batches = buffers
    averages = mean, var
    if is_recomputing() or (pending is not None and momentum == 0):
        return copied(averages), 0.0, None
    if pending is not None:
        return _plan_accumulated(buffers, momentum, pending, accumulate)
    distributed, cumulative = may_be_overwritten(), momentum is None and batches is not None
    if batches is not None and not distributed:
        batches.add_(1)
    weight = 0.0 if momentum is None else momentum
    if not (distributed or cumulative):
        return averages, weight, None
    copies = copied(averages)

    def finish(_: int | Tensor) -> None:
        if batches is not None and distributed:
            batches.add_(1)
        if cumulative:
            move_all(averages, copies, _cumulative_weight(buffers))
            return
        with torch.no_grad():
            for average, value in zip(averages, copies, strict=True):
                if average is not None and value is not None:
                    average.copy_(value)

    # Cumulative: momentum 1 makes the copies the batch's statistics, and the weight stays a tensor on the device.
    return copies, 1.0 if cumulative else weight, finish


def _plan_accumulated(
    buffers: Buffers, momentum: float | None, pending: list[Moments], accumulate: int
) -> tuple[Averages, float, Finish]:
    """With momentum 1 the copies become the batch's statistics; the last batch updates the buffers."""
    batch = mean, var = copied((buffers.mean, buffers.var))

    def finish(count: int | Tensor) -> None:
        if mean is not None and var is not None:
            pending.append(Moments.of_variance(count, mean.double(), var.double(), unbiased=True))
            if len(pending) < accumulate:
                return
        if buffers.batches is not None:
            buffers.batches.add_(1)
        if pending:
            pooled = moments.merge(pending)
            pending.clear()
            weight = _cumulative_weight(buffers) if momentum is None else momentum
            move_all((buffers.mean, buffers.var), (pooled.mean, pooled.unbiased_var), weight)

    return batch, 1.0, finish


def _cumulative_weight(buffers: Buffers) -> Tensor | float:
    """The weight of the newest batch in the cumulative average."""
    mean, _, batches = buffers
    if batches is None:
        return 0.0
    return 1.0 / batches.to(torch.float64 if mean is not None and mean.dtype == torch.float64 else torch.float32)


def is_recomputing() -> bool:
    """Whether backward runs this forward again (activation checkpointing): the update has been made already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_overwritten() -> bool:
    """Whether DistributedDataParallel may write into the buffers before backward, which then needs copies."""
    return not torch.compiler.is_compiling() and dist.is_available() and dist.is_initialized()
