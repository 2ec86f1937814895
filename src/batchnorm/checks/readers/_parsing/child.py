"""A program that reads one file by its format's library and prints what it found: a line of JSON each.

`process` runs it; nothing imports it. A library can crash on a damaged file, or take any time and memory; here it takes
down only this process, whose memory and time are bounded. The program knows nothing of the package, so that it starts
fast and without torch.

Input, one line of JSON: format; path; want: a tensor whose values to print, or null for the directory. For HDF5 also
weights: [offset, packed, size, method], where the HDF5 file lies inside it, or null for all of it; config: likewise, of
a JSON text.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_ADDRESSES = 2**31
"""Bytes of address space: what the libraries map when they are imported, and one tensor."""
COPIES = 3
"""How often an ONNX model lies in memory: as bytes, as messages, and the numbers of a tensor once more."""
MAX_SECONDS = 20
"""Processor time."""
MAX_UNPACKED = 2**30
"""Bytes of a compressed part that are unpacked, into a temporary file."""
MAX_CONFIG = 2**25
"""Bytes of a network's configuration in JSON."""
MAX_DATASETS = 2**16
MAX_NAMES = 2**23
"""Bytes of all names."""
MAX_NAME = 1024
MAX_OBJECTS = 2**18
"""Groups and datasets looked at."""
MAX_DEPTH = 64
MAX_NODES = 2**18
"""Nodes of an ONNX model, with those of its functions once for each call."""
MAX_GRAPHS = 16
"""Graphs in nodes of graphs, and functions that call functions."""
MAX_STEPS = 256
"""Identity nodes, outer graphs and calls between a node and the constant it uses. A loop ends here too."""
MAX_LABEL = 512
"""Characters of a node's name: it stands before the name of every norm in its graphs."""
ROLES = ("gamma", "beta", "running_mean", "running_var")
"""Of a norm's inputs after the first."""
DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
"""Where the numbers of an ONNX tensor lie, if not in raw_data."""
FLOATING = (1, 10, 11, 16)
"""ONNX's types float, float16, double and bfloat16: a cast to these keeps the numbers, up to rounding."""
READ = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
)
"""The types of ONNX whose numbers are read."""
AT_HAND = 2**16
"""Elements of a tensor of one dimension that is handed over at once: a norm's tensors and biases are."""
AT_HAND_ALL = 2**21
"""Elements of all of these."""
KERAS_NORMS = ("BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2", "SyncBatchNormalization")


class ModelError(Exception):
    """A file that is damaged or too large, in words for the user."""


