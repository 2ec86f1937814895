"""Every update of running statistics: by a training batch, alone or together with others, or by a tool that measured.

    running ← (1 - momentum)·running + momentum·batch, with the unbiased variance

The kernel moves what it is given: the layer's buffers, or copies of them where something stands between the batch and
the buffers. A `finish` then moves the buffers by the copies, or nothing does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch import distributed as dist

from batchnorm import moments
from batchnorm.moments import Moments
from batchnorm.restoring import put

Averages: TypeAlias = tuple[Tensor | None, Tensor | None]
"""A running mean and a running variance, or None for both."""

Finish: TypeAlias = Callable[[int | Tensor], None]
"""To be called with the number of values that a channel had in the batch, once the kernel has run."""


NAMES = ("running_mean", "running_var", "num_batches_tracked")


class Buffers(NamedTuple):
    """running_mean, running_var and num_batches_tracked, each a layer's own tensor or None."""

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, suffix: str = "") -> Buffers:
        """A layer's; `suffix` ends the names of one domain's."""
        return cls(*(getattr(layer, name + suffix) for name in NAMES))


def store(buffers: Buffers, averages: Iterable[Tensor], batches: Tensor | int) -> None:
    """Write statistics that were measured or pooled, and the number of their batches."""
    for buffer, value in zip(buffers, (*averages, batches), strict=True):
        if buffer is not None:
            put(buffer, value)


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


class Moving(NamedTuple):
    """Running statistics that a kernel moves by a training batch, (C,) each, and the momentum."""

    mean: Tensor
    var: Tensor
    momentum: float

    def move(self, moments: Moments) -> None:
        """By a batch of these moments."""
        move(self.mean, moments.mean, self.momentum)
        move(self.var, moments.unbiased_var, self.momentum)

    def moved_in_place(self) -> None:
        """Tell autograd that compiled code has written them."""
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
    """`move` both, where they exist."""
    for average, value in zip(averages, batch, strict=True):
        if average is not None and value is not None:
            move(average, value, momentum)


def copied(averages: Averages) -> Averages:
    """Both as new tensors."""
    mean, var = averages
    return None if mean is None else mean.clone(), None if var is None else var.clone()


def _copied_in_graphs(averages: Averages) -> Averages:
    mean, var = averages
    if mean is None or var is None or mean.requires_grad or var.requires_grad:
        return copied(averages)
    copies: Averages = _copy(mean, var)
    return copies


# A custom operator, since torch.compile would make the copies a second time in backward, where that seems cheaper
# than to keep them: from averages that have moved since.
@torch.library.custom_op("batchnorm::kept", mutates_args=())
def _copy(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return mean.clone(), var.clone()


@_copy.register_fake
def _(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(var)


def movement(
    buffers: Buffers, momentum: float | None, gathered: list[Moments] | None, together: int
) -> tuple[Averages, float, Finish | None]:
    """What one training forward gives to the kernel, by which momentum it moves that, and what is to be done after it.

    `momentum` None is the cumulative average. `gathered` are the batches since the last movement, of the `together`
    that move the statistics at once: this one is appended; once complete, they are emptied. It is None where each batch
    moves them.

    The batch is counted before the layer looks at it, as torch.nn does; where several processes train, afterwards, so
    that a step that fails leaves nothing; of batches together once, when they move. Nothing moves where backward runs a
    forward again, or with `together` where momentum is 0 (SAM's second pass).
    """
    mean, var, batches = buffers
    averages = mean, var
    if recomputing() or (gathered is not None and momentum == 0):
        return copied(averages), 0.0, None
    if gathered is not None:
        return _gathering(buffers, momentum, gathered, together)
    apart, cumulative = overwritten_by_others(), momentum is None and batches is not None
    if batches is not None and not apart:
        batches.add_(1)
    weight = 0.0 if momentum is None else momentum
    if not (apart or cumulative):
        return averages, weight, None
    copies = copied(averages)

    def finish(_: int | Tensor) -> None:
        if batches is not None and apart:
            batches.add_(1)
        if cumulative:
            move_all(averages, copies, _cumulative(buffers))
            return
        with torch.no_grad():
            for average, value in zip(averages, copies, strict=True):
                if average is not None and value is not None:
                    average.copy_(value)

    # In a cumulative average the copies become the batch's own, and the weight, a tensor, needs no value on the host.
    return copies, 1.0 if cumulative else weight, finish


def _gathering(
    buffers: Buffers, momentum: float | None, gathered: list[Moments], together: int
) -> tuple[Averages, float, Finish]:
    """The kernel moves copies by momentum 1, which become the batch's own; the last batch moves the buffers."""
    batch = mean, var = copied((buffers.mean, buffers.var))

    def finish(count: int | Tensor) -> None:
        if mean is not None and var is not None:
            gathered.append(Moments.of_variance(count, mean.double(), var.double(), unbiased=True))
            if len(gathered) < together:
                return
        if buffers.batches is not None:
            buffers.batches.add_(1)
        if gathered:
            whole = moments.merge(gathered)
            gathered.clear()
            weight = _cumulative(buffers) if momentum is None else momentum
            move_all((buffers.mean, buffers.var), (whole.mean, whole.unbiased_var), weight)

    return batch, 1.0, finish


def _cumulative(buffers: Buffers) -> Tensor | float:
    """The weight of the newest batch in the average over all."""
    mean, _, batches = buffers
    if batches is None:
        return 0.0
    return 1.0 / batches.to(torch.float64 if mean is not None and mean.dtype == torch.float64 else torch.float32)


def recomputing() -> bool:
    """Whether backward runs this forward again (activation checkpointing): the statistics have moved already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def overwritten_by_others() -> bool:
    """Whether DistributedDataParallel may write into the buffers before backward: it must not find them kept there."""
    return not torch.compiler.is_compiling() and dist.is_available() and dist.is_initialized()
