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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.checks.layers import ROLES, in_network_order
from batchnorm.checks.readers.directory import Directory, RefusedError
from batchnorm.frameworks import FRAMEWORKS

NORM = re.compile(r"(Sync)?BatchNormalization(V\d)?")
COUNTED = re.compile(r"(.*/)?(?:sync_)?batch_normalization(?:_\d{1,9})?/vars")
"""How Keras names layers that the user did not name."""
KERAS = FRAMEWORKS["Keras"]
Config = Mapping[str, Any]


def read(path: Path, found: Directory) -> None:
    """Add an HDF5 file, or a .keras archive of a configuration and an HDF5 file of weights."""
    import h5py

    source: Any = path
    text: str | bytes = ""
    if found.format == "Keras":
        with zipfile.ZipFile(path) as archive:
            text = archive.read("config.json") if "config.json" in archive.namelist() else b""
            source = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(source, "r") as file:
        groups: dict[str, dict[str, int]] = {}
        for name, dataset in _datasets(file, h5py).items():
            top, _, rest = name.partition("/")
            keys = (top, rest) if rest and top in ("model_weights", "optimizer_weights") else (name,)
            group, _, leaf = name.rpartition("/")
            position = found.tensor(keys, dataset.shape, _dtype(dataset), partial(_values, dataset))
            groups.setdefault(group, {})[leaf.removesuffix(":0")] = position
        configs = _configs(text or _text(file.attrs.get("model_config")))
        owners = {group: _text(file[group].attrs.get("name")) for group in groups if group.endswith("/vars")}
    shapes = [tuple(record["shape"]) for record in found.tensors]
    found.norms += [norm for _, norm in sorted(_norms(groups, shapes, owners, configs), key=lambda entry: entry[0])]


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


def _configs(text: str | bytes) -> list[Config]:
    """The configurations of the batch norm layers in a network's, in their order, in networks inside it too."""
    found: list[Config] = []

    def look(entry: dict[str, Any]) -> Config:
        if NORM.fullmatch(str(entry.get("class_name"))) and isinstance(entry.get("config"), dict):
            found.append(entry["config"])
        return entry

    json.loads(text or "null", object_hook=look)
    return found


def _norms(
    groups: Mapping[str, Mapping[str, int]],
    shapes: Sequence[tuple[int, ...]],
    owners: dict[str, str],
    configs: Sequence[Config],
) -> Iterator[tuple[int, tuple[str, dict[str, int], str, dict[str, Any]]]]:
    """Each layer, and its place in the configuration.

    Args:
        groups: the positions of tensors, by group and name.
        shapes: of the tensors, by position.
        owners: the layer's name per group of numbered tensors, "" if the file does not have it.
        configs: of the batch norm layers in the configuration; empty without one.
    """
    counted = {group: match[1] for group in owners if not owners[group] and (match := COUNTED.fullmatch(group))}
    if len(counted) == len(configs) and len({*counted.values()}) == 1:  # they come in the network's order
        owners |= zip(counted, (str(config.get("name")) for config in configs), strict=True)
    known: dict[str, list[int]] = {}
    for at, config in enumerate(configs):
        known.setdefault(str(config.get("name")), []).append(at)
    for group, leaves in groups.items():
        roles = ROLES["Keras"]
        if group not in owners and not {"moving_mean", "moving_variance"} <= set(leaves):
            continue
        # Keras 2 may number a group inside the layer's: batch_normalization_1/batch_normalization_1_1.
        names = [name for name in (owners.get(group), *reversed(group.removesuffix("/vars").split("/"))) if name]
        name = next((name for name in names if known.get(name)), (names or ["batch_normalization"])[0])
        at = known[name].pop(0) if known.get(name) else len(configs)
        its_config = configs[at] if at < len(configs) else None
        if group in owners:
            roles = _roles(
                group, {leaf: shapes[position] for leaf, position in leaves.items()}, its_config, not configs
            )
        if tensors := {role: leaves[leaf] for leaf, role in roles.items() if leaf in leaves}:
            yield at, (name, tensors, "Keras", {} if its_config is None else _settings(its_config))


def _roles(
    group: str, leaves: Mapping[str, tuple[int, ...]], config: Config | None, is_unconfigured: bool
) -> dict[str, str]:
    """What the numbers of a layer's tensors mean; empty where it is no norm. What nothing decides is left out."""
    if (
        {len(shape) for shape in leaves.values()} != {1}
        or len({*leaves.values()}) != 1
        or "optimizer" in group.split("/")
    ):
        return {}
    if config is not None:
        parameters = ["gamma"] * bool(config.get("scale", True)) + ["beta"] * bool(config.get("center", True))
    elif COUNTED.fullmatch(group) or (is_unconfigured and len(leaves) == 4):
        parameters = {4: ["gamma", "beta"], 3: [""]}.get(len(leaves), [])
    else:
        return {}
    order = [*parameters, "running_mean", "running_var"]
    fits = set(leaves) == {str(at) for at in range(len(order))}
    return {str(at): role for at, role in enumerate(order) if role and fits}


def _settings(config: Config) -> dict[str, Any]:
    """What a layer's configuration says, in PyTorch's terms."""
    given = {"epsilon": KERAS.eps, "momentum": KERAS.momentum} | {**config}
    usable = {key: one for key, one in given.items() if type(one) in (int, float) and abs(one) < 1e300}
    found = {"eps": float(usable["epsilon"])} if "epsilon" in usable else {}
    return found | ({"momentum": float(f"{1 - usable['momentum']:.12g}")} if "momentum" in usable else {})
