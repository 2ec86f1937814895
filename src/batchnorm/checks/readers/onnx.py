"""ONNX models: their initializers, and the BatchNormalization nodes with what their inputs come from.

Read from the protobuf as it lies in the file, without the onnx package: of weights only the places are kept.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from batchnorm.checks.readers._parsing.files import File
from batchnorm.checks.readers._parsing.onnx_scope import Node, Scope
from batchnorm.checks.readers._parsing.onnx_tensor import Tensors
from batchnorm.checks.readers._parsing.protobuf import (
    BYTES,
    DAMAGED,
    FIXED32,
    Field,
    Message,
    signed,
)
from batchnorm.checks.readers._parsing.stored import (
    MAX_TENSORS,
    Checkpoint,
    CheckpointError,
    NormPlaces,
    Stored,
)

MAX_DEPTH = 16
"""Graphs in nodes of graphs, and functions that call functions."""
MAX_KEPT = 256
"""Inputs, outputs and attributes that are kept of a node."""
MAX_KEPT_ALL = 2**18
"""Of all nodes together: of norms there are thousands at most."""
MAX_LABEL = 512
"""Characters of a node's name: it stands before the name of every norm in its graphs."""
NORM, CONSTANT, IDENTITY = "BatchNormalization", "Constant", "Identity"
HOLDERS = {"If", "Loop", "Scan", "SequenceMap"}
"""Nodes with graphs inside."""
OWN_DOMAINS = ("", "ai.onnx")


