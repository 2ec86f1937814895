"""average(): average several states of one network (SWA, EMA, a soup), and measure or pool its statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batchnorm.merging._states import State, check_same_network, check_shares, network, read_states
from batchnorm.merging.pool_states import PooledStates, pool_shares
from batchnorm.records import Record
from batchnorm.restoring import all_or_nothing, write
from batchnorm.surgery._shared.calling import ForwardFn
from batchnorm.surgery.recalibrate import Recalibration, recalibrate
from batchnorm.words import plural

__all__ = ["Averaging", "average"]


@dataclass(frozen=True, slots=True, repr=False)
class Averaging(Record):
    """What `average` did.

    Attributes:
        states: the number of states that were averaged.
        tensors: the number of tensors of the state dict that were averaged: those of floating point.
        recalibration: the record of `recalibrate`, which runs afterwards; None without batches.
        pooling: the pooled statistics of the states, which the model has without batches; None with batches.
    """

    states: int
    tensors: int
    recalibration: Recalibration | None
    pooling: PooledStates | None = None

    def _head(self) -> list[str]:
        averaged = f"{plural(self.tensors, 'tensor')} averaged over {plural(self.states, 'state')}"
        if self.pooling is None:
            return [averaged, str(self.recalibration)]
        if not self.pooling.layers:
            return [averaged]
        hint = "the statistics are those of the states, not of the averaged weights: pass batches to measure these"
        return [averaged, str(self.pooling), hint]


def average(
    model: nn.Module,
    states: Iterable[State],
    batches: Iterable[Any] | None = None,
    forward_fn: ForwardFn | None = None,
    *,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Averaging:
    """Average the weights of several states of one network, and measure or pool its running statistics, in place.

    θ = Σ w·θ_i/Σ w, in float64, for the weights θ_i of the states and their shares w; then `recalibrate` measures the
    running statistics of θ on the batches.

    The statistics of averaged weights are not the average of the statistics (Izmailov et al. 2018, "Averaging weights
    leads to wider optima", section 3.2). This replaces torch.optim.swa_utils.update_bn; `metric` keeps the better of
    the averaged and the recalibrated statistics. Integer tensors are those of the last state.

    Without batches the statistics of the states are pooled with their shares, as by `pool_states`. This keeps the
    variance between the states, which an average of variances lacks, but they are still statistics of other weights:
    recalibrating is better where there is data.

    Args:
        model: changed in place; not if an error is raised. Parallel and compiled wrappers, and
            torch.optim.swa_utils.AveragedModel, are unwrapped.
        states: state dicts or modules of the same network: checkpoints of one training, several trainings, or one
            averaged model (an EMA, an AveragedModel).
        batches: the data to recalibrate on, such as a DataLoader, as of `recalibrate`; None to pool.
        forward_fn: forward_fn(model, batch) runs the model on a batch; by default model(batch), as of `recalibrate`.
        weights: the share w of each state, >= 0; equal by default.
        options: those of `recalibrate`: exact, tolerance, metric, higher_is_better, device, progress, nonfinite, also.

    Returns:
        How many states and tensors were averaged, and the record of the recalibration or of the pooled statistics.

    Raises TypeError if a state is neither a state dict nor a module, and for a forward_fn or options without batches;
    ValueError without states, with invalid weights, and with states of another network (the message has the first key
    that differs). Without batches also for statistics that `pool_states` cannot pool.
    """
    inner = network("average", model)
    loaded = read_states("average", states)
    shares = check_shares(weights, len(loaded))
    if batches is None and (forward_fn is not None or options):
        unused = next(iter(options), "forward_fn")
        raise TypeError(f"average: {unused} is of the recalibration, which needs batches: pass them too")
    target = inner.state_dict(keep_vars=True)
    check_same_network(target, loaded)
    new: dict[str, Any] = {
        name: sum(s * state[name].to("cpu", torch.float64) for s, state in zip(shares, loaded, strict=True) if s)
        for name, tensor in target.items()
        if tensor.is_floating_point()
    }
    averaged = len(new)
    pooling = pool_shares(loaded, shares) if batches is None else None
    if pooling is not None:
        new |= pooling.state
    with all_or_nothing(inner, target.values()):
        for name, tensor in target.items():
            write(tensor, new.get(name, loaded[-1][name]))
        recalibration = None if batches is None else recalibrate(inner, batches, forward_fn, **options)
    return Averaging(len(loaded), averaged, recalibration, pooling)
