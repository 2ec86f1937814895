"""What an ONNX graph says of its names: the nodes that matter here, and the constants behind their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchnorm.checks.readers._parsing.protobuf import Field
from batchnorm.checks.readers._parsing.stored import Stored

MAX_STEPS = 256
"""Identity nodes, outer graphs and calls between a node and the constant it uses. A loop ends here too."""


@dataclass(slots=True)
class Node:
    """A node: its operator, and where its inputs, outputs and attributes stand."""

    operator: str = ""
    domain: str = ""
    name: Field | None = None
    inputs: list[Field] = field(default_factory=list)
    outputs: list[Field] = field(default_factory=list)
    attributes: list[Field] = field(default_factory=list)


@dataclass(slots=True)
class Scope:
    """What names mean in a graph: constants, other names, arguments of the call, or what the graph around it says."""

    constants: dict[str, Stored] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, tuple[Scope, str]] = field(default_factory=dict)
    around: Scope | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def constant(self, name: str) -> Stored | None:
        """The tensor that a name stands for, if it is one that is known before the model runs."""
        scope: Scope | None = self
        for _ in range(MAX_STEPS):
            if scope is None or not name:
                return None
            if name in scope.constants:
                return scope.constants[name]
            if name in scope.aliases:
                name = scope.aliases[name]
            elif name in scope.arguments:
                scope, name = scope.arguments[name]
            else:
                scope = scope.around
        return None
