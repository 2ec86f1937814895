"""Rewrite a method's source so that act(BN(x) [+ residual]) runs as one transform.

A chain begins with the call of a batch norm layer (or of a module that ends in one), continues through identities and
at most one addition, and may end with an activation; after an addition only one that `can_follow_addition`. The order
of evaluation is preserved: code before the layer runs before it, and code between the layer and the addition runs
first only if it cannot change the layer's input (`runtime.keep`).

After the statement that calls the layer, a local variable may be a `runtime.Deferred`. Three rules hide that from other
code. Any statement that is not part of a chain and reads the variable is preceded by `variable = settle(variable)`. So
is any code that could change what the batch norm reads, or skip its running statistics. No variable is deferred across
the end of a loop, a `try`, a `with` or the method.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

from torch import nn

from batchnorm.surgery._fusing.chains import OPERATORS, Chains, EndsIn, Site, Trail, maker_of, runtime_call, uses
from batchnorm.surgery._fusing.runtime import TAIL
from batchnorm.surgery._fusing.source import Scope

Block = list[ast.stmt]


class _CannotError(Exception):
    """The statement reads the deferred variable outside of a chain."""


class Rewritten(NamedTuple):
    """A method's new source, its fusions, the layers that its value may defer, and the modules it calls."""

    text: str
    fusions: list[Trail]
    tails: frozenset[nn.Module]
    relies_on: list[nn.Module]


def rewrite(scope: Scope, definition: ast.FunctionDef, ends_in: EndsIn, tail: bool) -> Rewritten | None:
    """Rewrite a method, or return None if nothing fuses; with `tail`, the returned value may be deferred."""
    given_up: set[Site] = set()
    while True:
        rewriter = _Rewriter(scope, definition, ends_in, given_up, tail)
        new = rewriter.rewritten()
        useless = rewriter.begun.keys() - {s for trail in (*rewriter.fusions, *rewriter.tails) for s in trail.sites}
        if not useless:
            break
        given_up |= useless
    if not rewriter.begun:
        return None
    if tail:
        new.name = TAIL
    tails = frozenset(layer for trail in rewriter.tails for layer in trail.layers)
    relies_on = [called for called in rewriter.begun.values() if isinstance(called, nn.Module)]
    return Rewritten(ast.unparse(new) + "\n", rewriter.fusions, tails, relies_on)


