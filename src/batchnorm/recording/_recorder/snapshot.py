"""One step's numbers, of all layers and units, as the columns of the table `units` (docs/run-format.md).

A step may have several forwards of a layer (accumulated gradients, a shared layer). Their distributions are pooled by
`Moments`, their gradient sums added. Forwards without a backward do not count where others of the step have one: with
activation checkpointing, each forward runs twice and one of the two is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm import quantities as q
from batchnorm.kernels.contract import Pass
from batchnorm.moments import Moments
from batchnorm.recording._recorder.attach import Watched

Array = NDArray[np.float64]
Columns = dict[str, Array]


class State(NamedTuple):
    """What the layers hold at one moment, all units in a row: NaN where a layer has no such vector."""

    gamma: Array
    beta: Array
    running_mean: Array
    running_var: Array


@torch.no_grad()
def state(layers: Sequence[Watched]) -> State:
    """Copies of gamma, beta and the running statistics."""
    return State(
        *(
            _joined([(_vector(watched, name), watched.units, default) for watched in layers])
            for name, default in (("weight", 1.0), ("bias", 0.0), ("running_mean", np.nan), ("running_var", np.nan))
        )
    )


def rates(layers: Sequence[Watched], optimizer: torch.optim.Optimizer | None, norms: bool) -> Columns:
    """`lr` and, if `norms`, `weight_norm` of the weights that produce the units; NaN where they are not known."""
    by_parameter: dict[int, Any] = {}
    if optimizer is not None:
        by_parameter = {id(p): group.get("lr") for group in optimizer.param_groups for p in group["params"]}
    found: list[tuple[Tensor | None, int, float]] = []
    lrs = []
    for watched in layers:
        below = watched.producer
        found.append((below.unit_norms() if norms and below is not None else None, watched.units, np.nan))
        lr = None if below is None else by_parameter.get(id(below.weight))
        lrs.append(np.nan if lr is None else float(lr))
    return {"weight_norm": _joined(found), "lr": np.repeat(lrs, [watched.units for watched in layers])}


def sums(layers: Sequence[Watched], passes: Sequence[Sequence[Pass]]) -> Columns:
    """What the step's passes, a list for each layer, give."""
    counted = [_that_count(found) for found in passes]
    if all(len(found) == 1 and len(found[0].grads) == 1 for found in counted):
        return _of_single_passes(layers, [found[0] for found in counted])
    parts = [_of_layer(watched, found) for watched, found in zip(layers, counted, strict=True)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _that_count(passes: Sequence[Pass]) -> Sequence[Pass]:
    differentiated = [passed for passed in passes if passed.grads]
    return differentiated or passes


def _of_single_passes(layers: Sequence[Watched], passes: Sequence[Pass]) -> Columns:
    """The usual case, of all layers at once: one forward and one backward each."""
    sizes = [watched.units for watched in layers]

    def joined(pick: Callable[[Pass], Tensor | None]) -> Array:
        return _joined([(pick(passed), units, np.nan) for passed, units in zip(passes, sizes, strict=True)])

    count = np.repeat([float(passed.count) for passed in passes], sizes)
    eps = np.repeat([_eps(watched) for watched in layers], sizes)
    mean, var = joined(lambda passed: passed.mean), joined(lambda passed: passed.var)
    dgamma, dbeta = joined(lambda passed: passed.grads[0].dgamma), joined(lambda passed: passed.grads[0].dbeta)
    unknown = np.full(len(mean), np.nan)
    return {
        "count": count,
        "batches": np.ones(len(mean)),
        "mean": mean,
        "var": var,
        "dgamma": dgamma,
        "dbeta": dbeta,
        "energy": joined(lambda passed: passed.grads[0].energy),
        "diverted": _diverted(dgamma, dbeta, var, eps, count),
        "noise_mean": unknown,
        "noise_log_scale": unknown,
    }


def _of_layer(watched: Watched, passes: Sequence[Pass]) -> Columns:
    unknown = np.full(watched.units, np.nan)
    columns = dict.fromkeys(
        ("mean", "var", "dgamma", "dbeta", "energy", "diverted", "noise_mean", "noise_log_scale"), unknown
    )
    columns |= {"count": np.zeros(watched.units), "batches": np.full(watched.units, float(len(passes)))}
    if not passes:
        return columns
    means, variances = ([_f64(getattr(passed, name)) for passed in passes] for name in ("mean", "var"))
    counts = [int(passed.count) for passed in passes]
    parts = [Moments.of_variance(*part) for part in zip(counts, means, variances, strict=True)]
    pooled = parts[0].merge(*parts[1:])
    noise = q.batch_noise(means, variances, _eps(watched))
    columns |= {"count": np.full(watched.units, float(pooled.count)), "mean": pooled.mean, "var": pooled.var}
    columns |= {"noise_mean": noise.mean, "noise_log_scale": noise.log_scale}
    backwards = [
        (_f64(grads.dgamma), _f64(grads.dbeta), _f64(grads.energy), var, count)
        for passed, var, count in zip(passes, variances, counts, strict=True)
        for grads in passed.grads
    ]
    if backwards:
        dgammas, dbetas, energies, *_ = zip(*backwards, strict=True)
        diverted = [_diverted(dgamma, dbeta, var, _eps(watched), count) for dgamma, dbeta, _, var, count in backwards]
        found = {"dgamma": dgammas, "dbeta": dbetas, "energy": energies, "diverted": diverted}
        columns |= {name: np.sum(values, axis=0) for name, values in found.items()}
    return columns


def _diverted(dgamma: Array, dbeta: Array, var: Array, eps: float | Array, m: float | Array) -> Array:
    """`gradient_diverted` times Σg²: what can be added up over backwards."""
    ones = np.ones_like(dgamma)
    return q.gradient_diverted(dgamma, dbeta, ones, var, eps, m)


def _eps(watched: Watched) -> float:
    return float(watched.layer.__dict__["eps"])


def _vector(watched: Watched, name: str) -> Tensor | None:
    """None where the layer has none; empty where this process does not hold it whole."""
    layer = watched.layer
    found: Tensor | None = layer._parameters.get(name)
    if found is None:
        found = layer._buffers.get(name)
    return torch.empty(0) if found is not None and hasattr(found, "full_tensor") else found


def _joined(vectors: Sequence[tuple[Tensor | None, int, float]]) -> Array:
    """All units in a row, copied; a default stands for a vector that there is not. One transfer for each device."""
    found = [(vector.detach(), units) for vector, units, _ in vectors if vector is not None]
    devices = {vector.device for vector, _ in found}
    if len(found) == len(vectors) and len(devices) == 1 and all(vector.numel() == units for vector, units in found):
        return _f64(torch.cat([vector for vector, _ in found]))
    result = np.empty(sum(units for _, units, _ in vectors))
    elsewhere: dict[torch.device, list[tuple[slice, Tensor]]] = {}
    first = 0
    for vector, units, default in vectors:
        place = slice(first, first + units)
        first += units
        if vector is None or vector.numel() != units:  # not materialized, or a shard of it
            result[place] = default if vector is None else np.nan
        else:
            elsewhere.setdefault(vector.device, []).append((place, vector.detach()))
    for parts in elsewhere.values():
        together = _f64(torch.cat([vector.reshape(-1) for _, vector in parts]))
        read = 0
        for place, vector in parts:
            result[place] = together[read : read + vector.numel()]
            read += vector.numel()
    return result


def _f64(vector: Tensor | None) -> Array:
    assert vector is not None, "the sums of a tapped layer hold the energy"
    values: Array = vector.detach().cpu().to(torch.float64, copy=True).numpy()
    return values


def columns(state: State, sums: Mapping[str, Array], rates: Mapping[str, Array]) -> Columns:
    """All columns of a snapshot."""
    return {**state._asdict(), **sums, **rates}
