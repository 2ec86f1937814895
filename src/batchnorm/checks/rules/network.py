"""Rules on the layers of a network together: what one layer alone does not show."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from batchnorm.checks.findings import Finding, Kind, Observed
from batchnorm.checks.sources import Network
from batchnorm.words import plural

DEAD_BIAS = 1e-3
"""A bias below it has been left at 0: decayed or never used."""

BIAS = Kind(
    "bias-under-norm",
    "A bias right before a batch norm",
    "Where no activation stands between them, the mean takes the bias off again: it changes nothing and gets no "
    "gradient, but costs memory and a pass over it.",
    "There, build the layer below with bias=False; an existing bias can be subtracted from the running mean.",
)
IDENTICAL = Kind(
    "identical-statistics",
    "Layers with the same running statistics",
    "Two layers that see different inputs do not have the same mean and variance to the last digit: one tensor is "
    "shared, or was copied from one layer to the other.",
    "If the layers are not one on purpose, recalibrate the statistics.",
)
MIXED_EPS = Kind(
    "mixed-eps",
    "Layers with different eps",
    "Most networks use one eps: another one in a few layers is often left over from a conversion.",
    "Compare with the network's definition.",
)
NONE_LEFT = Kind(
    "no-norms",
    "No batch norm",
    "There are no running statistics in it.",
    "Nothing, if the norms were folded into the layers before them, or if there never were any.",
)

Across = Callable[[Network], Iterator[Finding]]


def bias_under_norm(network: Network) -> Iterator[Finding]:
    """By the order in which the tensors are kept: a bias right before a norm, of as many units."""
    for layer in network.layers:
        below = layer.settings.get("below")
        if below is None:
            continue
        name, largest = below
        state = "at 0" if largest < DEAD_BIAS else f"up to {largest:.2g}"
        yield Finding(BIAS, "note", layer.name, f"{name} stands right before it, {state}", largest)


def identical_statistics(network: Network) -> Iterator[Finding]:
    """Equal in every unit, and not at their start. Copies of a model in one file are not held against each other."""
    first: dict[tuple[str, bytes, bytes], str] = {}
    for layer in network.layers:
        mean, var = layer["running_mean"], layer["running_var"]
        if layer.units < 2 or not (np.isfinite(mean).all() and np.isfinite(var).all()) or _constant(layer):
            continue
        key = (str(layer.settings.get("copy", "")), mean.tobytes(), var.tobytes())
        if key in first:
            text = f"running mean and variance equal to the last digit to those of {first[key]}"
            yield Finding(IDENTICAL, "warning", layer.name, text, float(layer.units))
        first.setdefault(key, layer.name)


def mixed_eps(network: Network) -> Iterator[Finding]:
    """Where each layer says its eps: those that differ from the commonest."""
    known = [layer for layer in network.layers if layer.settings.get("eps_known")]
    values = [float(layer.settings["eps"]) for layer in known]
    if len({float(np.float32(value)) for value in values}) < 2:
        return
    common = max(dict.fromkeys(values), key=values.count)
    for layer, eps in zip(known, values, strict=True):
        if np.float32(eps) != np.float32(common):
            yield Finding(MIXED_EPS, "note", layer.name, f"eps {eps:g}, others have {common:g}", eps)


def no_norms(network: Network) -> Iterator[Finding]:
    """Of a network without any."""
    if not network.layers:
        biases = plural(network.biases, "is a bias", "are biases")
        text = f"none among {plural(network.tensors, 'tensor')}, of which {biases}"
        yield Finding(NONE_LEFT, "note", "", text, float(network.biases))


RULES: tuple[Across, ...] = (bias_under_norm, identical_statistics, mixed_eps, no_norms)


def _constant(layer: Observed) -> bool:
    """All units alike: their start, or a constant that somebody set."""
    return bool(np.ptp(layer["running_mean"]) == 0 and np.ptp(layer["running_var"]) == 0)
