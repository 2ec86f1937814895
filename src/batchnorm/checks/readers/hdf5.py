"""HDF5 and Keras files, read by h5py. Norms are found by the network's configuration, else by names.

Keras 2 names every tensor, as "bn1/bn1/moving_mean:0". Keras 3 numbers those of a layer, as
"layers/batch_normalization/vars/2", in the order gamma, beta, moving mean, moving variance; which of them there are,
only the configuration says, and the layer's name stands beside them since Keras 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchnorm.checks.layers import EPS, ROLES, Place, in_network_order
from batchnorm.checks.readers._parsing.archive import Archive
from batchnorm.checks.readers._parsing.files import File, well_formed
from batchnorm.checks.readers._parsing.process import Job
from batchnorm.checks.readers._parsing.stored import Checkpoint, Stored

CLASSES = ("batch_normalization", "sync_batch_normalization")
MOMENTUM = 0.99
"""Keras' default."""

Config = Mapping[str, Any]


def norms(
    tensors: Mapping[str, Stored], owners: Mapping[str, str], configs: Sequence[Config]
) -> Iterator[Place[Stored]]:
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
    found: list[tuple[int, Place[Stored]]] = []
    positions = {id(config): at for at, config in enumerate(configs)}
    for group, leaves in groups.items():
        numbered = group.rpartition("/")[2] == "vars"
        name = owners.get(group, "") or _last(group.removesuffix("/vars") if numbered else group)
        if not numbered and not {"moving_mean", "moving_variance"} <= set(leaves):
            continue
        # Keras 2 may number a group inside the layer's: batch_normalization_1/batch_normalization_1_1.
        name = next((part for part in (name, *reversed(group.split("/"))) if known.get(part)), name)
        its = known[name].pop(0) if known.get(name) else None
        roles = _roles(group, leaves, its, bool(configs)) if numbered else ROLES["Keras"]
        places = {role: leaves[leaf] for leaf, role in roles.items() if leaf in leaves}
        if places:
            norm = Place(well_formed(name or CLASSES[0]), "", places, "Keras", _settings(its))
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
        order += ["running_mean", "running_var"]
    elif _last(group.removesuffix("/vars")).startswith(CLASSES) or (not told and len(leaves) == 4):
        parameters = {4: ["gamma", "beta"], 3: [""], 2: []}.get(len(leaves))
        order = [] if parameters is None else [*parameters, "running_mean", "running_var"]
    if set(leaves) != {str(at) for at in range(len(order))}:
        return {}
    return {str(at): role for at, role in enumerate(order) if role}


def _settings(config: Config | None) -> dict[str, Any]:
    """What a layer's configuration says, in PyTorch's terms."""
    found: dict[str, Any] = {}
    if config is not None:
        eps, momentum = config.get("epsilon", EPS["Keras"]), config.get("momentum", MOMENTUM)
        if _finite(eps):
            found["eps"] = float(eps)
        if _finite(momentum):
            found["momentum"] = float(f"{1 - momentum:.12g}")
    return found


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


MARK = b"\x89HDF\r\n\x1a\n"
MARKED = (0, 512, 1024, 2048)
"""Where a file may begin: behind a block of the user's."""
KERAS_WEIGHTS, KERAS_CONFIG = "model.weights.h5", "config.json"

Part = tuple[int, int, int, int] | None
"""Of a file: offset, bytes as packed and unpacked, and the method."""


def looks_like(file: File) -> bool:
    """Whether it is an HDF5 file."""
    return any(file.size >= at + 8 and file.read(at, 8) == MARK for at in MARKED)


def read_file(path: Path, file: File) -> Checkpoint:
    """An HDF5 file: its datasets by path, and the norms that Keras' configuration or names tell of."""
    return _read(path, "HDF5", file)


def read_keras(path: Path, file: File, archive: Archive) -> Checkpoint:
    """A .keras archive: a configuration, and an HDF5 file of weights."""
    config = _part(archive, KERAS_CONFIG) if KERAS_CONFIG in archive.entries else None
    return _read(path, "Keras", file, _part(archive, KERAS_WEIGHTS), config)


def _read(path: Path, name: str, file: File, weights: Part = None, config: Part = None) -> Checkpoint:
    job = Job("HDF5", "h5py", "hdf5", file, {"weights": weights, "config": config})
    tensors: dict[str, Stored] = {}
    owners: dict[str, str] = {}
    configs: list[dict[str, Any]] = []
    try:
        for record in job.run():
            if "layer" in record:
                configs.append(dict(record["layer"]))
            elif "group" in record:
                owners |= {record["group"]: record["owner"]} if record["owner"] else {}
            else:
                tensors[record["tensor"]] = job.tensor(record, record["tensor"])
        paths: dict[tuple[str, ...], Stored] = {(tensor,): stored for tensor, stored in tensors.items()}
        tensors = {path[-1]: stored for path, stored in in_network_order(paths, lambda stored: stored.dtype).items()}
        found = tuple(norms(tensors, owners, configs))
    except (AttributeError, KeyError, TypeError, ValueError):  # not what it prints: the library has written over it
        raise job.damaged from None
    return Checkpoint(
        path, name, {_path(well_formed(tensor)): stored for tensor, stored in tensors.items()}, found, file.size
    )


def _path(dataset: str) -> tuple[str, ...]:
    """In the file of a whole model the weights are one container, and the optimizer's another."""
    top, _, rest = dataset.partition("/")
    return (top, rest) if rest and top in ("model_weights", "optimizer_weights") else (dataset,)


def _part(archive: Archive, name: str) -> Part:
    entry = archive.entries[name]
    archive.open(name)  # all its bytes are there
    return archive.start(name), entry.packed, entry.size, entry.method
