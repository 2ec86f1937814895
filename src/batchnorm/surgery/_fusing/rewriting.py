"""A method's source, rewritten so that act(BN(x) [+ residual]) runs as one transform.

A chain begins with the call of a batch norm layer (or of a module that ends in one), goes on through identities and
at most one addition, and may end with an activation; after an addition only with one that `follows_additions`.
Evaluation keeps its order: what Python evaluated before the layer ran still is, and what it evaluated between the
layer and the addition runs first only where the layer's input is out of its reach (`runtime.keep`).

From the statement that calls the layer on, a local variable may hold a `runtime.Deferred`. Three rules keep that from
being seen: whatever reads the variable in another way than a chain does is preceded by `variable = settle(variable)`;
so is whatever could change what the batch norm reads or skip its running statistics; and no variable is held back
across the end of a loop, a `try`, a `with` or the method.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.surgery._fusing.runtime import TAIL
from batchnorm.surgery._fusing.source import RUNTIME, UNKNOWN, Scope
from batchnorm.surgery._shared.activations import METHODS, activation_of, follows_additions
from batchnorm.surgery._shared.layers import FRESH

# A call's place in its file: line, column, last line, last column.
Site = tuple[int, int, int, int]
Block = list[ast.stmt]
EndsIn = Callable[[nn.Module], frozenset[nn.Module]]
"""The layers whose output a module returns unchanged."""


@dataclass(frozen=True)
class Trail:
    """A batch norm held back, and what has been joined to it so far; an activation ends it.

    `replaced` says that ours runs in the place of a function, `name` is the local variable that may hold it, `live`
    says whether one does on this instance.
    """

    sites: frozenset[Site]
    layers: frozenset[nn.Module]
    residual: bool = False
    act: str | None = None
    replaced: bool = False
    name: str = ""
    live: bool = True

    @property
    def fused(self) -> bool:
        """Whether it is worth rewriting."""
        return self.residual or self.act is not None or self.replaced

    def joined(self, other: Trail) -> Trail:
        """What is held back where either may have been taken."""
        residual, replaced = self.residual or other.residual, self.replaced or other.replaced
        sites, layers = self.sites | other.sites, self.layers | other.layers
        return replace(self, sites=sites, layers=layers, residual=residual, replaced=replaced)


Chain = tuple[ast.expr, Trail]
"""An expression rewritten, and what it holds back or has computed."""


class _CannotError(Exception):
    """The statement reads the variable in a way that a chain does not."""


class Rewritten(NamedTuple):
    """A method's new source, what it fuses, the layers that its value may hold back, and the modules it calls."""

    text: str
    fusions: list[Trail]
    tails: frozenset[nn.Module]
    relies_on: list[nn.Module]


def rewrite(scope: Scope, definition: ast.FunctionDef, ends_in: EndsIn, tail: bool) -> Rewritten | None:
    """None where there is nothing to fuse; with `tail`, the returned value may be held back."""
    given_up: frozenset[Site] = frozenset()
    while True:
        rewriter = _Rewriter(scope, definition, ends_in, given_up, tail)
        new = rewriter.rewritten()
        wanted = frozenset[Site]().union(*(trail.sites for trail in (*rewriter.fusions, *rewriter.tails)))
        if not rewriter.begun - wanted:
            break
        given_up |= rewriter.begun - wanted
    if not wanted:
        return None
    if tail:
        new.name = TAIL
    calls = [node for node in ast.walk(definition) if isinstance(node, ast.Call) and _place(node) in wanted]
    called = [scope.value(call.func) for call in calls]
    return Rewritten(
        ast.unparse(new) + "\n",
        rewriter.fusions,
        frozenset[nn.Module]().union(*(trail.layers for trail in rewriter.tails)),
        [module for module in called if isinstance(module, nn.Module)],
    )


