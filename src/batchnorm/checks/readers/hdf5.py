"""HDF5 and Keras files, by h5py. Norms are found by the network's configuration, else by names.

Keras 2 names every tensor, as "bn1/bn1/moving_mean:0". Keras 3 numbers those of a layer, as
"layers/batch_normalization/vars/2", in the order gamma, beta, moving mean, moving variance; which of them there are,
only the configuration says, and the layer's name stands beside them since Keras 3.4.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.checks.layers import ROLES, in_network_order
from batchnorm.checks.readers.directory import Directory, RefusedError
from batchnorm.frameworks import FRAMEWORKS

NORMS = ("BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2", "SyncBatchNormalization")
COUNTED = re.compile(r"(.*/)?(?:sync_)?batch_normalization(?:_\d{1,9})?/vars")
"""How Keras names layers that the user did not name."""
KERAS = FRAMEWORKS["Keras"]
Config = Mapping[str, Any]


def read(path: Path, found: Directory) -> None:
    """Add an HDF5 file, or a .keras archive of a configuration and an HDF5 file of weights."""
    import h5py

    source: Any = path
    text, configs, groups = b"", list[Config](), dict[str, dict[str, int]]()

    def look(entry: dict[str, Any]) -> Config:
        if entry.get("class_name") in NORMS and isinstance(entry.get("config"), dict):
            configs.append(entry["config"])
        return entry

    if found.format == "Keras":
        with zipfile.ZipFile(path) as archive:
            text = archive.read("config.json") if "config.json" in archive.namelist() else b""
            source = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(source, "r") as file:
        for name, dataset in _datasets(file, h5py).items():
            top, _, rest = name.partition("/")
            keys = (top, rest) if rest and top in ("model_weights", "optimizer_weights") else (name,)
            group, _, leaf = name.rpartition("/")
            position = found.tensor(keys, dataset.shape, _dtype(dataset), partial(_values, dataset))
            groups.setdefault(group, {})[leaf.removesuffix(":0")] = position
        json.loads(text or _text(file.attrs.get("model_config")) or "null", object_hook=look)
        owners = {group: _text(file[group].attrs.get("name")) for group in groups if group.endswith("/vars")}
    _add_norms(found, groups, owners, configs)


def _datasets(file: Any, h5py: Any) -> dict[str, Any]:
    """Every dataset of numbers by path, in the order that Keras lists, and where it does not, of numbers in names.

    Links out of the file, and to where one is already, are not followed.
    """
    found: dict[tuple[str, ...], Any] = {}
    rank: dict[str, int] = {}

    def look(path: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset):
            if entry.shape is not None and _dtype(entry):
                found[path,] = entry
            return
        for key in sorted(entry.attrs, key=lambda key: (len(key), key)):  # long lists are in numbered pieces
            for name in np.ravel(entry.attrs[key]).tolist() if re.match("(layer|weight)_names", key) else ():
                rank.setdefault(f"{path}/{_text(name)}".strip("/"), len(rank))

    def ranks(path: str) -> list[int]:
        return [rank[part] for part in accumulate(path.split("/"), "{}/{}".format) if part in rank]

    look("", file)
    file.visititems(look)
    ordered = {path: dataset for (path,), dataset in in_network_order(found, lambda _: "").items()}
    return {path: ordered[path] for path in sorted(ordered, key=ranks)}


def _dtype(dataset: Any) -> str:
    """The type of its numbers; empty where it holds none."""
    dtype = dataset.dtype
    if dtype.kind == "V" and dtype.itemsize == 2 and _text(dataset.attrs.get("dtype")) == "bfloat16":
        return "bfloat16"
    return str(dtype.newbyteorder("=").name) if dtype.kind in "fiub" else ""


def _values(dataset: Any) -> Any:
    if dataset.external or dataset.is_virtual:
        raise RefusedError("its numbers lie in another file")
    raw = np.asarray(dataset[()])
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32) if raw.dtype.kind == "V" else raw


def _text(value: Any) -> str:
    """A string attribute, and the empty string for anything else."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _add_norms(
    found: Directory, groups: Mapping[str, Mapping[str, int]], owners: dict[str, str], configs: Sequence[Config]
) -> None:
    """Add each layer, in the configuration's order, else the tensors'.

    `groups` has the positions of tensors by group and name, `owners` the layer's name of each group of numbered ones.
    """
    counted = {group: match[1] for group in owners if not owners[group] and (match := COUNTED.fullmatch(group))}
    if len(counted) == len(configs) and len({*counted.values()}) == 1:  # they come in the network's order
        owners |= zip(counted, (str(one.get("name")) for one in configs), strict=True)
    known: dict[str, list[int]] = {}
    for at, one in enumerate(configs):
        known.setdefault(str(one.get("name")), []).append(at)
    layers = []
    for group, leaves in groups.items():
        if group not in owners and not {"moving_mean", "moving_variance"} <= set(leaves):
            continue
        # Keras 2 may number a group inside the layer's: batch_normalization_1/batch_normalization_1_1.
        names = [name for name in (owners.get(group), *reversed(group.removesuffix("/vars").split("/"))) if name]
        name = next((name for name in names if known.get(name)), (names or ["batch_normalization"])[0])
        at = known[name].pop(0) if known.get(name) else len(configs)
        config = configs[at] if at < len(configs) else None
        roles = ROLES["Keras"]
        if group in owners:
            shapes = {tuple(found.tensors[position]["shape"]) for position in leaves.values()}
            are_alike = len(shapes) == 1 and len(shapes.pop()) == 1 and "optimizer" not in group.split("/")
            roles = _roles(group, set(leaves), config, bool(configs)) if are_alike else {}
        if tensors := {role: leaves[leaf] for leaf, role in roles.items() if leaf in leaves}:
            layers.append((at, (name, tensors, "Keras", _settings(config))))
    found.norms += [layer for _, layer in sorted(layers, key=lambda layer: layer[0])]


def _roles(group: str, leaves: set[str], config: Config | None, is_configured: bool) -> dict[str, str]:
    """What the numbers of a layer's tensors mean; empty where it is no norm. What nothing decides is left out."""
    if config is not None:
        order = ["gamma"] * bool(config.get("scale", True)) + ["beta"] * bool(config.get("center", True))
    elif COUNTED.fullmatch(group) or (len(leaves) == 4 and not is_configured):
        order = {4: ["gamma", "beta"], 3: [""]}.get(len(leaves), [])
    else:
        return {}
    numbered = {str(at): role for at, role in enumerate([*order, "running_mean", "running_var"])}
    return {leaf: role for leaf, role in numbered.items() if role and leaves == set(numbered)}


def _settings(config: Config | None) -> dict[str, Any]:
    """What a layer's configuration says, in PyTorch's terms."""
    given = {} if config is None else {"epsilon": KERAS.eps, "momentum": KERAS.momentum} | {**config}
    usable = {key: one for key, one in given.items() if type(one) in (int, float) and abs(one) < 1e300}
    found = {"eps": float(usable["epsilon"])} if "epsilon" in usable else {}
    return found | ({"momentum": float(f"{1 - usable['momentum']:.12g}")} if "momentum" in usable else {})
