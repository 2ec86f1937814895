"""A method's statements, rewritten so that a batch norm may be held back in a local variable until it can be fused.

From the statement that calls the layer on, the variable may hold a `runtime.Deferred`. Three rules keep that from
being seen: whatever reads the variable in another way than a chain does is preceded by `variable = settle(variable)`;
so is whatever could change what the batch norm reads or skip its running statistics; and no variable is held back
across the end of a loop, a `try`, a `with` or the method.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from batchnorm.surgery._fusing.expressions import (
    Chains,
    Held,
    Known,
    Trail,
    mentions,
    runtime,
    uses,
)
from batchnorm.surgery._fusing.source import Scope


def calls_nothing(scope: Scope, node: ast.expr) -> bool:
    """Whether evaluating it runs no code that could matter."""
    if isinstance(node, ast.Compare):
        plain = all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
        return plain and all(calls_nothing(scope, n) for n in (node.left, *node.comparators))
    if isinstance(node, ast.BoolOp):
        return all(calls_nothing(scope, value) for value in node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return calls_nothing(scope, node.operand)
    return scope.is_path(node)


def direct(scope: Scope, node: ast.expr, name: str) -> bool:
    """Whether the variable is the first thing that evaluating the expression comes to, besides names and tests."""
    match node:
        case ast.Name():
            return node.id == name
        case ast.IfExp():
            arms = all(direct(scope, arm, name) for arm in (node.body, node.orelse))
            return calls_nothing(scope, node.test) and arms
        case ast.BinOp():
            if mentions(node.left, name):
                return direct(scope, node.left, name)
            return scope.is_path(node.left) and direct(scope, node.right, name)
        case ast.Call(func=ast.Attribute(value=inner)) if mentions(node.func, name):
            return direct(scope, inner, name)
        case ast.Call() if scope.is_path(node.func):
            for argument in node.args:
                if mentions(argument, name):
                    return direct(scope, argument, name)
                if not scope.is_path(argument):
                    return False
    return False


def leaves(statement: ast.stmt) -> bool:
    """Whether a break or a continue in it may skip what follows."""
    return any(isinstance(node, ast.Break | ast.Continue) for node in ast.walk(statement))


Block = list[ast.stmt]


class _CannotError(Exception):
    """The statement reads the variable in a way that a chain does not."""


class Statements:
    """Rewrites one method; with `tail`, its returned value may be held back, and `tails` says for which layers."""

    def __init__(self, known: Known, definition: ast.FunctionDef, *, tail: bool) -> None:
        self.known, self.definition, self.tail = known, definition, tail
        self.chains = Chains(known)
        self.tails: list[Trail] = []
        self._holding = True
        self._previous: ast.stmt | None = None

    def rewritten(self) -> ast.FunctionDef:
        """The method's definition."""
        body, held = self._block(self.definition.body, None)
        new = copy.copy(self.definition)
        new.body = [*body, *self._settled(held)]
        new.returns = None
        return ast.fix_missing_locations(new)

    def _block(self, statements: Block, held: Held | None) -> tuple[Block, Held | None]:
        new: Block = []
        for statement in statements:
            rewritten, held = self._statement(statement, held)
            new += rewritten
            self._previous = statement
        return new, held

    def _statement(self, statement: ast.stmt, held: Held | None) -> tuple[Block, Held | None]:
        if held is not None:
            fusions, tails = len(self.known.fusions), len(self.tails)
            self.chains.maker = None
            with self._alive(held.live):
                try:
                    return self._under(statement, held)
                except _CannotError:
                    del self.known.fusions[fusions:], self.tails[tails:]
                    first = self._settled(held)
            rest, after = self._statement(statement, None)
            return [*first, *rest], after
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)]):
                self._note_maker(statement, target)
                return self._assigned(statement, target, *self._expression(statement.value, None))
            case ast.Return(value=ast.expr() as value):
                self._note_maker(statement, None)
                return [self._returned(statement, *self._expression(value, None))], None
            case ast.If():
                return self._if(statement, None)
            case ast.For() | ast.While():
                return [self._loop(statement)], None
            case ast.With() | ast.Try():
                return [self._guarded(statement)], None
            case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Expr() if statement.value is not None:
                new = copy.copy(statement)
                new.value, _ = self._settled_expression(statement.value)
                return [new], None
        return [statement], None

    def _under(self, statement: ast.stmt, held: Held) -> tuple[Block, Held | None]:
        """A statement while a variable is held back."""
        name = held.name
        match statement:
            case ast.AugAssign(target=ast.Name(id=target), op=ast.Add()) if target == name:
                if mentions(statement.value, name):
                    raise _CannotError
                first = self._kept(held, [statement.value])
                self.chains.held = None
                added = runtime("add_in_place", ast.Name(name, ast.Load()), self.chains.plain(statement.value))
                after = replace(held, trail=replace(held.trail, residual=True))
                return [*first, _assign(name, added, statement)], after
            case ast.Assign(targets=[ast.Name(id=target)]) if mentions(statement.value, name):
                if target != name and uses(self.definition, name) != 2:
                    raise _CannotError
                first = [] if direct(self.known.scope, statement.value, name) else self._kept(held, [statement])
                new, now = self._assigned(statement, target, *self._expression(statement.value, held))
                return [*first, *new], now
            case ast.Return(value=ast.expr() as value) if mentions(value, name):
                first = [] if direct(self.known.scope, value, name) else self._kept(held, [statement])
                return [*first, self._returned(statement, *self._expression(value, held))], None
            case ast.If() if not mentions(statement.test, name) and not leaves(statement):
                first = self._kept(held, [statement.test])
                new, now = self._if(statement, held)
                return [*first, *new], now
            case ast.Assign(targets=[ast.Name()]) if not mentions(statement, name):
                first = self._kept(held, [statement.value])
                self.chains.held = None
                between = copy.copy(statement)
                between.value = self.chains.plain(statement.value)
                return [*first, between], held
            case ast.Pass():
                return [statement], held
        raise _CannotError

    # --- expressions --------------------------------------------------------------------------------------------------

    def _expression(self, node: ast.expr, held: Held | None) -> tuple[ast.expr, Trail | None]:
        """The expression, and what it holds back; where a variable is held, the expression must read it just once."""
        if isinstance(node, ast.IfExp):
            return self._choice(node, held)
        self.chains.held = held
        if held is not None and uses(node, held.name) != 1:
            raise _CannotError
        found = self.chains.chain(node)
        if found is not None:
            if found[1].done:
                self.chains.note(found[1])
            return found[0], None if found[1].done else found[1]
        return self.chains.plain(node), None

    def _choice(self, node: ast.IfExp, held: Held | None) -> tuple[ast.expr, Trail | None]:
        if held is not None and mentions(node.test, held.name):
            raise _CannotError
        truth = self.known.scope.truth(node.test)
        with self._alive(truth is not False):
            body, one = self._expression(node.body, held)
        with self._alive(truth is not True):
            orelse, other = self._expression(node.orelse, held)
        self.chains.held = None
        new = ast.copy_location(ast.IfExp(self.chains.plain(node.test), body, orelse), node)
        if truth is not None:
            first, second = (one, other) if truth else (other, one)
            return new, first if first is not None or second is None else replace(second, residual=False)
        return new, one.joined(other) if one is not None else other

    def _settled_expression(self, node: ast.expr) -> tuple[ast.expr, None]:
        self.chains.held = None
        self.chains.maker = None
        return self.chains.plain(node), None

    def _assigned(
        self, statement: ast.Assign, target: str, value: ast.expr, trail: Trail | None
    ) -> tuple[Block, Held | None]:
        scope = self.known.scope
        if trail is not None and not (self._holding and target in scope.locals and target not in scope.cells):
            value, trail = self.chains.settled(value, trail), None
        held = None if trail is None else Held(target, trail, self.chains.live)
        return [_assign(target, value, statement)], held

    def _returned(self, statement: ast.Return, value: ast.expr, trail: Trail | None) -> ast.stmt:
        if trail is not None:
            self.chains.note(trail)
            tail = self.tail and self._holding
            if tail and not trail.residual and self.chains.live:
                self.tails.append(trail)
            value = runtime("tail" if tail else "settle", value)
        return ast.copy_location(ast.Return(value), statement)

    # --- statements that hold statements ------------------------------------------------------------------------------

    def _if(self, statement: ast.If, held: Held | None) -> tuple[Block, Held | None]:
        truth = self.known.scope.truth(statement.test)
        new = copy.copy(statement)
        self.chains.held = None
        self.chains.maker = None
        new.test = self.chains.plain(statement.test)
        previous = self._previous if calls_nothing(self.known.scope, statement.test) else None
        ends: list[tuple[Held | None, bool]] = []
        for arm, live in (("body", truth is not False), ("orelse", truth is not True)):
            self._previous = previous
            with self._alive(live):
                block, end = self._block(getattr(statement, arm), held)
            ends.append((end, live))
            setattr(new, arm, block)
        found = [end for end, live in sorted(ends, key=lambda pair: not pair[1]) if end is not None]
        if not found:
            return [new], None
        name = held.name if held is not None else found[0].name
        for arm, (end, live) in zip(("body", "orelse"), ends, strict=True):
            if end is not None and end.name != name:
                with self._alive(live):
                    getattr(new, arm).extend(self._settled(end))
        after = [(end, live) for end, live in ends if end is not None and end.name == name]
        if not after:
            return [new], None
        lives = [end for end, live in after if live and end.live]
        trail = (lives or [end for end, _ in after])[0].trail
        for end in lives[1:]:
            trail = trail.joined(end.trail)
        return [new], Held(name, trail, bool(lives))

    def _loop(self, statement: ast.For | ast.While) -> ast.stmt:
        new = copy.copy(statement)
        self.chains.held = None
        self.chains.maker = None
        if isinstance(new, ast.For):
            new.iter = self.chains.plain(new.iter)
        else:
            new.test = self.chains.plain(new.test)
        for arm in ("body", "orelse"):
            self._previous = None
            block, held = self._block(getattr(statement, arm), None)
            setattr(new, arm, [*block, *self._settled(held)])
        return new

    def _guarded(self, statement: ast.With | ast.Try) -> ast.stmt:
        """Nothing is held back from one statement to the next, nor returned: the batch norm runs in here."""
        new = copy.copy(statement)
        before, self._holding = self._holding, False
        for arm in ("body", "orelse", "finalbody"):
            if hasattr(statement, arm):
                self._previous = None
                setattr(new, arm, self._block(getattr(statement, arm), None)[0])
        self._holding = before
        return new

    # --- what keeps it right ------------------------------------------------------------------------------------------

    @contextmanager
    def _alive(self, live: bool) -> Iterator[None]:
        before = self.chains.live
        self.chains.live = before and live
        try:
            yield
        finally:
            self.chains.live = before

    def _settled(self, held: Held | None) -> Block:
        if held is None:
            return []
        with self._alive(held.live):
            self.chains.note(held.trail)
        return [_assign(held.name, runtime("settle", ast.Name(held.name, ast.Load())), self.definition)]

    def _kept(self, held: Held, between: Iterable[ast.AST]) -> Block:
        """Before code that runs while the variable is held back: nothing where that code is only names and tests."""
        for node in between:
            if isinstance(node, ast.expr) and calls_nothing(self.known.scope, node):
                continue
            wrapped = ast.Expression(node) if isinstance(node, ast.expr) else node
            if self.known.scope.reaches(wrapped, held.trail.layers):
                raise _CannotError
            return [_assign(held.name, runtime("keep", ast.Name(held.name, ast.Load())), self.definition)]
        return []

    def _note_maker(self, statement: ast.Assign | ast.Return, target: str | None) -> None:
        """The module that made the variable which this statement uses up, where the statement before shows it."""
        self.chains.maker = None
        match self._previous:
            case ast.Assign(targets=[ast.Name(id=made)], value=value):
                used_up = uses(statement, made) == (1 if target is None else 2) and target in (None, made)
                maker = self.chains.makes(value)
                if used_up and maker is not None and made not in self.known.scope.cells:
                    self.chains.maker = made, maker


def _assign(name: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), where)


def layers_of(trails: Iterable[Trail]) -> frozenset[nn.Module]:
    """All layers of some trails."""
    return frozenset().union(*(trail.layers for trail in trails))
