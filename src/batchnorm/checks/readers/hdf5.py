"""HDF5 and Keras files, by h5py. Norms are found by the network's configuration, else by names.

Keras 2 names every tensor, as "bn1/bn1/moving_mean:0". Keras 3 numbers those of a layer, as
"layers/batch_normalization/vars/2", in the order gamma, beta, moving mean, moving variance; which of them there are,
only the configuration says, and the layer's name stands beside them since Keras 3.4.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.checks.layers import ROLES, in_network_order
from batchnorm.checks.readers.directory import MAX_TENSORS, Directory, RefusedError, UnreadError
from batchnorm.frameworks import FRAMEWORKS

KERAS = FRAMEWORKS["Keras"]
MAX_OBJECTS = 2**18
"""Groups and datasets looked at."""
MAX_CONFIG = 2**25
"""Bytes of a network's configuration in JSON."""
NORMS = ("BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2", "SyncBatchNormalization")
COUNTED = r"(?:sync_)?batch_normalization(?:_\d{1,9})?"
"""How Keras names layers that the user did not name."""
CONTAINERS = ("model_weights", "optimizer_weights")
"""The top groups of a whole model's file."""

Config = Mapping[str, Any]


def read(path: Path, found: Directory) -> None:
    """Add an HDF5 file: its datasets by path, and the norms that Keras' configuration or names show."""
    _read(path, None, found)


def read_keras(path: Path, found: Directory) -> None:
    """Add a .keras archive: a configuration, and an HDF5 file of weights."""
    with zipfile.ZipFile(path) as archive:
        has_config = "config.json" in archive.namelist()
        config = json.loads(archive.open("config.json").read(MAX_CONFIG)) if has_config else None
        with archive.open("model.weights.h5") as packed:
            shutil.copyfileobj(packed, found.scratch)
        _read(found.scratch, config, found)


def _read(source: Any, config: Any, found: Directory) -> None:
    import h5py

    with h5py.File(source, "r") as file:
        datasets = _datasets(file, h5py)
        if config is None and "model_config" in file.attrs:
            config = json.loads(_text(file.attrs["model_config"]) or "null")
        positions: dict[str, int] = {}
        for path, dataset in datasets.items():
            top, _, rest = path.partition("/")
            parts = (top, rest) if rest and top in CONTAINERS else (path,)
            positions[path] = found.tensor(parts, dataset.shape, _dtype(dataset), partial(_values, dataset))
        groups: dict[str, dict[str, str]] = {}
        for path in datasets:
            group, _, leaf = path.rpartition("/")
            groups.setdefault(group, {})[leaf.removesuffix(":0")] = path
        owners = {group: _text(file[group].attrs.get("name")) for group in groups if group.endswith("/vars")}
        shapes = {path: dataset.shape for path, dataset in datasets.items()}
        for name, tensors, settings in _norms(groups, shapes, owners, _configs(config)):
            found.norm(name, {role: positions[path] for role, path in tensors.items()}, "Keras", settings)


def _datasets(file: Any, h5py: Any) -> dict[str, Any]:
    """Every dataset of numbers by path, in the network's order where Keras or numbers in names show it.

    Links out of the file, and to where one is already, are not followed.
    """
    found: dict[str, Any] = {}
    rank: dict[str, int] = {}
    looked = 0

    def look(path: str, entry: Any) -> None:
        nonlocal looked
        looked += 1
        if looked > MAX_OBJECTS or len(found) > MAX_TENSORS:
            raise RefusedError("the HDF5 file has too many groups or tensors")
        if isinstance(entry, h5py.Dataset) and entry.shape is not None and _dtype(entry):
            found[path] = entry
        for name in _listed(entry) if isinstance(entry, h5py.Group) else ():
            for end in _ends(whole := f"{path}/{name}".strip("/")):
                rank.setdefault(whole[:end], len(rank))

    look("", file)
    file.visititems(look)
    if rank:
        ranks = {path: [rank.get(path[:end], len(rank)) for end in _ends(path)] for path in found}
        found = {path: found[path] for path in sorted(found, key=ranks.__getitem__)}
    ordered = in_network_order({(path,): dataset for path, dataset in found.items()}, lambda one: _dtype(one))
    return {path: dataset for (path,), dataset in ordered.items()}


def _ends(path: str) -> list[int]:
    """Where the parts of a path end."""
    return [at for at, letter in enumerate(path) if letter == "/"] + [len(path)]


def _listed(group: Any) -> list[str]:
    """What Keras says lies in a group, in the network's order; in pieces where the list is long."""
    keys = [f"{what}{at}" for what in ("layer_names", "weight_names") for at in ("", *range(64))]
    lists = (group.attrs[key] for key in keys if key in group.attrs)
    return [_text(name) for names in lists if getattr(names, "ndim", 0) == 1 for name in names.tolist()]


