"""Programs of torch.export (.pt2): the JSON of the graph, and the weights beside it. Nothing is executed."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from batchnorm.checks import graphs
from batchnorm.checks.readers.directory import Directory, RefusedError

TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64"}
TYPES |= {12: "bool", 13: "bfloat16"}
"""The numbers of the types in the file that norms have."""
INPUTS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
"""The kinds of inputs of a graph that are tensors of the program, and where their names are."""


def read(path: Path, found: Directory) -> None:
    """Add the tensors of a program, and the settings of its batch norm nodes. Raises RefusedError."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        root = root.removesuffix("models/model.json")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise RefusedError("a program whose bytes are in big-endian order is not read")
        same: dict[str, list[str]] = {}
        for kind in ("weights", "constants"):
            entry = f"{root}data/{kind}/model_{kind}_config.json"
            if entry not in archive.namelist():
                continue
            for name, tensor in json.loads(archive.read(entry))["config"].items():
                if tensor["tensor_meta"] is not None:
                    key = _add(found, archive, f"{root}data/{kind}/{tensor['path_name']}", name, tensor)
                    same.setdefault(key, []).append(name)
        program = json.loads(archive.read(f"{root}models/model.json"))["graph_module"]
    graph = graphs.read(*_nodes(program), {})
    for names in same.values():  # the names of one tensor, of which the graph may use a single one
        nodes = [graph.norms[name] for name in names if name in graph.norms]
        unused = [{"unused": True} for name in names if name in graph.others]
        for name in names:
            module, _, role = name.rpartition(".")
            if role in graphs.STATISTICS and (nodes or unused):
                found.modules.append(((), module, dict([*nodes, *unused][0])))


def _add(found: Directory, archive: zipfile.ZipFile, entry: str, name: str, tensor: dict[str, Any]) -> str:
    """Add a tensor; return a key that is equal for tensors that are the same elements."""
    about = tensor["tensor_meta"]
    sizes, strides = ([size["as_int"] for size in about[part]] for part in ("sizes", "strides"))
    offset, dtype = about["storage_offset"]["as_int"], TYPES.get(about["dtype"], f"type {about['dtype']}")
    key = f"{entry} {offset} {sizes} {strides}" if math.prod(sizes) else ""
    values = partial(_values, archive, entry, dtype, sizes, strides, offset, bool(tensor["use_pickle"]))
    found.tensor((name,), sizes, dtype, values, key=key)
    return key or name


def _values(
    archive: zipfile.ZipFile,
    entry: str,
    dtype: str,
    sizes: list[int],
    strides: list[int],
    offset: int,
    is_pickled: bool,
) -> np.ndarray:
    """The elements of a tensor, whose entry has the bytes of its storage. Raises RefusedError."""
    if is_pickled or dtype not in TYPES.values():
        raise RefusedError("a tensor of a special class is not read" if is_pickled else f"{dtype} is not read")
    if 0 in sizes:
        return np.zeros(sizes)
    data = archive.read(entry)
    if dtype == "bfloat16":  # the upper half of a float32
        storage = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        storage = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min(offset, *strides, 0) < 0 or min(sizes, default=1) < 0 or last >= len(storage):
        raise RefusedError("its elements are not in the file: the file is truncated or damaged")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], sizes, steps, writeable=False)


def _nodes(program: dict[str, Any]) -> tuple[list[Any], dict[str, str]]:
    """The nodes of a graph as objects like those of torch.fx, and the names of its tensors by node."""
    graph, tensors, by_name = program["graph"], {}, {}
    for spec in program["signature"]["input_specs"]:
        for kind in INPUTS.keys() & spec.keys():
            name = spec[kind]["arg"]["name"]
            tensors[name] = spec[kind][INPUTS[kind]]
            by_name[name] = _node("placeholder", name, "", {})
    for record in graph["nodes"]:
        inputs = {entry["name"]: _argument(entry["arg"], by_name) for entry in record["inputs"]}
        outputs = [*_names(record["outputs"])]
        node = _node("call_function", outputs[0] if outputs else "", record["target"], inputs)
        stack = str(record["metadata"].get("nn_module_stack", ""))
        node.meta["nn_module_stack"] = {"": ("", stack.rpartition(",")[2])}
        if node.name in graph["tensor_values"]:
            node.meta["val"] = SimpleNamespace(ndim=len(graph["tensor_values"][node.name]["sizes"]))
        node.all_input_nodes = [*{name: by_name[name] for name in _names(record["inputs"]) if name in by_name}.values()]
        for before in node.all_input_nodes:
            before.users.append(node)
        by_name |= dict.fromkeys(outputs, node)
    for name in _names(graph["outputs"]):
        if name in by_name:
            by_name[name].users.append(None)
    return [*{id(node): node for node in by_name.values()}.values()], tensors


def _node(op: str, name: str, target: str, inputs: dict[str, Any]) -> Any:
    operator = target.removeprefix("torch.ops.").split(".")
    schema = SimpleNamespace(name="::".join(operator[:2]), arguments=())
    function = SimpleNamespace(_schema=schema)
    lists: dict[str, Any] = {"users": [], "all_input_nodes": [], "meta": {}}
    return SimpleNamespace(op=op, name=name, target=function, args=(), kwargs=inputs, **lists)


def _argument(given: dict[str, Any], by_name: dict[str, Any]) -> Any:
    """The value of an argument: a node, a number, or None."""
    (kind, value), *_ = given.items()
    if kind == "as_tensor":
        return by_name.get(value["name"])
    return value if kind in ("as_bool", "as_float", "as_int") else None


def _names(given: Any) -> Iterator[str]:
    """The names of the tensors in a list of arguments."""
    if isinstance(given, list):
        for entry in given:
            yield from _names(entry)
    elif isinstance(given, dict):
        for key, entry in given.items():
            if key == "as_tensor":
                yield entry["name"]
            elif key != "as_graph":
                yield from _names(entry)