class _Rewriter:
    """Rewrites one method: `fusions` has what is fused, `tails` what is returned held back, `begun` where chains begin.

    `live` says whether the code at hand runs on this instance, `held` is the variable that expressions may read,
    `maker` the variable that the statement before assigned from a module's call, and that module.
    """

    def __init__(
        self, scope: Scope, definition: ast.FunctionDef, ends_in: EndsIn, given_up: frozenset[Site], tail: bool
    ) -> None:
        self.scope, self.definition, self.ends_in, self.given_up, self.tail = scope, definition, ends_in, given_up, tail
        self.fusions: list[Trail] = []
        self.tails: list[Trail] = []
        self.begun: set[Site] = set()
        self.live = True
        self.held: Trail | None = None
        self.maker: tuple[str, ast.expr] | None = None
        self._holding = True
        self._previous: ast.stmt | None = None

    def rewritten(self) -> ast.FunctionDef:
        """The method's definition."""
        body, held = self._block(self.definition.body, None)
        new = copy.copy(self.definition)
        new.body = [*body, *self._settled(held)]
        new.returns = None
        return ast.fix_missing_locations(new)

    # --- expressions --------------------------------------------------------------------------------------------------

    def _plain(self, node: Any) -> Any:
        """The expression with the fusions inside it; its value is what it was."""
        if not isinstance(node, ast.expr | ast.keyword) or isinstance(node, _OTHER_SCOPES):
            return node
        found = self._chain(node)
        if found is not None and (found[1].fused or isinstance(node, ast.Name)):
            return self._computed(*found)
        new = copy.copy(node)
        for name, value in ast.iter_fields(node):
            setattr(new, name, [*map(self._plain, value)] if isinstance(value, list) else self._plain(value))
        return new

    def _apart(self, node: ast.expr) -> ast.expr:
        """`_plain` of an expression that reads no variable held back."""
        self.held = self.maker = None
        return self._plain(node)  # type: ignore[no-any-return]

    def _computed(self, node: ast.expr, trail: Trail) -> ast.expr:
        self._note(trail)
        return node if trail.act is not None else _runtime("settle", node)

    def _note(self, trail: Trail) -> None:
        if trail.fused and self.live:
            self.fusions.append(trail)

    def _chain(self, node: ast.AST) -> Chain | None:
        """None where the expression is no chain."""
        match node:
            case ast.Name():
                return (node, self.held) if self.held is not None and node.id == self.held.name else None
            case ast.BinOp(op=ast.Add()):
                return self._added(("add", _OPERATORS["add"]), (node.right, node.left), (node.left, node.right))
            case ast.Call() if not any(isinstance(a, ast.Starred) for a in node.args):
                return self._call(node) if all(k.arg is not None for k in node.keywords) else None
        return None

    def _call(self, node: ast.Call) -> Chain | None:
        called = self.scope.value(node.func)
        begun = self._begin(node, called)
        if begun is not None:
            return begun
        added = all(k.arg == "alpha" and getattr(k.value, "value", None) == 1 for k in node.keywords)
        match node.args:
            case [left, right] if called is torch.add and added:
                return self._added(("add", node.func), (right, left), (left, right))
            case [argument, *_] if called is not UNKNOWN:
                return self._applied(node, called, argument)
        if not isinstance(node.func, ast.Attribute):
            return None
        name, owner = node.func.attr, node.func.value
        if name in METHODS and not node.args and not node.keywords:
            inner = self._chain(owner)
            if inner is not None and inner[1].act is None:
                return _runtime("method", ast.Constant(name), inner[0]), replace(inner[1], act=METHODS[name].act)
        if name in ("add", "add_") and len(node.args) == 1 and added:
            return self._added(("method", ast.Constant(name)), (owner, node.args[0]))
        return None

    def _begin(self, node: ast.Call, called: Any) -> Chain | None:
        site = _place(node)
        if site in self.given_up or not node.args:
            return None
        layers = self.ends_in(called) if isinstance(called, nn.Module) else frozenset()
        if called is not F.batch_norm and not layers:
            return None
        self.begun.add(site)
        arguments, keywords = [*map(self._plain, node.args)], [*map(self._plain, node.keywords)]
        if called is F.batch_norm:
            trail = Trail(frozenset([site]), frozenset([self.scope.instance]), replaced=True)
            return _runtime("defer_function", node.func, *arguments, keywords=keywords), trail
        first, maker = node.args[0], _maker(self.scope, node.args[0])
        if isinstance(first, ast.Name) and self.maker is not None and self.maker[0] == first.id:
            maker = self.maker[1]
        held = _runtime("defer", maker or ast.Constant(None), node.func, *arguments, keywords=keywords)
        return held, Trail(frozenset([site]), layers)

    def _applied(self, node: ast.Call, called: Any, argument: ast.expr) -> Chain | None:
        inner = self._chain(argument)
        if inner is None or inner[1].act is not None:
            return None
        settings = [self.scope.value(a) for a in node.args[1:]]
        named = {str(k.arg): self.scope.value(k.value) for k in node.keywords}
        if any(value is UNKNOWN for value in (*settings, *named.values())):
            return None
        activation = activation_of(called, tuple(settings), named)
        if activation is None or (inner[1].residual and not follows_additions(activation)):
            return None
        applied = _runtime("apply", node.func, inner[0], *node.args[1:], keywords=node.keywords)
        return applied, replace(inner[1], act=activation.act)

    def _added(self, call: tuple[str, ast.expr], *orders: tuple[ast.expr, ast.expr]) -> Chain | None:
        """chain + residual, by a runtime's function and its first argument; `orders` are the ways to read it.

        A residual that Python evaluates before the chain must not come between a variable and its use; one after it
        runs between the layer's place and the addition.
        """
        for node, residual in orders:
            first, path = (node, residual) != orders[-1], self.scope.is_path(residual)
            if self.held is not None and (_uses(residual, self.held.name) or (first and not path)):
                continue
            inner = self._chain(node)
            if inner is None or inner[1].act is not None or inner[1].residual:
                continue
            value, trail = inner
            if not first and not path:
                if self.scope.reaches(ast.Expression(residual), trail.layers):
                    continue
                value = _runtime("keep", value)
            other = self._plain(residual)
            return _runtime(*call, *((other, value) if first else (value, other))), replace(trail, residual=True)
        return None

    # --- statements ---------------------------------------------------------------------------------------------------

    def _block(self, statements: Block, held: Trail | None) -> tuple[Block, Trail | None]:
        new: Block = []
        for statement in statements:
            rewritten, held = self._statement(statement, held)
            new += rewritten
            self._previous = statement
        return new, held

    def _statement(self, statement: ast.stmt, held: Trail | None) -> tuple[Block, Trail | None]:
        if held is not None:
            fusions, tails = len(self.fusions), len(self.tails)
            self.maker = None
            with self._alive(held.live):
                try:
                    return self._under(statement, held)
                except _CannotError:
                    del self.fusions[fusions:], self.tails[tails:]
                    first = self._settled(held)
            rest, after = self._statement(statement, None)
            return [*first, *rest], after
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)]):
                self._note_maker(statement, target)
                return self._assigned(statement, target, None)
            case ast.Return(value=ast.expr()):
                self._note_maker(statement, None)
                return [self._returned(statement, None)], None
            case ast.If():
                return self._if(statement, None)
            case ast.For() | ast.While() | ast.With() | ast.Try():
                return [self._nested(statement)], None
            case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Expr() if statement.value is not None:
                new = copy.copy(statement)
                new.value = self._apart(statement.value)
                return [new], None
        return [statement], None

    def _under(self, statement: ast.stmt, held: Trail) -> tuple[Block, Trail | None]:
        """A statement while a variable is held back."""
        name = held.name
        match statement:
            case ast.AugAssign(target=ast.Name(id=target), op=ast.Add(), value=value) if target == name:
                self.held = held
                found = self._added(("add", _OPERATORS["iadd"]), (ast.Name(name, ast.Load()), value))
                if found is None:
                    raise _CannotError
                return [_assign(name, found[0], statement)], found[1]
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if _uses(value, name):
                if target != name and _uses(self.definition, name) != 2:
                    raise _CannotError
                first = [] if self._comes_first(value, name) else self._kept(held, statement)
                new, now = self._assigned(statement, target, held)
                return [*first, *new], now
            case ast.Return(value=ast.expr() as value) if _uses(value, name):
                first = [] if self._comes_first(value, name) else self._kept(held, statement)
                return [*first, self._returned(statement, held)], None
            case ast.If(test=test) if not _uses(test, name):
                if any(isinstance(node, ast.Break | ast.Continue) for node in ast.walk(statement)):
                    raise _CannotError
                first = self._kept(held, test)
                new, now = self._if(statement, held)
                return [*first, *new], now
            case ast.Assign(targets=[ast.Name()], value=value) if not _uses(statement, name):
                first = self._kept(held, value)
                between = copy.copy(statement)
                between.value = self._apart(value)
                return [*first, between], held
            case ast.Pass():
                return [statement], held
        raise _CannotError

    def _value(self, node: ast.expr, held: Trail | None) -> tuple[ast.expr, Trail | None]:
        """The expression, and what it holds back; where a variable is held, the expression must read it just once."""
        if isinstance(node, ast.IfExp):
            return self._choice(node, held)
        self.held = held
        if held is not None and _uses(node, held.name) != 1:
            raise _CannotError
        found = self._chain(node)
        if found is None:
            return self._plain(node), None
        if found[1].act is None:
            return found
        self._note(found[1])
        return found[0], None

    def _choice(self, node: ast.IfExp, held: Trail | None) -> tuple[ast.expr, Trail | None]:
        if held is not None and _uses(node.test, held.name):
            raise _CannotError
        truth = self.scope.truth(node.test)
        with self._alive(truth is not False):
            body, one = self._value(node.body, held)
        with self._alive(truth is not True):
            orelse, other = self._value(node.orelse, held)
        new = ast.copy_location(ast.IfExp(self._apart(node.test), body, orelse), node)
        if truth is None:
            return new, one.joined(other) if one is not None and other is not None else one or other
        first, second = (one, other) if truth else (other, one)
        return new, first if first is not None or second is None else replace(second, residual=False)

    def _assigned(self, statement: ast.Assign, target: str, held: Trail | None) -> tuple[Block, Trail | None]:
        value, trail = self._value(statement.value, held)
        if trail is not None and not (self._holding and target in self.scope.locals and target not in self.scope.cells):
            value, trail = self._computed(value, trail), None
        return [_assign(target, value, statement)], trail and replace(trail, name=target, live=self.live)

    def _returned(self, statement: ast.Return, held: Trail | None) -> ast.stmt:
        assert statement.value is not None
        value, trail = self._value(statement.value, held)
        if trail is not None:
            self._note(trail)
            tail = self.tail and self._holding
            if tail and not trail.residual and self.live:
                self.tails.append(trail)
            value = _runtime("tail" if tail else "settle", value)
        return ast.copy_location(ast.Return(value), statement)

    def _if(self, statement: ast.If, held: Trail | None) -> tuple[Block, Trail | None]:
        truth = self.scope.truth(statement.test)
        new = copy.copy(statement)
        new.test = self._apart(statement.test)
        previous = self._previous if self.scope.calls_nothing(statement.test) else None
        ends: list[tuple[Trail, bool, Block]] = []
        for arm, live in (("body", truth is not False), ("orelse", truth is not True)):
            self._previous = previous
            with self._alive(live):
                block, end = self._block(getattr(statement, arm), held)
            setattr(new, arm, block)
            if end is not None:
                ends.append((end, live, block))
        if not ends:
            return [new], None
        name = (held or max(ends, key=lambda each: each[1])[0]).name
        for end, live, block in ends:
            if end.name != name:
                with self._alive(live):
                    block += self._settled(end)
        ends = [each for each in ends if each[0].name == name]
        if not ends:
            return [new], None
        lives = [end for end, live, _ in ends if live and end.live]
        return [new], replace(reduce(Trail.joined, lives or [ends[0][0]]), live=bool(lives))

    def _nested(self, statement: ast.stmt) -> ast.stmt:
        """Its end settles every variable; a `with` or a `try` holds none back, since the batch norm must run there."""
        new: Any = copy.copy(statement)
        for name in ("iter", "test"):
            if hasattr(statement, name):
                setattr(new, name, self._apart(getattr(statement, name)))
        before, self._holding = self._holding, self._holding and isinstance(statement, ast.For | ast.While)
        for arm in ("body", "orelse", "finalbody"):
            if hasattr(statement, arm):
                self._previous = None
                block, held = self._block(getattr(statement, arm), None)
                setattr(new, arm, [*block, *self._settled(held)])
        self._holding = before
        return new  # type: ignore[no-any-return]

    # --- what keeps it right ------------------------------------------------------------------------------------------

    @contextmanager
    def _alive(self, live: bool) -> Iterator[None]:
        before = self.live
        self.live = before and live
        try:
            yield
        finally:
            self.live = before

    def _settled(self, held: Trail | None) -> Block:
        if held is None:
            return []
        with self._alive(held.live):
            self._note(held)
        return [_assign(held.name, _runtime("settle", ast.Name(held.name, ast.Load())), self.definition)]

    def _kept(self, held: Trail, between: ast.expr | ast.stmt) -> Block:
        """Before code that runs while the variable is held back: nothing where that code is only names and tests."""
        if isinstance(between, ast.expr) and self.scope.calls_nothing(between):
            return []
        whole = ast.Expression(between) if isinstance(between, ast.expr) else between
        if self.scope.reaches(whole, held.layers):
            raise _CannotError
        return [_assign(held.name, _runtime("keep", ast.Name(held.name, ast.Load())), self.definition)]

    def _comes_first(self, node: ast.expr, name: str) -> bool:
        """Whether the variable is the first thing that evaluating the expression comes to, besides names and tests."""
        match node:
            case ast.Name():
                return node.id == name
            case ast.IfExp(test=test, body=body, orelse=orelse):
                arms = self._comes_first(body, name) and self._comes_first(orelse, name)
                return arms and self.scope.calls_nothing(test)
            case ast.BinOp(left=left, right=right):
                if _uses(left, name):
                    return self._comes_first(left, name)
                return self.scope.is_path(left) and self._comes_first(right, name)
            case ast.Call(func=ast.Attribute(value=inner)) if _uses(node.func, name):
                return self._comes_first(inner, name)
            case ast.Call() if self.scope.is_path(node.func):
                first = next((a for a in node.args if _uses(a, name) or not self.scope.is_path(a)), None)
                return first is not None and self._comes_first(first, name)
        return False

    def _note_maker(self, statement: ast.Assign | ast.Return, target: str | None) -> None:
        """The module that made the variable which this statement uses up, where the statement before shows it."""
        self.maker = None
        match self._previous:
            case ast.Assign(targets=[ast.Name(id=made)], value=value):
                used_up = _uses(statement, made) == (1 if target is None else 2) and target in (None, made)
                maker = _maker(self.scope, value)
                if used_up and maker is not None and made not in self.scope.cells:
                    self.maker = made, maker


_OTHER_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _runtime(name: str, *arguments: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.Call:
    """A call of `batchnorm.surgery._fusing.runtime`'s function of that name."""
    function = ast.Attribute(ast.Name(RUNTIME, ast.Load()), name, ast.Load())
    return ast.Call(func=function, args=list(arguments), keywords=list(keywords))


_OPERATORS = {
    name: ast.Attribute(ast.Attribute(ast.Name(RUNTIME, ast.Load()), "operator", ast.Load()), name, ast.Load())
    for name in ("add", "iadd")
}


def _assign(name: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), where)


def _place(node: ast.expr) -> Site:
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def _uses(node: ast.AST, name: str) -> int:
    """How often a variable occurs."""
    return sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def _maker(scope: Scope, node: ast.expr) -> ast.expr | None:
    """The module of a call that returns new memory."""
    return node.func if isinstance(node, ast.Call) and type(scope.value(node.func)) in FRESH else None
