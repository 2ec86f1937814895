"""Pair the batch norm layers of two networks: by name, then by equal values, then by shape and order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from batchnorm.checks.findings import Array, LayerData

INITIAL = {"gamma": 1.0, "beta": 0.0, "running_mean": 0.0, "running_var": 1.0}
"""The vectors of a layer and their initial values, which a vector has that a layer lacks."""

Pair = tuple[LayerData | None, LayerData | None]
"""A layer of each network; None where the other network has no such layer."""

LONGEST = 200
"""The most layers of one shape whose values decide about the order: the table of all pairs grows with the square."""


def vector(layer: LayerData, role: str) -> Array:
    """A vector of a layer, or its initial values where the layer lacks it."""
    return layer.arrays[role][-1] if role in layer.arrays else np.full(layer.units, INITIAL[role])


def fingerprint(layer: LayerData) -> bytes | None:
    """Equal for layers with equal vectors in float32; None where all units are alike, as in a new layer."""
    vectors = [vector(layer, role).astype(np.float32) for role in INITIAL]
    if not layer.units or all(bool((values == values[0]).all()) for values in vectors):
        return None
    return b"".join(values.tobytes() for values in vectors)


def align(a: Sequence[LayerData], b: Sequence[LayerData]) -> list[Pair]:
    """Every layer of `a` with its layer of `b`, in the order of `a`, then the layers that only `b` has.

    Layers of one name are one layer. Of the others, those with equal values are, in any order: file formats sort, and
    values are certain. The rest is paired by shape, in order; if one network has more layers of a shape, those stay
    alone whose values are the farthest.
    """
    names = {layer.name: layer for layer in b}
    partner = {layer.name: names[layer.name] for layer in a if layer.name in names}
    left = [layer for layer in a if layer.name not in partner]
    right = [layer for layer in b if layer.name not in partner]

    by_values: dict[bytes, list[LayerData]] = {}
    for layer in right:
        if (key := fingerprint(layer)) is not None:
            by_values.setdefault(key, []).append(layer)
    for layer in left:
        if found := by_values.get(fingerprint(layer) or b""):
            partner[layer.name] = found.pop(0)

    taken = {layer.name for layer in partner.values()}
    left = [layer for layer in left if layer.name not in partner]
    right = [layer for layer in right if layer.name not in taken]
    of_shape = [_by_units(side) for side in (left, right)]
    for units, layers in of_shape[0].items():
        partner |= {first.name: second for first, second in _in_order(layers, of_shape[1].get(units, []))}

    taken = {layer.name for layer in partner.values()}
    return [(layer, partner.get(layer.name)) for layer in a] + [(None, layer) for layer in b if layer.name not in taken]


def _by_units(layers: Sequence[LayerData]) -> dict[int, list[LayerData]]:
    groups: dict[int, list[LayerData]] = {}
    for layer in layers:
        groups.setdefault(layer.units, []).append(layer)
    return groups


def _in_order(a: Sequence[LayerData], b: Sequence[LayerData]) -> list[tuple[LayerData, LayerData]]:
    """Pairs of layers in both orders, as many as possible, with the smallest sum of distances."""
    if len(a) == len(b) or not a or not b or max(len(a), len(b)) > LONGEST:
        return list(zip(a, b, strict=False))
    cost = np.zeros((len(a) + 1, len(b) + 1))
    cost[:, 0], cost[0, :] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    near = np.array([[_distance(one, other) for other in b] for one in a])
    for i, j in product(range(1, len(a) + 1), range(1, len(b) + 1)):
        cost[i, j] = min(cost[i - 1, j - 1] + near[i - 1, j - 1], cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    pairs, i, j = [], len(a), len(b)
    while i and j:
        if cost[i, j] == cost[i - 1, j - 1] + near[i - 1, j - 1]:
            i, j = i - 1, j - 1
            pairs.append((a[i], b[j]))
        elif cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _distance(a: LayerData, b: LayerData) -> float:
    """How far the values of two layers of one shape are apart, from 0 to 1."""
    with np.errstate(all="ignore"):
        parts = [vector(b, role) - vector(a, role) for role in INITIAL]
        size = [np.mean(vector(a, role) ** 2) + np.mean(vector(b, role) ** 2) for role in INITIAL]
        distance = sum(float(np.mean(part**2) / (one or 1.0)) for part, one in zip(parts, size, strict=True))
    return distance / (1 + distance) if np.isfinite(distance) else 1.0