class _Rewriter(Chains):
    """Rewrites the statements of one method: `tails` are returned deferred."""

    def __init__(
        self, scope: Scope, definition: ast.FunctionDef, ends_in: EndsIn, given_up: set[Site], tail: bool
    ) -> None:
        super().__init__(scope, ends_in, given_up)
        self.definition, self.tail = definition, tail
        self.tails: list[Trail] = []
        self._may_defer = True
        self._previous: ast.stmt | None = None

    def rewritten(self) -> ast.FunctionDef:
        """The method's definition."""
        body, deferred = self._block(self.definition.body, None)
        new = copy.copy(self.definition)
        new.body = [*body, *self._settle(deferred)]
        new.returns = None
        return ast.fix_missing_locations(new)

    def _block(self, statements: Block, deferred: Trail | None) -> tuple[Block, Trail | None]:
        new: Block = []
        for statement in statements:
            rewritten, deferred = self._statement(statement, deferred)
            new += rewritten
            self._previous = statement
        return new, deferred

    def _statement(self, statement: ast.stmt, deferred: Trail | None) -> tuple[Block, Trail | None]:
        if deferred is not None:
            fusions, tails = len(self.fusions), len(self.tails)
            self.maker = None
            with self._branch(deferred.live):
                try:
                    return self._deferred_statement(statement, deferred)
                except _CannotError:
                    del self.fusions[fusions:], self.tails[tails:]
                    first = self._settle(deferred)
            rest, after = self._statement(statement, None)
            return [*first, *rest], after
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)]):
                self._note_maker(statement, target)
                return self._bind(statement, target, None)
            case ast.Return(value=ast.expr()):
                self._note_maker(statement, None)
                return [self._return(statement, None)], None
            case ast.If():
                return self._if(statement, None)
            case ast.For() | ast.While() | ast.With() | ast.Try():
                return [self._compound(statement)], None
            case ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Expr() if statement.value is not None:
                new = copy.copy(statement)
                new.value = self.rewrite_other(statement.value)
                return [new], None
        return [statement], None

    def _deferred_statement(self, statement: ast.stmt, deferred: Trail) -> tuple[Block, Trail | None]:
        """A statement while a variable is deferred."""
        name = deferred.name
        match statement:
            case ast.AugAssign(target=ast.Name(id=target), op=ast.Add(), value=value) if target == name:
                self.deferred = deferred
                chain = self.add(("add", OPERATORS["iadd"]), (ast.Name(name, ast.Load()), value))
                if chain is None:
                    raise _CannotError
                return [_assign(name, chain[0], statement)], chain[1]
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if uses(value, name):
                if target != name and uses(self.definition, name) != 2:
                    raise _CannotError
                first = [] if self._is_read_first(value, name) else self._keep(deferred, statement)
                new, now = self._bind(statement, target, deferred)
                return [*first, *new], now
            case ast.Return(value=ast.expr() as value) if uses(value, name):
                first = [] if self._is_read_first(value, name) else self._keep(deferred, statement)
                return [*first, self._return(statement, deferred)], None
            case ast.If(test=test) if not uses(test, name):
                if any(isinstance(node, ast.Break | ast.Continue) for node in ast.walk(statement)):
                    raise _CannotError
                first = self._keep(deferred, test)
                new, now = self._if(statement, deferred)
                return [*first, *new], now
            case ast.Assign(targets=[ast.Name()], value=value) if not uses(statement, name):
                first = self._keep(deferred, value)
                between = copy.copy(statement)
                between.value = self.rewrite_other(value)
                return [*first, between], deferred
            case ast.Pass():
                return [statement], deferred
        raise _CannotError

    def _value(self, node: ast.expr, deferred: Trail | None) -> tuple[ast.expr, Trail | None]:
        """The expression and what it defers; it must read a deferred variable exactly once."""
        if isinstance(node, ast.IfExp):
            return self._choice(node, deferred)
        self.deferred = deferred
        if deferred is not None and uses(node, deferred.name) != 1:
            raise _CannotError
        chain = self.chain(node)
        if chain is None:
            return self.rewrite(node), None
        if chain[1].act is None:
            return chain
        self.note(chain[1])
        return chain[0], None

    def _choice(self, node: ast.IfExp, deferred: Trail | None) -> tuple[ast.expr, Trail | None]:
        if deferred is not None and uses(node.test, deferred.name):
            raise _CannotError
        truth = self.scope.truth(node.test)
        with self._branch(truth is not False):
            body, one = self._value(node.body, deferred)
        with self._branch(truth is not True):
            orelse, other = self._value(node.orelse, deferred)
        new = ast.copy_location(ast.IfExp(self.rewrite_other(node.test), body, orelse), node)
        if truth is None:
            return new, one.joined(other) if one is not None and other is not None else one or other
        first, second = (one, other) if truth else (other, one)
        return new, first if first is not None or second is None else replace(second, residual=False)

    def _bind(self, statement: ast.Assign, target: str, deferred: Trail | None) -> tuple[Block, Trail | None]:
        value, trail = self._value(statement.value, deferred)
        if trail is not None and not (
            self._may_defer and target in self.scope.locals and target not in self.scope.cells
        ):
            value, trail = self.compute(value, trail), None
        return [_assign(target, value, statement)], trail and replace(trail, name=target, live=self.live)

    def _return(self, statement: ast.Return, deferred: Trail | None) -> ast.stmt:
        assert statement.value is not None
        value, trail = self._value(statement.value, deferred)
        if trail is not None:
            self.note(trail)
            tail = self.tail and self._may_defer
            if tail and not trail.residual and self.live:
                self.tails.append(trail)
            value = runtime_call("tail" if tail else "settle", value)
        return ast.copy_location(ast.Return(value), statement)

    def _if(self, statement: ast.If, deferred: Trail | None) -> tuple[Block, Trail | None]:
        truth = self.scope.truth(statement.test)
        new = copy.copy(statement)
        new.test = self.rewrite_other(statement.test)
        previous = self._previous if self.scope.is_pure(statement.test) else None
        ends: list[tuple[Trail, bool, Block]] = []
        for arm, live in (("body", truth is not False), ("orelse", truth is not True)):
            self._previous = previous
            with self._branch(live):
                block, end = self._block(getattr(statement, arm), deferred)
            setattr(new, arm, block)
            if end is not None:
                ends.append((end, live, block))
        if not ends:
            return [new], None
        name = (deferred or max(ends, key=lambda end: end[1])[0]).name
        for end, live, block in ends:
            if end.name != name:
                with self._branch(live):
                    block += self._settle(end)
        ends = [end for end in ends if end[0].name == name]
        if not ends:
            return [new], None
        lives = [end for end, live, _ in ends if live and end.live]
        return [new], replace(reduce(Trail.joined, lives or [ends[0][0]]), live=bool(lives))

    def _compound(self, statement: ast.stmt) -> ast.stmt:
        """A compound statement: its end settles every variable; in `with` and `try` none is deferred."""
        new: Any = copy.copy(statement)
        for name in ("iter", "test"):
            if hasattr(statement, name):
                setattr(new, name, self.rewrite_other(getattr(statement, name)))
        before, self._may_defer = self._may_defer, self._may_defer and isinstance(statement, ast.For | ast.While)
        for arm in ("body", "orelse", "finalbody"):
            if hasattr(statement, arm):
                self._previous = None
                block, deferred = self._block(getattr(statement, arm), None)
                setattr(new, arm, [*block, *self._settle(deferred)])
        self._may_defer = before
        return new  # type: ignore[no-any-return]

    # --- side effects -------------------------------------------------------------------------------------------------

    @contextmanager
    def _branch(self, live: bool) -> Iterator[None]:
        before = self.live
        self.live = before and live
        try:
            yield
        finally:
            self.live = before

    def _settle(self, deferred: Trail | None) -> Block:
        if deferred is None:
            return []
        with self._branch(deferred.live):
            self.note(deferred)
        return [_assign(deferred.name, runtime_call("settle", ast.Name(deferred.name, ast.Load())), self.definition)]

    def _keep(self, deferred: Trail, between: ast.expr | ast.stmt) -> Block:
        """The statement before code that runs while a variable is deferred; none if that code is pure."""
        if isinstance(between, ast.expr) and self.scope.is_pure(between):
            return []
        node = ast.Expression(between) if isinstance(between, ast.expr) else between
        if self.scope.may_run(node, deferred.layers):
            raise _CannotError
        return [_assign(deferred.name, runtime_call("keep", ast.Name(deferred.name, ast.Load())), self.definition)]

    def _is_read_first(self, node: ast.expr, name: str) -> bool:
        """Whether the expression reads the variable before anything else but names and tests."""
        match node:
            case ast.Name():
                return node.id == name
            case ast.IfExp(test=test, body=body, orelse=orelse):
                arms = self._is_read_first(body, name) and self._is_read_first(orelse, name)
                return arms and self.scope.is_pure(test)
            case ast.BinOp(left=left, right=right):
                if uses(left, name):
                    return self._is_read_first(left, name)
                return self.scope.is_path(left) and self._is_read_first(right, name)
            case ast.Call(func=ast.Attribute(value=inner)) if uses(node.func, name):
                return self._is_read_first(inner, name)
            case ast.Call() if self.scope.is_path(node.func):
                first = next((a for a in node.args if uses(a, name) or not self.scope.is_path(a)), None)
                return first is not None and self._is_read_first(first, name)
        return False

    def _note_maker(self, statement: ast.Assign | ast.Return, target: str | None) -> None:
        """Note the module that the previous statement called for the variable that only this statement reads."""
        self.maker = None
        match self._previous:
            case ast.Assign(targets=[ast.Name(id=made)], value=value):
                used_up = uses(statement, made) == (1 if target is None else 2) and target in (None, made)
                maker = maker_of(self.scope, value)
                if used_up and maker is not None and made not in self.scope.cells:
                    self.maker = made, maker


def _assign(name: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), where)
