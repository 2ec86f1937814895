"""Find chains in expressions, and rewrite them: act(BN(x) [+ residual]) as calls of `runtime`."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.surgery._fusing.source import RUNTIME, UNKNOWN, Scope
from batchnorm.surgery._shared.activations import METHODS, activation_of, can_follow_addition
from batchnorm.surgery._shared.layers import FRESH

# A call's place in its file: line, column, last line, last column.
Site = tuple[int, int, int, int]
EndsIn = Callable[[nn.Module], frozenset[nn.Module]]
"""The layers whose output a module returns unchanged."""


@dataclass(frozen=True)
class Trail:
    """A deferred batch norm, and what is fused with it so far; an activation ends it.

    `replaced`: our layer replaces a function. `name`: the local variable that may be deferred. `live`: whether it is
    deferred on this instance.
    """

    sites: frozenset[Site]
    layers: frozenset[nn.Module]
    residual: bool = False
    act: str | None = None
    replaced: bool = False
    name: str = ""
    live: bool = True

    @property
    def is_fused(self) -> bool:
        """Whether rewriting gains anything."""
        return self.residual or self.act is not None or self.replaced

    def joined(self, other: Trail) -> Trail:
        """The trail after two branches, either of which may have run."""
        residual, replaced = self.residual or other.residual, self.replaced or other.replaced
        sites, layers = self.sites | other.sites, self.layers | other.layers
        return replace(self, sites=sites, layers=layers, residual=residual, replaced=replaced)


Chain = tuple[ast.expr, Trail]
"""A rewritten expression, and what it defers or computes."""


class Chains:
    """Rewrites the expressions of one method: `fusions` are fused, `begun` are the calls where chains begin.

    `live`: whether the current code runs on this instance. `deferred`: the variable that expressions may read. `maker`:
    the variable that the previous statement assigned from a module's call, and that module.
    """

    def __init__(self, scope: Scope, ends_in: EndsIn, given_up: set[Site]) -> None:
        self.scope, self.ends_in, self.given_up = scope, ends_in, given_up
        self.fusions: list[Trail] = []
        self.begun: dict[Site, Any] = {}
        self.live = True
        self.deferred: Trail | None = None
        self.maker: tuple[str, ast.expr] | None = None

    def rewrite(self, node: Any) -> Any:
        """The expression with fusions inside; its value does not change."""
        if not isinstance(node, ast.expr | ast.keyword) or isinstance(node, _OTHER_SCOPES):
            return node
        chain = self.chain(node)
        if chain is not None and (chain[1].is_fused or isinstance(node, ast.Name)):
            return self.compute(*chain)
        new = copy.copy(node)
        for name, value in ast.iter_fields(node):
            setattr(new, name, [*map(self.rewrite, value)] if isinstance(value, list) else self.rewrite(value))
        return new

    def rewrite_other(self, node: ast.expr) -> ast.expr:
        """`rewrite` an expression that reads no deferred variable."""
        self.deferred = self.maker = None
        return self.rewrite(node)  # type: ignore[no-any-return]

    def compute(self, node: ast.expr, trail: Trail) -> ast.expr:
        self.note(trail)
        return node if trail.act is not None else runtime_call("settle", node)

    def note(self, trail: Trail) -> None:
        if trail.is_fused and self.live:
            self.fusions.append(trail)

    def chain(self, node: ast.AST) -> Chain | None:
        """The chain of an expression, or None."""
        match node:
            case ast.Name():
                return (node, self.deferred) if self.deferred is not None and node.id == self.deferred.name else None
            case ast.BinOp(op=ast.Add()):
                return self.add(("add", OPERATORS["add"]), (node.right, node.left), (node.left, node.right))
            case ast.Call() if not any(isinstance(a, ast.Starred) for a in node.args):
                return self._call(node) if all(k.arg is not None for k in node.keywords) else None
        return None

    def _call(self, node: ast.Call) -> Chain | None:
        called = self.scope.value(node.func)
        begun = self._begin_chain(node, called)
        if begun is not None:
            return begun
        added = all(k.arg == "alpha" and getattr(k.value, "value", None) == 1 for k in node.keywords)
        match node.args:
            case [left, right] if called is torch.add and added:
                return self.add(("add", node.func), (right, left), (left, right))
            case [argument, *_] if called is not UNKNOWN:
                return self._apply(node, called, argument)
        if not isinstance(node.func, ast.Attribute):
            return None
        name, owner = node.func.attr, node.func.value
        if name in METHODS and not node.args and not node.keywords:
            inner = self.chain(owner)
            if inner is not None and inner[1].act is None:
                return runtime_call("method", ast.Constant(name), inner[0]), replace(inner[1], act=METHODS[name].act)
        if name in ("add", "add_") and len(node.args) == 1 and added:
            return self.add(("method", ast.Constant(name)), (owner, node.args[0]))
        return None

    def _begin_chain(self, node: ast.Call, called: Any) -> Chain | None:
        site = _place(node)
        if site in self.given_up or not node.args:
            return None
        layers = self.ends_in(called) if isinstance(called, nn.Module) else frozenset()
        if called is not F.batch_norm and not layers:
            return None
        self.begun[site] = called
        arguments, keywords = [*map(self.rewrite, node.args)], [*map(self.rewrite, node.keywords)]
        if called is F.batch_norm:
            trail = Trail(frozenset([site]), frozenset([self.scope.instance]), replaced=True)
            return runtime_call("defer_function", node.func, *arguments, keywords=keywords), trail
        first, maker = node.args[0], maker_of(self.scope, node.args[0])
        if isinstance(first, ast.Name) and self.maker is not None and self.maker[0] == first.id:
            maker = self.maker[1]
        deferred = runtime_call("defer", maker or ast.Constant(None), node.func, *arguments, keywords=keywords)
        return deferred, Trail(frozenset([site]), layers)

    def _apply(self, node: ast.Call, called: Any, argument: ast.expr) -> Chain | None:
        inner = self.chain(argument)
        if inner is None or inner[1].act is not None:
            return None
        settings = [self.scope.value(a) for a in node.args[1:]]
        named = {str(k.arg): self.scope.value(k.value) for k in node.keywords}
        if any(value is UNKNOWN for value in (*settings, *named.values())):
            return None
        activation = activation_of(called, tuple(settings), named)
        if activation is None or (inner[1].residual and not can_follow_addition(activation)):
            return None
        applied = runtime_call("apply", node.func, inner[0], *node.args[1:], keywords=node.keywords)
        return applied, replace(inner[1], act=activation.act)

    def add(self, call: tuple[str, ast.expr], *orders: tuple[ast.expr, ast.expr]) -> Chain | None:
        """chain + residual, by a runtime function and its first argument; `orders` are the possible operand orders.

        A residual that Python evaluates before the chain must not come between a variable and its use. One evaluated
        after it runs between the layer and the addition.
        """
        for node, residual in orders:
            first, path = (node, residual) != orders[-1], self.scope.is_path(residual)
            if self.deferred is not None and (uses(residual, self.deferred.name) or (first and not path)):
                continue
            inner = self.chain(node)
            if inner is None or inner[1].act is not None or inner[1].residual:
                continue
            value, trail = inner
            if not first and not path:
                if self.scope.may_run(ast.Expression(residual), trail.layers):
                    continue
                value = runtime_call("keep", value)
            other = self.rewrite(residual)
            return runtime_call(*call, *((other, value) if first else (value, other))), replace(trail, residual=True)
        return None


_OTHER_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def runtime_call(name: str, *arguments: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.Call:
    """A call of a function of `batchnorm.surgery._fusing.runtime`."""
    function = ast.Attribute(ast.Name(RUNTIME, ast.Load()), name, ast.Load())
    return ast.Call(func=function, args=list(arguments), keywords=list(keywords))


OPERATORS = {
    name: ast.Attribute(ast.Attribute(ast.Name(RUNTIME, ast.Load()), "operator", ast.Load()), name, ast.Load())
    for name in ("add", "iadd")
}


def _place(node: ast.expr) -> Site:
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def uses(node: ast.AST, name: str) -> int:
    """How often a variable occurs."""
    return sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def maker_of(scope: Scope, node: ast.expr) -> ast.expr | None:
    """The module in a module call that returns new memory."""
    return node.func if isinstance(node, ast.Call) and type(scope.value(node.func)) in FRESH else None