def _dtype(dataset: Any) -> str:
    """The type of its numbers; empty where it holds none."""
    dtype = dataset.dtype
    if dtype.kind == "V" and dtype.itemsize == 2 and _text(dataset.attrs.get("dtype")) == "bfloat16":
        return "bfloat16"
    return str(dtype.newbyteorder("=").name) if dtype.kind in "fiub" else ""


def _values(dataset: Any) -> Any:
    if dataset.external or dataset.is_virtual:
        raise UnreadError("its numbers lie in another file")
    raw = np.asarray(dataset[()])
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32) if raw.dtype.kind == "V" else raw


def _text(value: Any) -> str:
    """A string attribute, and the empty string for anything else."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _configs(config: Any) -> list[Config]:
    """The configurations of the batch norm layers in a network's, in their order, in networks inside it too."""
    found, waiting = [], [config]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict):
            if entry.get("class_name") in NORMS and isinstance(entry.get("config"), dict):
                found.append(entry["config"])
            waiting += reversed(entry.values())
        elif isinstance(entry, list):
            waiting += reversed(entry)
    return found


def _norms(
    groups: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    owners: Mapping[str, str],
    configs: Sequence[Config],
) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """Name, paths of tensors by role, and settings of each layer, in the configuration's order, else the tensors'.

    Args:
        groups: the paths of tensors, by group and name.
        shapes: of the tensors, by path.
        owners: the layer's name per group of numbered tensors, if the file has it.
        configs: of the batch norm layers in the configuration; empty without one.
    """
    owners = _in_order(groups, owners, configs) | {group: name for group, name in owners.items() if name}
    known: dict[str, list[tuple[int, Config]]] = {}
    for at, config in enumerate(configs):
        known.setdefault(str(config.get("name")), []).append((at, config))
    found = []
    for group, leaves in groups.items():
        layer = group.removesuffix("/vars")
        if layer == group and not {"moving_mean", "moving_variance"} <= set(leaves):
            continue
        name = owners.get(group, "") or layer.rpartition("/")[2]
        # Keras 2 may number a group inside the layer's: batch_normalization_1/batch_normalization_1_1.
        name = next((part for part in (name, *reversed(group.split("/"))) if known.get(part)), name)
        at, its_config = known[name].pop(0) if known.get(name) else (len(configs), None)
        roles = ROLES["Keras"]
        if layer != group:
            roles = _roles(layer, {leaf: shapes[path] for leaf, path in leaves.items()}, its_config, bool(configs))
        if tensors := {role: leaves[leaf] for leaf, role in roles.items() if leaf in leaves}:
            found.append((at, (name or "batch_normalization", tensors, _settings(its_config))))
    return [layer for _, layer in sorted(found, key=lambda entry: entry[0])]


def _in_order(groups: Mapping[str, Any], owners: Mapping[str, str], configs: Sequence[Config]) -> dict[str, str]:
    """The names of layers that are only counted, which come in the network's order in each container of layers."""
    layers = [group.removesuffix("/vars") for group in groups if group.endswith("/vars") and not owners.get(group)]
    layers = [layer for layer in layers if re.fullmatch(COUNTED, layer.rpartition("/")[2])]
    if len(layers) != len(configs) or len({layer.rpartition("/")[0] for layer in layers}) != 1:
        return {}
    return {f"{layer}/vars": str(config.get("name")) for layer, config in zip(layers, configs, strict=True)}


def _roles(
    layer: str, leaves: Mapping[str, tuple[int, ...]], config: Config | None, is_configured: bool
) -> dict[str, str]:
    """What the numbers of a layer's tensors mean; empty where it is no norm. What nothing decides is left out."""
    order: list[str] = []
    if len({*leaves.values()}) != 1 or len(next(iter(leaves.values()))) != 1 or "optimizer" in layer.split("/"):
        return {}
    if config is not None:
        order = ["gamma"] * bool(config.get("scale", True)) + ["beta"] * bool(config.get("center", True))
        order += ["running_mean", "running_var"]
    elif re.match(COUNTED, layer.rpartition("/")[2]) or (not is_configured and len(leaves) == 4):
        parameters = {4: ["gamma", "beta"], 3: [""], 2: []}.get(len(leaves))
        order = [] if parameters is None else [*parameters, "running_mean", "running_var"]
    if set(leaves) != {str(at) for at in range(len(order))}:
        return {}
    return {str(at): role for at, role in enumerate(order) if role}


def _settings(config: Config | None) -> dict[str, Any]:
    """What a layer's configuration says, in PyTorch's terms."""
    given = {} if config is None else {"epsilon": KERAS.eps, "momentum": KERAS.momentum} | {**config}
    usable = {key: one for key, one in given.items() if type(one) in (int, float) and abs(one) < 1e300}
    usable = {key: one for key, one in usable.items() if math.isfinite(one)}
    found = {"eps": float(usable["epsilon"])} if "epsilon" in usable else {}
    return found | ({"momentum": float(f"{1 - usable['momentum']:.12g}")} if "momentum" in usable else {})
