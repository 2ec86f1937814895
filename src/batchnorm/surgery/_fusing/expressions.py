"""Expressions of the form act(BN(x) [+ residual]), found in a method's source and rewritten to run as one transform.

A chain begins with the call of a batch norm layer (or of a module that ends in one), goes on through identities and
at most one addition, and may end with an activation; after an addition only with one that `follows_additions`.
Evaluation keeps its order: what Python evaluated before the layer ran still is, and what it evaluated between the
layer and the addition runs first only where the layer's input is out of its reach (`runtime.keep`).
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.surgery._fusing.source import RUNTIME, UNKNOWN, Scope
from batchnorm.surgery._shared.activations import METHODS, activation_of, follows_additions
from batchnorm.surgery._shared.layers import FRESH

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


_OTHER_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Chains:
    """Rewrites expressions; `held` and `maker` are set by whoever walks the statements."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.scope = known.scope
        self.held: Held | None = None
        self.live = True
        # The variable that the statement before assigned from a module's call, and that module.
        self.maker: tuple[str, ast.expr] | None = None

    def plain(self, node: ast.expr) -> ast.expr:
        """The expression with the fusions inside it; its value is what it was."""
        if isinstance(node, _OTHER_SCOPES):
            return node
        found = self.chain(node)
        if found is not None and (found[1].fused or isinstance(node, ast.Name)):
            return self.settled(*found)
        return self._children(node)

    def settled(self, node: ast.expr, trail: Trail) -> ast.expr:
        """Computed at the latest now."""
        self.note(trail)
        return node if trail.done else runtime("settle", node)

    def note(self, trail: Trail) -> None:
        """Record what has been fused, where this code runs on this instance."""
        if trail.fused and self.live:
            self.known.fusions.append(Fusion(trail.sites, trail.layers, trail.residual, trail.act))

    def chain(self, node: ast.expr) -> tuple[ast.expr, Trail] | None:
        """The expression rewritten, and what it holds back or has computed; None where it is no chain."""
        if isinstance(node, ast.Name):
            return (node, self.held.trail) if self.held is not None and node.id == self.held.name else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._sum(node.left, node.right)
        if isinstance(node, ast.Call) and not any(isinstance(a, ast.Starred) for a in node.args):
            return self._call(node) if all(k.arg is not None for k in node.keywords) else None
        return None

    def _call(self, node: ast.Call) -> tuple[ast.expr, Trail] | None:
        called = self.scope.value(node.func)
        begun = self._begin(node, called)
        if begun is not None:
            return begun
        if called is torch.add and len(node.args) == 2 and all(_is_alpha_of_one(k) for k in node.keywords):
            return self._added(node.func, node.args[0], node.args[1])
        if node.args and called is not UNKNOWN:
            return self._applied(node, called)
        if isinstance(node.func, ast.Attribute) and all(_is_alpha_of_one(k) for k in node.keywords):
            return self._method(node, node.func)
        return None

    def _begin(self, node: ast.Call, called: Any) -> tuple[ast.expr, Trail] | None:
        site = place(node)
        if site in self.known.banned or not node.args:
            return None
        layers = self.known.ends_in(called) if isinstance(called, nn.Module) else frozenset()
        if called is not F.batch_norm and not layers:
            return None
        self.known.begun.add(site)
        arguments = [self.plain(argument) for argument in node.args]
        keywords = self._keywords(node.keywords)
        if called is F.batch_norm:
            trail = Trail(frozenset([site]), frozenset([self.scope.instance]), replaced=True)
            return runtime("defer_function", node.func, *arguments, keywords=keywords), trail
        maker = self._maker(node.args[0]) or ast.Constant(None)
        return runtime("defer", maker, node.func, *arguments, keywords=keywords), Trail(frozenset([site]), layers)

    def _maker(self, argument: ast.expr) -> ast.expr | None:
        """The module, if one is known, whose call made the argument."""
        if isinstance(argument, ast.Name) and self.maker is not None and self.maker[0] == argument.id:
            return self.maker[1]
        return self.makes(argument)

    def makes(self, node: ast.expr) -> ast.expr | None:
        """The module of a call that returns new memory."""
        if isinstance(node, ast.Call) and type(self.scope.value(node.func)) in FRESH:
            return node.func
        return None

    def _applied(self, node: ast.Call, called: Any) -> tuple[ast.expr, Trail] | None:
        inner = self.chain(node.args[0])
        if inner is None or inner[1].done:
            return None
        settings = [self.scope.value(a) for a in node.args[1:]]
        named = {str(k.arg): self.scope.value(k.value) for k in node.keywords}
        if any(value is UNKNOWN for value in (*settings, *named.values())):
            return None
        activation = activation_of(called, tuple(settings), named)
        if activation is None or (inner[1].residual and not follows_additions(activation)):
            return None
        applied = runtime("apply", node.func, inner[0], *node.args[1:], keywords=node.keywords)
        return applied, _with_act(inner[1], activation.act)

    def _method(self, node: ast.Call, function: ast.Attribute) -> tuple[ast.expr, Trail] | None:
        name = ast.Constant(function.attr)
        if function.attr in METHODS and not node.args and not node.keywords:
            inner = self.chain(function.value)
            if inner is not None and not inner[1].done:
                return runtime("method", name, inner[0]), _with_act(inner[1], METHODS[function.attr].act)
        if function.attr in ("add", "add_") and len(node.args) == 1:
            found = self._left(function.value, node.args[0])
            if found is not None:
                return runtime("method", name, found[0], found[1]), replace(found[2], residual=True)
        return None

    def _sum(self, left: ast.expr, right: ast.expr) -> tuple[ast.expr, Trail] | None:
        inner = self._right(left, right)
        if inner is not None:
            return runtime("add_right", inner[0], inner[1]), replace(inner[2], residual=True)
        found = self._left(left, right)
        return found and (runtime("add", found[0], found[1]), replace(found[2], residual=True))

    def _added(self, function: ast.expr, left: ast.expr, right: ast.expr) -> tuple[ast.expr, Trail] | None:
        found = self._right(left, right) or self._left(left, right)
        return found and (runtime("add_function", function, found[0], found[1]), replace(found[2], residual=True))

    def _right(self, residual: ast.expr, node: ast.expr) -> tuple[ast.expr, ast.expr, Trail] | None:
        """residual + chain: the residual is evaluated first, which must not come between a variable and its use."""
        if self.held is not None and (mentions(residual, self.held.name) or not self.scope.is_path(residual)):
            return None
        inner = self.chain(node)
        if inner is None or inner[1].done or inner[1].residual:
            return None
        return self.plain(residual), inner[0], inner[1]

    def _left(self, node: ast.expr, residual: ast.expr) -> tuple[ast.expr, ast.expr, Trail] | None:
        """chain + residual: the residual is evaluated between the layer's place and the addition."""
        if self.held is not None and mentions(residual, self.held.name):
            return None
        inner = self.chain(node)
        if inner is None or inner[1].done or inner[1].residual:
            return None
        value = inner[0]
        if not self.scope.is_path(residual):
            if self.scope.reaches(ast.Expression(residual), inner[1].layers):
                return None
            value = runtime("keep", value)
        return value, self.plain(residual), inner[1]

    def _keywords(self, keywords: Iterable[ast.keyword]) -> list[ast.keyword]:
        return [ast.keyword(arg=k.arg, value=self.plain(k.value)) for k in keywords]

    def _children(self, node: ast.expr) -> ast.expr:
        new = copy.copy(node)
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                setattr(new, name, self.plain(value))
            elif isinstance(value, list):
                setattr(new, name, [self._item(item) for item in value])
        return new

    def _item(self, item: Any) -> Any:
        if isinstance(item, ast.keyword):
            return ast.keyword(arg=item.arg, value=self.plain(item.value))
        return self.plain(item) if isinstance(item, ast.expr) else item


def _with_act(trail: Trail, act: str | None) -> Trail:
    return trail if act is None else replace(trail, act=act, done=True)


def _is_alpha_of_one(keyword: ast.keyword) -> bool:
    return keyword.arg == "alpha" and isinstance(keyword.value, ast.Constant) and keyword.value.value == 1
