"""Read ONNX models with the onnx package: their initializers and their BatchNormalization nodes."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from batchnorm.checks.readers.directory import Directory, RefusedError

ROLES = ("gamma", "beta", "running_mean", "running_var")
"""The inputs of a BatchNormalization node after x, in order."""
EVALUATED = {"Cast", "Constant", "DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose"}
EVALUATED |= {"Unsqueeze"}
"""Operators that are evaluated if they compute a norm's parameter: exporters and quantizers insert them."""
MAX_STEPS = 64
"""The most nodes that are evaluated one after the other between a constant and a norm."""
MAX_NODES = 2**18
MAX_MODEL = 2**31 - 1
ONNX_DOMAINS = ("", "ai.onnx")
"""The names of ONNX's standard domain of operators."""


def read(path: Path, found: Directory) -> None:
    """Add a model's initializers and batch norm nodes, also of subgraphs and functions. Raises RefusedError."""
    import onnx
    import onnx.inliner

    if path.stat().st_size > MAX_MODEL:
        raise RefusedError(f"the model is too large: ONNX allows {MAX_MODEL} bytes, with more in external files")
    model = onnx.ModelProto.FromString(path.read_bytes())
    if not model.HasField("graph"):
        raise RefusedError("the ONNX model is damaged: it has no graph")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    Model(path, found).graph(model.graph, ChainMap(), ())


class Model:
    """Adds the graphs of a model to a directory.

    `names` maps what a graph and its outer graphs define. The name of a tensor gives its position and a function that
    returns its numbers. Any other name gives the node that computes the value.
    """

    def __init__(self, path: Path, found: Directory) -> None:
        self.path, self.found, self.files, self.nodes_read = path, found, dict[str, Path](), 0

    def graph(self, graph: Any, outer: ChainMap[str, Any], path: tuple[str, ...]) -> None:
        """Add the initializers and norms of a graph and of its subgraphs. Raises RefusedError."""
        names = outer.new_child({output: node for node in graph.node for output in node.output})
        for tensor in graph.initializer:
            values = self.numbers(tensor)
            position = self.found.tensor((*path, tensor.name), tensor.dims, _dtype(tensor), values)
            names[tensor.name] = position, values
        for node in graph.node:
            self.nodes_read += 1
            if self.nodes_read > MAX_NODES:
                raise RefusedError(f"the model has more than {MAX_NODES} nodes")
            label = (node.name or (node.output[0] if node.output else "") or node.op_type)[:512]
            if node.op_type == "BatchNormalization" and node.domain in ONNX_DOMAINS:
                self.norm(node, label, names, path)
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    self.graph(inner, names, (*path, label))

    def norm(self, node: Any, label: str, names: ChainMap[str, Any], path: tuple[str, ...]) -> None:
        """Add a norm: the positions of its parameters, and its settings."""
        inputs = dict(zip(ROLES, node.input[1:], strict=False))
        positions = {role: self.position(name, names) for role, name in inputs.items() if name}
        known = {role: position for role, position in positions.items() if position is not None}
        given = {one.name: one.f if one.HasField("f") else one.i for one in node.attribute}
        settings: dict[str, Any] = {
            "eps": float(f"{given.get('epsilon', 1e-5):.7g}"),  # the decimal behind the float32
            "momentum": float(f"{1 - given.get('momentum', 0.9):.6g}"),
            # Before opset 14 a node in training mode had further outputs instead of the attribute.
            "training_mode": given.get("training_mode", 0) == 1 or sum(map(bool, node.output)) > 1,
        }
        if unknown := [role for role in ROLES if role not in known]:
            settings["unknown"] = ", ".join(unknown)
        stems = {name.rpartition(".")[0] for name in inputs.values()}  # "bn1" for bn1.weight, bn1.bias, ...
        name = (stems.pop() if len(stems) == 1 else "")[:512] or label
        self.found.norms.append(("/".join((*path, name)), known, "ONNX", settings))

    def position(self, name: str, names: ChainMap[str, Any]) -> Any:
        """The position of a norm's parameter in the directory; None if it depends on the model's input."""
        scope: Any = next((defined for defined in names.maps if name in defined), {name: (None, None)})
        if not isinstance(scope[name], tuple):
            value = _value(name, names, MAX_STEPS)
            known = value is not None
            position = self.found.tensor((), value.shape, f"{value.dtype}", lambda: value) if known else None
            scope[name] = position, lambda: value
        return scope[name][0]

    def numbers(self, tensor: Any) -> Callable[[], Any]:
        """A function that returns the numbers of a tensor, from the model or a file beside it.

        Raises:
            RefusedError: their file is outside of the model's folder, also after following symbolic links.
        """
        from onnx import numpy_helper

        if tensor.data_location != tensor.EXTERNAL:
            return partial(numpy_helper.to_array, tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        if location not in self.files:
            named, file = PureWindowsPath(location), (self.path.parent / location.replace("\0", "")).resolve()
            folders = {self.path.parent.resolve(), self.path.resolve().parent}
            outside = not location or "\0" in location or named.drive or named.root or ".." in named.parts
            if outside or not any(file.is_relative_to(folder) for folder in folders):
                raise RefusedError(f"the model refers to the file {location:.80}, which is not in its folder")
            self.files[location] = file
            self.found.size += file.stat().st_size if file.is_file() else 0
        return partial(_beside, tensor, self.files[location], place)


def _beside(tensor: Any, file: Path, place: dict[str, str]) -> Any:
    location, count, dtype = place["location"], math.prod(tensor.dims), np.dtype(_dtype(tensor))
    if not file.is_file():
        raise RefusedError(f"the tensors are in {location:.80}, which is missing: put it beside the model")
    array = np.fromfile(file, dtype, count, offset=int(place.get("offset", "0")))
    if array.size < count or int(place.get("length", array.nbytes)) < array.nbytes:
        raise RefusedError(f"{location:.80} beside the model is truncated or belongs to another model")
    return array.reshape(tensor.dims)


def _value(name: str, names: ChainMap[str, Any], steps: int) -> Any:
    """The array with this name, evaluated if it depends on constants only; else None."""
    source = names.get(name)
    try:
        if isinstance(source, tuple):
            result = source[1]()
        elif source is None or not steps or source.op_type not in EVALUATED or source.domain not in ONNX_DOMAINS:
            return None
        else:
            from onnx.reference import ReferenceEvaluator

            inputs = {one: _value(one, names, steps - 1) for one in source.input if one}
            (result,) = ReferenceEvaluator(source).run(None, inputs)
    except Exception:  # a damaged node can raise any error
        return None
    return result if isinstance(result, np.ndarray) and result.dtype.kind in "fiubV" else None


def _dtype(tensor: Any) -> str:
    from onnx import helper

    try:
        return str(helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
    except (KeyError, TypeError, ValueError):
        return "unknown"
