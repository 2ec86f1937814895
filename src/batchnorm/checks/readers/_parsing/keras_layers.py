"""Which tensors of a Keras file are a batch norm layer's: by the network's configuration, else by their names.

Keras 2 names every tensor, as "bn1/bn1/moving_mean:0". Keras 3 numbers those of a layer, as
"layers/batch_normalization/vars/2", in the order gamma, beta, moving mean, moving variance; which of them there are,
only the configuration says, and the layer's name stands beside them since Keras 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batchnorm.checks.readers._parsing.files import well_formed
from batchnorm.checks.readers._parsing.stored import NormPlaces, Stored

ROLES = {"gamma": "gamma", "beta": "beta", "moving_mean": "mean", "moving_variance": "var"}
CLASSES = ("batch_normalization", "sync_batch_normalization")
EPS, MOMENTUM = 1e-3, 0.99
"""Keras' defaults."""

Config = Mapping[str, Any]


def norms(tensors: Mapping[str, Stored], owners: Mapping[str, str], configs: Sequence[Config]) -> Iterator[NormPlaces]:
    """The layers among tensors by path, in the configuration's order; without one, in that of the tensors.

    Args:
        tensors: by their path in the file.
        owners: of groups of numbered tensors, the name of their layer where the file tells it.
        configs: of the batch norm layers that the configuration knows, in its order; empty where there is none.
    """
    groups: dict[str, dict[str, Stored]] = {}
    for path, stored in tensors.items():
        group, _, leaf = path.rpartition("/")
        groups.setdefault(group, {})[leaf.removesuffix(":0")] = stored
    owners = {**_in_order(groups, owners, configs), **owners}
    known: dict[str, list[Config]] = {}
    for config in configs:
        known.setdefault(str(config.get("name")), []).append(config)
    found: list[tuple[int, NormPlaces]] = []
    positions = {id(config): at for at, config in enumerate(configs)}
    for group, leaves in groups.items():
        numbered = group.rpartition("/")[2] == "vars"
        name = owners.get(group, "") or _last(group.removesuffix("/vars") if numbered else group)
        if not numbered and not {"moving_mean", "moving_variance"} <= set(leaves):
            continue
        its = known[name].pop(0) if known.get(name) else None
        roles = _roles(group, leaves, its, bool(configs)) if numbered else ROLES
        places = {role: leaves[leaf] for leaf, role in roles.items() if leaf in leaves}
        if places:
            norm = NormPlaces(well_formed(name or CLASSES[0]), **places, settings=_settings(its))
            found.append((positions.get(id(its), len(configs)), norm))
    yield from (norm for _, norm in sorted(found, key=lambda pair: pair[0]))


def _in_order(groups: Mapping[str, Any], owners: Mapping[str, str], configs: Sequence[Config]) -> dict[str, str]:
    """The names of layers that are only counted: "batch_normalization", "batch_normalization_1" and so on.

    They are counted in each container of layers for itself, so that the order is clear only where there is one.
    """
    counted = {group: _count(group.removesuffix("/vars")) for group in groups if group.endswith("/vars")}
    places = sorted((count, group) for group, count in counted.items() if count is not None and group not in owners)
    containers = {group.removesuffix("/vars").rpartition("/")[0] for _, group in places}
    if len(containers) != 1 or len(places) != len(configs):
        return {}
    return {group: str(config.get("name")) for (_, group), config in zip(places, configs, strict=True)}


def _count(path: str) -> int | None:
    name, number = _last(path), ""
    if name not in CLASSES:
        name, _, number = name.rpartition("_")
    if name not in CLASSES or not (number.isdecimal() or not number) or len(number) > 9:
        return None
    return int(number or 0)


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _roles(group: str, leaves: Mapping[str, Stored], config: Config | None, told: bool) -> dict[str, str]:
    """What the numbers of a layer's tensors mean; nothing where it is no norm. What nobody can know is left out."""
    shapes = {stored.shape for stored in leaves.values()}
    order: list[str] = []
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or "optimizer" in group.split("/"):
        return {}
    if config is not None:
        order = ["gamma"] * bool(config.get("scale", True)) + ["beta"] * bool(config.get("center", True))
        order += ["mean", "var"]
    elif _last(group.removesuffix("/vars")).startswith(CLASSES) or (not told and len(leaves) == 4):
        parameters = {4: ["gamma", "beta"], 3: [""], 2: []}.get(len(leaves))
        order = [] if parameters is None else [*parameters, "mean", "var"]
    if set(leaves) != {str(at) for at in range(len(order))}:
        return {}
    return {str(at): role for at, role in enumerate(order) if role}


def _settings(config: Config | None) -> dict[str, Any]:
    """What a layer's configuration says, in PyTorch's terms."""
    found: dict[str, Any] = {"framework": "Keras"}
    if config is not None:
        eps, momentum = config.get("epsilon", EPS), config.get("momentum", MOMENTUM)
        if _finite(eps):
            found["eps"] = float(eps)
        if _finite(momentum):
            found["momentum"] = float(f"{1 - momentum:.12g}")
    return found


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