class Model:
    """What has been found in a model so far."""

    def __init__(self, path: Path, file: File) -> None:
        self.message = Message(file)
        self.places = Tensors(self.message, path)
        self.functions: dict[tuple[str, str], Field] = {}
        self.tensors: dict[tuple[str, ...], Stored] = {}
        self.constants = self.kept = 0
        self.norms: list[NormPlaces] = []

    def read(self, size: int) -> None:
        """The graph of the model, with the functions that it calls."""
        graph = None
        for part in self.message.fields(0, size):
            if part.number == 7 and part.wire == BYTES:
                graph = part
            elif part.number == 25 and part.wire == BYTES:
                names = {at: self._first(part, at) for at in (1, 10)}
                self.functions[names[10], names[1]] = part
        if graph is None:
            raise CheckpointError(DAMAGED)
        self._graph(graph, Scope(), (), 1)

    def _first(self, part: Field, number: int) -> str:
        fields = self.message.fields(part.value, part.end)
        return next((self.message.text(field) for field in fields if field.number == number), "")

    def _graph(self, part: Field, scope: Scope, path: tuple[str, ...], depth: int, node_number: int = 1) -> None:
        """A graph, or the body of a function, whose nodes have another field number."""
        if depth > MAX_DEPTH:
            raise CheckpointError(f"graphs of the model are nested deeper than {MAX_DEPTH}")
        later: list[Node] = []
        for entry in self.message.fields(part.value, part.end):
            if entry.wire != BYTES:
                continue
            if entry.number == node_number:
                node = self._node(entry)
                if node is None:
                    continue
                if node.operator == CONSTANT:
                    self._constant(node, scope)
                elif node.operator == IDENTITY:
                    self._alias(node, scope)
                else:
                    later.append(node)
                    self.kept += 10 + len(node.inputs) + len(node.outputs) + len(node.attributes)
                    if self.kept > MAX_KEPT_ALL:
                        raise CheckpointError("the model has too many nodes to be read")
            elif entry.number == 5 and node_number == 1:
                name, stored = self.places.read(entry.value, entry.end)
                scope.constants[name] = self.tensors[*path, name] = stored
                self._count()
        for node in later:
            self._inside(node, scope, path, depth)

    def _node(self, part: Field) -> Node | None:
        """A node that matters here, else None."""
        node = Node()
        for entry in self.message.fields(part.value, part.end):
            kept = {1: node.inputs, 2: node.outputs, 5: node.attributes}.get(entry.number)
            if kept is not None and entry.wire == BYTES and len(kept) < MAX_KEPT:
                kept.append(entry)
            elif entry.number == 3:
                node.name = entry
            elif entry.number == 4:
                node.operator = self._operator(entry)
            elif entry.number == 7:
                node.domain = self._operator(entry)
        own = node.domain in OWN_DOMAINS and node.operator in {NORM, CONSTANT, IDENTITY, *HOLDERS}
        return node if own or (node.domain, node.operator) in self.functions else None

    def _operator(self, part: Field) -> str:
        """An operator or a domain, of every node: not counted among the names that are kept."""
        before = self.message.text_size
        text = self.message.text(part)
        self.message.text_size = before
        return text

    def _count(self) -> None:
        self.constants += 1
        if self.constants > MAX_TENSORS:
            raise CheckpointError(f"the model holds more than {MAX_TENSORS} tensors")

    def _constant(self, node: Node, scope: Scope) -> None:
        for attribute in node.attributes:
            for part in self.message.fields(attribute.value, attribute.end):
                stored = None
                if part.number == 5 and part.wire == BYTES:
                    _, stored = self.places.read(part.value, part.end)
                elif part.number == 7 and part.wire == BYTES:
                    stored = self.places.floats(part)
                if stored is not None and node.outputs:
                    scope.constants[self.message.text(node.outputs[0])] = stored
                    self._count()

    def _alias(self, node: Node, scope: Scope) -> None:
        if node.inputs and node.outputs:
            scope.aliases[self.message.text(node.outputs[0])] = self.message.text(node.inputs[0])
            self._count()

    def _inside(self, node: Node, scope: Scope, path: tuple[str, ...], depth: int) -> None:
        if node.operator == NORM and node.domain in OWN_DOMAINS:
            self.norms.append(self._norm(node, scope, path))
            return
        label = self._label(node)
        function = self.functions.get((node.domain, node.operator))
        if function is None:
            for attribute in node.attributes:
                for part in self.message.fields(attribute.value, attribute.end):
                    if part.number in (6, 11) and part.wire == BYTES:
                        self._graph(part, Scope(around=scope, attributes=scope.attributes), (*path, label), depth + 1)
            return
        given = [self.message.text(part) for part in node.inputs]
        own = [entry for entry in self.message.fields(function.value, function.end) if entry.number == 4][:MAX_KEPT]
        arguments = {self.message.text(part): (scope, name) for part, name in zip(own, given, strict=False)}
        called = Scope(arguments=arguments, attributes=self._attributes(node, scope))
        self._graph(function, called, (*path, label), depth + 1, node_number=7)

    def _label(self, node: Node) -> str:
        named = self.message.text(node.name) if node.name is not None else ""
        label = named or (self.message.text(node.outputs[0]) if node.outputs else "") or node.operator
        return label[:MAX_LABEL]

    def _norm(self, node: Node, scope: Scope, path: tuple[str, ...]) -> NormPlaces:
        inputs = [self.message.text(part) for part in node.inputs[:5]]
        inputs += [""] * (5 - len(inputs))
        given = self._attributes(node, scope)
        # Before opset 14 a node in training mode had further outputs instead of the attribute.
        training = given.get("training_mode", 0) == 1 or sum(part.end > part.value for part in node.outputs) > 1
        settings = {
            "framework": "ONNX",
            "eps": given.get("epsilon", 1e-5),
            "momentum": float(f"{1 - given.get('momentum', 0.9):.6g}"),
            "training_mode": training,
        }
        name = _stem(inputs[1:])[:MAX_LABEL] or self._label(node)
        gamma, beta, mean, var = (scope.constant(tensor) for tensor in inputs[1:])
        return NormPlaces("/".join((*path, name)), gamma, beta, mean, var, settings)

    def _attributes(self, node: Node, scope: Scope) -> dict[str, Any]:
        """The numbers among a node's attributes, and those that a function's node takes from the call."""
        found: dict[str, Any] = {}
        for attribute in node.attributes:
            name, value = "", None
            for part in self.message.fields(attribute.value, attribute.end):
                if part.number == 1:
                    name = self.message.text(part)
                elif part.number == 2 and part.wire == FIXED32:
                    value = _short(part.value)
                elif part.number == 3:
                    value = signed(part.value)
                elif part.number == 21:
                    value = scope.attributes.get(self.message.text(part))
            if value is not None:
                found[name] = value
        return found


def looks_like(head: bytes) -> bool:
    """Whether a file that begins so may be one: the first field is the version of the format, a small number."""
    return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 0x20


def read_file(path: Path, file: File) -> Checkpoint:
    """The initializers of a model by name, and its batch norm nodes.

    Raises:
        CheckpointError: no ONNX model, damaged, or with numbers in files elsewhere.
    """
    model = Model(path, file)
    model.read(file.size)
    size = file.size + sum(beside.size for beside in model.places.beside.values() if beside is not None)
    return Checkpoint(path, "ONNX", model.tensors, tuple(model.norms), size)


def _stem(names: list[str]) -> str:
    """What "bn1.weight", "bn1.bias", "bn1.running_mean" and "bn1.running_var" begin with."""
    stems = {name.rpartition(".")[0] for name in names}
    return stems.pop() if len(stems) == 1 else ""


def _short(bits: int) -> float:
    """A float32 as the shortest decimal that is it: 1e-05, not 9.99999974e-06."""
    (value,) = struct.unpack("<f", bits.to_bytes(4, "little"))
    return float(f"{value:.7g}")