def limit(more: int = 0) -> None:
    """Bound this process, where the system can; `more` bytes of addresses are allowed besides."""
    try:
        import resource
    except ImportError:
        return
    for what, most in (
        (resource.RLIMIT_AS, MAX_ADDRESSES + more),
        (resource.RLIMIT_CPU, MAX_SECONDS),
        (resource.RLIMIT_FSIZE, MAX_UNPACKED),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS knows no bound on addresses
            resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


class Part(io.RawIOBase):
    """A run of bytes of a file, as a file."""

    def __init__(self, whole: BinaryIO, start: int, size: int) -> None:
        self.whole, self.start, self.size, self.at = whole, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.whole.seek(self.start + self.at)
        wanted = max(0, min(len(buffer), self.size - self.at))
        found = self.whole.read(wanted)
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


def part(whole: BinaryIO, place: list[int] | None) -> Any:
    """The part of the file that `place` says, unpacked where it is deflated."""
    if place is None:
        return whole
    offset, packed, size, method = place
    if method == 0:
        return Part(whole, offset, size)
    if size > MAX_UNPACKED:
        raise ValueError("a compressed part is too large: store it uncompressed")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
    whole.seek(offset)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    written = 0
    while packed and not unpacker.eof:
        block = whole.read(min(packed, 2**16))
        if not block:
            break
        packed -= len(block)
        while block and written <= size:
            piece = unpacker.decompress(block, 2**20)
            written += len(piece)
            unpacked.write(piece)
            block = unpacker.unconsumed_tail
    if written != size:
        raise ValueError("a compressed part is damaged")
    unpacked.seek(0)
    return unpacked


def datasets(group: Any, h5py: Any) -> Iterator[tuple[str, Any]]:
    """Every dataset of numbers, by path. Links out of the file, or to where one is already, are not followed.

    Groups come sorted by name, but for those in which Keras lists the order of its layers and their tensors.
    """
    seen = {h5py.h5o.get_info(group.id).addr}
    rank: dict[str, int] = {}
    waiting: list[Iterator[tuple[str, Any]]] = [iter([("", group)])]
    looked = names = found = 0
    while waiting:
        path, entry = next(waiting[-1], ("", None))
        if entry is None:
            waiting.pop()
        elif isinstance(entry, h5py.Dataset):
            names += len(path)
            found += 1
            if found > MAX_DATASETS or names > MAX_NAMES:
                raise ValueError("there are too many tensors in it")
            yield path, entry
        else:
            children = []
            for name in entry:
                looked += 1
                if looked > MAX_OBJECTS or len(waiting) > MAX_DEPTH or len(path) > 4096:
                    raise ValueError("it has too many groups")
                if not isinstance(entry.get(name, getlink=True), h5py.HardLink):
                    continue
                child = entry.get(name)
                if not isinstance(child, h5py.Group | h5py.Dataset):
                    continue
                address = h5py.h5o.get_info(child.id).addr
                if isinstance(child, h5py.Dataset) or address not in seen:
                    seen.add(address)
                    children.append((f"{path}/{name}" if path else name, child))
            for name in listed(entry):
                parts = f"{path}/{name}".strip("/").split("/")
                for end in range(1, len(parts) + 1):
                    rank.setdefault("/".join(parts[:end]), len(rank))
            children.sort(key=lambda child: rank.get(child[0], len(rank)))
            waiting.append(iter(children))


def listed(group: Any) -> list[str]:
    """What Keras says lies in a group, in the network's order; in pieces where the list is long."""
    found: list[str] = []
    for what in ("layer_names", "weight_names"):
        keys = [what] if what in group.attrs else [key for at in range(64) if (key := f"{what}{at}") in group.attrs]
        for key in keys:
            names = group.attrs[key]
            if getattr(names, "ndim", 0) == 1:
                found += [text(name)[:MAX_NAME] for name in names[: MAX_DATASETS - len(found)].tolist()]
    return found


def kind(dataset: Any) -> str | None:
    """The type of its numbers; None where it holds none."""
    dtype = dataset.dtype
    if dtype.kind == "V" and dtype.itemsize == 2 and text(dataset.attrs.get("dtype")) == "bfloat16":
        return "bfloat16"
    return str(dtype.newbyteorder("=").name) if dtype.kind in "fiub" else None


def values(dataset: Any) -> Any:
    """Its numbers as float64."""
    import numpy as np

    if dataset.external or dataset.is_virtual:
        raise ValueError("its numbers lie in another file")
    raw = dataset[()]
    if raw.dtype.kind == "V":
        raw = (np.frombuffer(raw.tobytes(), "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(raw, dtype="<f8").reshape(dataset.shape)


def text(value: Any) -> str:
    """A string attribute; the empty one where it is none."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else ""


def layers(config: Any) -> list[dict[str, Any]]:
    """The configurations of the batch norm layers in a network's, in their order, in networks inside it too."""
    found = []
    waiting = [config]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict):
            inner = entry.get("config")
            if entry.get("class_name") in KERAS_NORMS and isinstance(inner, dict):
                found.append(inner)
            waiting += reversed(entry.values())
        elif isinstance(entry, list):
            waiting += reversed(entry)
    return found


def directory(file: Any, config: Any, h5py: Any) -> Iterator[dict[str, Any]]:
    """A record for each tensor, each group of numbered tensors whose layer is named, and each norm's configuration."""
    groups: set[str] = set()
    left = AT_HAND_ALL
    for path, dataset in datasets(file, h5py):
        dtype = kind(dataset)
        if dtype is None or dataset.shape is None:
            continue
        record = {"tensor": path, "shape": dataset.shape, "dtype": dtype}
        if len(dataset.shape) == 1 and dataset.shape[0] <= min(AT_HAND, left):
            left -= dataset.shape[0]
            with contextlib.suppress(Exception):  # asked for again by those who need it, who are told why not
                record["values"] = base64.b64encode(values(dataset).tobytes()).decode()
        yield record
        group = path.rpartition("/")[0]
        if group.rpartition("/")[2] == "vars" and group not in groups:
            groups.add(group)
            yield {"group": group, "owner": text(file[group].attrs.get("name"))[:MAX_NAME]}
    if config is None and "model_config" in file.attrs:
        config = json.loads(text(file.attrs["model_config"]) or "null")
    for layer in layers(config):
        scalars = {key: layer.get(key) for key in ("name", "epsilon", "momentum", "scale", "center") if key in layer}
        yield {"layer": {key: value for key, value in scalars.items() if not isinstance(value, dict | list)}}


class Scope:
    """What names mean in an ONNX graph: tensors, other names, arguments of the call, or what the graph around says."""

    def __init__(self, around: Scope | None = None, attributes: dict[str, Any] | None = None) -> None:
        self.around = around
        self.attributes = attributes or {}
        self.tensors: dict[str, int] = {}
        self.aliases: dict[str, str] = {}
        self.arguments: dict[str, tuple[Scope, str]] = {}

    def tensor(self, name: str) -> int | None:
        """The number of the tensor that a name stands for, if it is one that is known before the model runs."""
        scope: Scope | None = self
        for _ in range(MAX_STEPS):
            if scope is None or not name:
                return None
            if name in scope.tensors:
                return scope.tensors[name]
            if name in scope.aliases:
                name = scope.aliases[name]
            elif name in scope.arguments:
                scope, name = scope.arguments[name]
            else:
                scope = scope.around
        return None


class Model:
    """An ONNX model: a record for each initializer, constant and batch norm node, in functions and subgraphs too."""

    def __init__(self, model: Any, want: int | None) -> None:
        self.functions = {(one.domain, one.name): one for one in model.functions}
        self.want = want
        self.nodes = self.tensors = 0
        self.left = AT_HAND_ALL

    def graph(self, graph: Any, scope: Scope, path: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        """The records of a graph, or of the body of a function."""
        if len(path) >= MAX_GRAPHS:
            raise ModelError(f"graphs of the model are nested deeper than {MAX_GRAPHS}")
        for tensor in getattr(graph, "initializer", ()):  # a function has none
            scope.tensors[tensor.name] = self.tensors
            yield from self.tensor(tensor, (*path, tensor.name))
        later = []
        for node in graph.node:
            self.nodes += 1
            if self.nodes > MAX_NODES:
                raise ModelError("the model has too many nodes to be read")
            own = node.domain in ("", "ai.onnx")
            if own and node.op_type == "Constant" and node.output:
                for attribute in node.attribute:
                    if attribute.HasField("t") or attribute.floats:
                        scope.tensors[node.output[0]] = self.tensors
                        yield from self.tensor(attribute.t if attribute.HasField("t") else listed_floats(attribute))
            elif own and node.op_type in ("Identity", "Cast") and node.input and node.output:
                if node.op_type == "Identity" or attributes(node, scope).get("to") in FLOATING:
                    scope.aliases[node.output[0]] = node.input[0]
            elif own or (node.domain, node.op_type) in self.functions:
                later.append(node)
        for node in later:
            yield from self.inside(node, scope, path)

    def inside(self, node: Any, scope: Scope, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The records of a node: itself if it is a norm, and the graphs in it or the function that it calls."""
        label = (node.name or (node.output[0] if node.output else "") or node.op_type)[:MAX_LABEL]
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            called = Scope(attributes=attributes(node, scope))
            called.arguments = {name: (scope, given) for name, given in zip(function.input, node.input, strict=False)}
            yield from self.graph(function, called, (*path, label))
        elif node.op_type == "BatchNormalization":
            yield norm(node, label, scope, path)
        else:
            for attribute in node.attribute:
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield from self.graph(graph, Scope(scope, scope.attributes), (*path, label))

    def tensor(self, tensor: Any, path: tuple[str, ...] | None = None) -> Iterator[dict[str, Any]]:
        """The record of a tensor, which is counted; with its values where it is small, or wanted."""
        from onnx import TensorProto, helper

        number = self.tensors
        self.tensors += 1
        if self.tensors > MAX_DATASETS:
            raise ModelError("the model holds too many tensors")
        shape, count = list(tensor.dims), math.prod(tensor.dims)
        try:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        except (KeyError, TypeError, ValueError):
            dtype = "unknown"
        record: dict[str, Any] = {"id": number, "path": path, "shape": shape, "dtype": dtype}
        external = tensor.data_location == TensorProto.EXTERNAL
        held = tensor.HasField("raw_data") or any(getattr(tensor, name) for name in DATA)
        if external:
            record["beside"] = {entry.key: entry.value for entry in tensor.external_data}
        elif not held and count:
            record["empty"] = True
        elif dtype in READ and min(shape, default=0) >= 0:
            if elements(tensor, dtype) != count:
                raise ModelError("it is damaged: a tensor has not as many numbers as its shape says")
            at_hand = len(shape) == 1 and count <= min(AT_HAND, self.left)
            if at_hand or number == self.want:
                self.left -= count
                record["values"] = numbers(tensor)
        if self.want in (None, number):
            yield record


def elements(tensor: Any, dtype: str) -> int:
    """How many numbers an ONNX tensor holds."""
    import ml_dtypes  # noqa: F401 (numpy knows its types by name)
    import numpy as np

    if tensor.HasField("raw_data"):
        size, rest = divmod(len(tensor.raw_data), np.dtype(dtype).itemsize)
        return -1 if rest else size
    return max(len(getattr(tensor, name)) for name in DATA)


def numbers(tensor: Any) -> str:
    """Those of an ONNX tensor as float64, encoded."""
    import numpy as np
    from onnx import numpy_helper

    with np.errstate(all="ignore"):
        return base64.b64encode(numpy_helper.to_array(tensor).astype("<f8").tobytes()).decode()


def listed_floats(attribute: Any) -> Any:
    """The tensor of a Constant node that lists floats."""
    from onnx import TensorProto

    return TensorProto(dims=[len(attribute.floats)], data_type=TensorProto.FLOAT, float_data=attribute.floats)


def attributes(node: Any, scope: Scope) -> dict[str, Any]:
    """The numbers among a node's attributes, and those that a function's node takes from the call."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            value = scope.attributes.get(attribute.ref_attr_name)
        elif attribute.HasField("f"):
            value = float(f"{attribute.f:.7g}")  # the shortest decimal that is this float32: 1e-05
        else:
            value = attribute.i if attribute.HasField("i") else None
        if value is not None:
            found[attribute.name] = value
    return found


def norm(node: Any, label: str, scope: Scope, path: tuple[str, ...]) -> dict[str, Any]:
    """The record of a batch norm node: the numbers of its tensors by role; the roles of those that are computed."""
    inputs = [*node.input[1:5], *[""] * (5 - len(node.input))]
    found = {role: scope.tensor(name) for role, name in zip(ROLES, inputs, strict=True)}
    given = attributes(node, scope)
    stems = {name.rpartition(".")[0] for name in inputs}  # of bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var
    name = (stems.pop() if len(stems) == 1 else "")[:MAX_LABEL] or label
    settings: dict[str, Any] = {
        "eps": given.get("epsilon", 1e-5),
        "momentum": float(f"{1 - given.get('momentum', 0.9):.6g}"),
        # Before opset 14 a node in training mode had further outputs instead of the attribute.
        "training_mode": given.get("training_mode", 0) == 1 or sum(map(bool, node.output)) > 1,
    }
    known = {role: number for role, number in found.items() if number is not None}
    if len(known) < len(found):
        settings["unknown"] = ", ".join(role for role in found if role not in known)
    return {"norm": "/".join((*path, name)), "tensors": known, "settings": settings}


def onnx_records(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of an ONNX model. Files beside it are not opened."""
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    try:
        with open(job["path"], "rb") as file:
            model = ModelProto.FromString(file.read())
    except DecodeError:
        raise ModelError("it is truncated, damaged or no ONNX model") from None
    if not model.HasField("graph"):
        raise ModelError("it is damaged: it has no graph")
    records = Model(model, job["want"]).graph(model.graph, Scope())
    return records if job["want"] is None else (record for record in records if record.get("id") == job["want"])


def hdf5_records(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of an HDF5 file."""
    import h5py

    with open(job["path"], "rb") as whole:
        config = None
        if job["config"] is not None:
            config = json.loads(part(whole, job["config"]).read(MAX_CONFIG))
        source = part(whole, job["weights"])
        with h5py.File(job["path"] if source is whole else source, "r") as file:
            if job["want"] is None:
                yield from directory(file, config, h5py)
            else:
                yield {"values": base64.b64encode(values(file[job["want"]]).tobytes()).decode()}


def say(record: dict[str, Any]) -> None:
    """Print a record."""
    sys.stdout.write(json.dumps(record) + "\n")


def main() -> None:
    """Print the records that are asked for, and a last one that says whether that was all."""
    job = json.loads(sys.stdin.readline())
    onnx = job["format"] == "ONNX"
    limit(COPIES * os.stat(job["path"]).st_size if onnx else 0)
    try:
        for record in onnx_records(job) if onnx else hdf5_records(job):
            say(record)
        say({"end": None})
    except ModelError as error:
        say({"end": str(error)})
    except Exception as error:  # of whatever kind: libhdf5's have no common one
        say({"end": f"{type(error).__name__}: {error}"[:300]})


if __name__ == "__main__":
    main()
