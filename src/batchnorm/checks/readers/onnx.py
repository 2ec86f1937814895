"""ONNX models, by the onnx package: their initializers, and their BatchNormalization nodes."""

from __future__ import annotations

import functools
import math
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from batchnorm.checks.readers.directory import LARGEST, Directory, RefusedError, UnreadError

ROLES = ("gamma", "beta", "running_mean", "running_var")
"""A norm's inputs after the first."""
COMPUTED = {"Cast", "Constant", "DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose"}
COMPUTED |= {"Unsqueeze"}
"""Nodes that are evaluated where a norm's parameter comes from one: exporters and quantizers put them there."""
MAX_STEPS = 64
"""Nodes between a norm and the constant it uses."""
MAX_NODES = 2**18
MAX_MODEL = 2**31 - 1
OWN = ("", "ai.onnx")
"""ONNX's own domain of operators."""


def read(path: Path, found: Directory) -> None:
    """Add the initializers of a model by name, and its batch norm nodes, in subgraphs and functions too."""
    import onnx
    import onnx.inliner

    if path.stat().st_size > MAX_MODEL:
        raise RefusedError(f"the model is too large: ONNX allows {MAX_MODEL} bytes, and more in files beside it")
    model = onnx.ModelProto.FromString(path.read_bytes())
    if not model.HasField("graph"):
        raise RefusedError("the ONNX model is damaged: it has no graph")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    Graph(model.graph, Numbers(path, found), found).read()


class Numbers:
    """The numbers of a model's tensors: in the model, or in files beside it."""

    def __init__(self, path: Path, found: Directory) -> None:
        self.path, self.found, self.files = path, found, dict[str, Path]()

    def of(self, tensor: Any) -> functools.partial[Any]:
        """A function that returns the numbers of a tensor.

        Raises:
            RefusedError: they lie in a file that is not in the model's folder, nor where links to both lead.
        """
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        if tensor.data_location == tensor.EXTERNAL and location not in self.files:
            named, file = PureWindowsPath(location), (self.path.parent / location.replace("\0", "")).resolve()
            homes = {self.path.parent.resolve(), self.path.resolve().parent}
            outside = not location or "\0" in location or named.drive or named.root or ".." in named.parts
            if outside or not any(file.is_relative_to(home) for home in homes):
                raise RefusedError(f"the model refers to the file {location:.80}, which is not in its folder")
            self.files[location] = file
            self.found.found["size"] += file.stat().st_size if file.is_file() else 0
        return functools.partial(self._read, tensor, location, place)

    def _read(self, tensor: Any, location: str, place: dict[str, str]) -> Any:
        from onnx import numpy_helper

        count = math.prod(tensor.dims)
        if tensor.data_location != tensor.EXTERNAL:
            array = numpy_helper.to_array(tensor)
            if array.size != count:
                raise UnreadError("the model does not hold the numbers of this tensor")
            return array
        if not self.files[location].is_file():
            raise UnreadError(f"the numbers lie in {location:.80}, which is missing beside the model")
        dtype, offset = np.dtype(_dtype(tensor)), int(place.get("offset", "0"))
        needed = count * dtype.itemsize
        if int(place.get("length", needed)) < needed or not 0 <= offset <= self.files[location].stat().st_size - needed:
            raise UnreadError(f"{location:.80} beside the model is truncated or belongs to another model")
        return np.fromfile(self.files[location], dtype, count, offset=offset)


class Graph:
    """A graph, and the one around it."""

    nodes_read = 0

    def __init__(
        self, graph: Any, numbers: Numbers, found: Directory, around: Graph | None = None, path: tuple[str, ...] = ()
    ) -> None:
        self.graph, self.numbers, self.found, self.around, self.path = graph, numbers, found, around, path
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes = {output: node for node in graph.node for output in node.output}
        self.positions: dict[str, int | None] = {}

    def read(self) -> None:
        """Add its initializers and norms, and those of the graphs in its nodes."""
        for tensor in self.graph.initializer:
            path, values = (*self.path, tensor.name), self.numbers.of(tensor)
            self.positions[tensor.name] = self.found.tensor(path, tensor.dims, _dtype(tensor), values)
        for node in self.graph.node:
            Graph.nodes_read += 1
            if Graph.nodes_read > MAX_NODES:
                raise RefusedError("the model has too many nodes to be read")
            label = (node.name or (node.output[0] if node.output else "") or node.op_type)[:512]
            if node.op_type == "BatchNormalization" and node.domain in OWN:
                self._norm(node, label)
            for attribute in node.attribute:
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    Graph(graph, self.numbers, self.found, self, (*self.path, label)).read()

    def _norm(self, node: Any, label: str) -> None:
        inputs = [*node.input[1:5], *[""] * (5 - len(node.input))]
        positions = {role: self.position(name) for role, name in zip(ROLES, inputs, strict=True)}
        given = {one.name: one.f if one.HasField("f") else one.i for one in node.attribute}
        settings: dict[str, Any] = {
            "eps": float(f"{given.get('epsilon', 1e-5):.7g}"),  # the shortest decimal that is this float32
            "momentum": float(f"{1 - given.get('momentum', 0.9):.6g}"),
            # Before opset 14 a node in training mode had further outputs instead of the attribute.
            "training_mode": given.get("training_mode", 0) == 1 or sum(map(bool, node.output)) > 1,
        }
        unknown = [role for role, position in positions.items() if position is None]
        settings |= {"unknown": ", ".join(unknown)} if unknown else {}
        stems = {name.rpartition(".")[0] for name in inputs}  # of bn1.weight, bn1.bias, bn1.running_mean, ...
        name = (stems.pop() if len(stems) == 1 else "")[:512] or label
        known = {role: position for role, position in positions.items() if position is not None}
        self.found.norm("/".join((*self.path, name)), known, "ONNX", settings)

    def position(self, name: str) -> int | None:
        """The position of a norm's parameter in the directory; None where the model computes it when it runs."""
        graph = self._home(name)
        if graph is None:
            return None
        if name not in graph.positions:
            value = graph.value(name, MAX_STEPS)
            known = value is not None
            graph.positions[name] = (
                self.found.tensor((), value.shape, f"{value.dtype}", lambda: value) if known else None
            )
        return graph.positions[name]

    def value(self, name: str, steps: int) -> Any:
        """The array with this name, evaluated if it depends on constants only; else None."""
        graph = self._home(name)
        if graph is None or not steps:
            return None
        try:
            if name in graph.constants:
                tensor = graph.constants[name]
                return self.numbers.of(tensor)() if math.prod(tensor.dims) <= LARGEST else None
            node = graph.nodes[name]
            inputs = {one: graph.value(one, steps - 1) for one in node.input if one}
            if node.op_type not in COMPUTED or node.domain not in OWN or any(one is None for one in inputs.values()):
                return None
            from onnx.reference import ReferenceEvaluator

            (result,) = ReferenceEvaluator(node).run(None, inputs)
        except Exception:  # of a damaged node, of whatever kind
            return None
        return result if isinstance(result, np.ndarray) and result.dtype.kind in "fiubV" else None

    def _home(self, name: str) -> Graph | None:
        """The graph, from this one outwards, that defines a name."""
        graph: Graph | None = self
        while graph is not None and (not name or (name not in graph.constants and name not in graph.nodes)):
            graph = graph.around
        return graph


def _dtype(tensor: Any) -> str:
    from onnx import helper

    try:
        return str(helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
    except (KeyError, TypeError, ValueError):
        return "unknown"
