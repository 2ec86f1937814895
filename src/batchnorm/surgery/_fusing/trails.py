"""What a search for fusions passes around: where a batch norm is held back, and what has been joined to it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from batchnorm.surgery._fusing.names import Scope
from batchnorm.surgery._fusing.source import RUNTIME

# A call's place in its file: line, column, last line, last column.
Site = tuple[int, int, int, int]


@dataclass(frozen=True)
class Trail:
    """A batch norm held back, and what has been joined to it so far: `done` once it has been computed."""

    sites: frozenset[Site]
    layers: frozenset[nn.Module]
    residual: bool = False
    act: str | None = None
    done: bool = False
    replaced: bool = False

    @property
    def fused(self) -> bool:
        """Whether it is worth rewriting: something has been joined to it, or ours replaces a function."""
        return self.residual or self.act is not None or self.replaced

    def joined(self, other: Trail | None) -> Trail:
        """What holds where either may have been taken."""
        if other is None:
            return self
        return Trail(
            self.sites | other.sites,
            self.layers | other.layers,
            self.residual or other.residual,
            self.act or other.act,
            self.done and other.done,
            self.replaced or other.replaced,
        )


@dataclass(frozen=True)
class Fusion:
    """What was joined to the layers whose calls stand at `sites`."""

    sites: frozenset[Site]
    layers: frozenset[nn.Module]
    residual: bool
    act: str | None


@dataclass(frozen=True)
class Held:
    """A local variable that may hold a batch norm back."""

    name: str
    trail: Trail
    live: bool = True


@dataclass
class Known:
    """What the search knows from outside: the layers that a module's output comes from, and the sites given up."""

    scope: Scope
    ends_in: Callable[[nn.Module], frozenset[nn.Module]]
    banned: frozenset[Site]
    fusions: list[Fusion] = field(default_factory=list)
    begun: set[Site] = field(default_factory=set)


def place(node: ast.expr) -> Site:
    """Where an expression stands in the file."""
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def mentions(node: ast.AST, name: str) -> bool:
    """Whether a variable occurs."""
    return uses(node, name) > 0


def uses(node: ast.AST, name: str) -> int:
    """How often a variable occurs."""
    return sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def runtime(name: str, *arguments: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.Call:
    """A call of `batchnorm.surgery._fusing.runtime`'s function of that name."""
    function = ast.Attribute(ast.Name(RUNTIME, ast.Load()), name, ast.Load())
    return ast.Call(func=function, args=list(arguments), keywords=list(keywords))
