"""Rewrite a method's source so that act(BN(x) [+ residual]) runs as one transform.

A chain begins with the call of a batch norm layer (or of a module that ends in one). It may contain identities and one
addition, and may end with an activation; after an addition, only with one that `can_follow_addition`. A batch norm in a
chain is deferred: it runs where the chain ends. Code between its call and the addition then runs before it, which is
allowed only if that code cannot change the layer's input (`runtime.keep`).

After the statement that calls the layer, a local variable may be a `runtime.Deferred`. Three rules hide this from other
code. A statement outside of the chain that reads the variable is preceded by `variable = settle(variable)`. So is code
that could change what the batch norm reads, or that could skip its update of the running statistics. And every variable
is settled at the end of a loop, a `try`, a `with` and the method.
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
from batchnorm.surgery._shared.activations import METHODS, activation_of, can_follow_addition
from batchnorm.surgery._shared.layers import FRESH

# A call's place in its file: line, column, last line, last column.
Site = tuple[int, int, int, int]
EndsIn = Callable[[nn.Module], frozenset[nn.Module]]
"""A function that returns the layers whose output a module returns unchanged."""


@dataclass(frozen=True)
class Fusion:
    """A deferred batch norm and the operations that are fused with it so far; an activation is the last.

    `replaced`: the batch norm is F.batch_norm, so rewriting gains even if nothing else is fused. `name`: the local
    variable that may be deferred. `live`: whether it is deferred on this instance.
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

    def join(self, other: Fusion) -> Fusion:
        """The fusion after an `if` whose two branches end with this one and with another."""
        residual, replaced = self.residual or other.residual, self.replaced or other.replaced
        sites, layers = self.sites | other.sites, self.layers | other.layers
        return replace(self, sites=sites, layers=layers, residual=residual, replaced=replaced)


Chain = tuple[ast.expr, Fusion]
"""A rewritten expression, and the fusion that it defers or computes."""


class ExpressionRewriter:
    """Rewrites the expressions of one method; collects its `fusions`, and `starts`: the calls where chains begin.

    `excluded`: calls where no chain may begin. `live`: whether the current code runs on this instance. `deferred`: the
    deferred variable that expressions may read. `producer`: a variable that the previous statement assigned from a
    module's call, and that module. `readers`: for layers with which nothing fuses, the statement that reads the output.
    """

    def __init__(self, scope: Scope, ends_in: EndsIn, excluded: set[Site]) -> None:
        self.scope, self.ends_in, self.excluded = scope, ends_in, excluded
        self.fusions: list[Fusion] = []
        self.starts: dict[Site, Any] = {}
        self.live = True
        self.deferred: Fusion | None = None
        self.producer: tuple[str, ast.expr] | None = None
        self.readers: dict[nn.Module, str] = {}
        self.statement: ast.stmt | None = None

    def note_reader(self, fusion: Fusion) -> None:
        """Note that the current statement reads the output of layers with which nothing was fused."""
        if self.statement is not None and self.live and fusion.live and not fusion.is_fused:
            for layer in fusion.layers:
                self.readers.setdefault(layer, ast.unparse(self.statement).splitlines()[0])

    def rewrite(self, node: Any) -> Any:
        """Rewrite the chains inside of an expression; its value does not change."""
        if not isinstance(node, ast.expr | ast.keyword) or isinstance(node, _OTHER_SCOPES):
            return node
        chain = self.chain(node)
        if chain is not None:
            self.note_reader(chain[1])
            if chain[1].is_fused or isinstance(node, ast.Name):
                return self.compute(*chain)
        new = copy.copy(node)
        for name, value in ast.iter_fields(node):
            setattr(new, name, [*map(self.rewrite, value)] if isinstance(value, list) else self.rewrite(value))
        return new

    def rewrite_other(self, node: ast.expr) -> ast.expr:
        """`rewrite` an expression that reads no deferred variable."""
        self.deferred = self.producer = None
        return self.rewrite(node)  # type: ignore[no-any-return]

    def compute(self, node: ast.expr, fusion: Fusion) -> ast.expr:
        self.note(fusion)
        return node if fusion.act is not None else runtime_call("settle", node)

    def note(self, fusion: Fusion) -> None:
        if fusion.is_fused and self.live:
            self.fusions.append(fusion)

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
        started = self._begin_chain(node, called)
        if started is not None:
            return started
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
        if site in self.excluded or not node.args:
            return None
        layers = self.ends_in(called) if isinstance(called, nn.Module) else frozenset()
        if called is not F.batch_norm and not layers:
            return None
        self.starts[site] = called
        arguments, keywords = [*map(self.rewrite, node.args)], [*map(self.rewrite, node.keywords)]
        if called is F.batch_norm:
            fusion = Fusion(frozenset([site]), frozenset([self.scope.instance]), replaced=True)
            return runtime_call("defer_function", node.func, *arguments, keywords=keywords), fusion
        first, producer = node.args[0], producer_of(self.scope, node.args[0])
        if isinstance(first, ast.Name) and self.producer is not None and self.producer[0] == first.id:
            producer = self.producer[1]
        deferred = runtime_call("defer", producer or ast.Constant(None), node.func, *arguments, keywords=keywords)
        return deferred, Fusion(frozenset([site]), layers)

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
        """Rewrite chain + residual to the runtime `call`; `orders` are the possible pairs (chain, residual).

        A residual that Python evaluates before the chain may only be a name or attribute if a variable is deferred.
        A residual that it evaluates after the chain runs between the layer and the addition.
        """
        for node, residual in orders:
            first, path = (node, residual) != orders[-1], self.scope.is_path(residual)  # first: evaluated first
            if self.deferred is not None and (uses(residual, self.deferred.name) or (first and not path)):
                continue
            inner = self.chain(node)
            if inner is None or inner[1].act is not None or inner[1].residual:
                continue
            value, fusion = inner
            if not first and not path:
                if self.scope.may_run(ast.Expression(residual), fusion.layers):
                    continue
                value = runtime_call("keep", value)
            other = self.rewrite(residual)
            return runtime_call(*call, *((other, value) if first else (value, other))), replace(fusion, residual=True)
        return None


_OTHER_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def runtime_call(name: str, *arguments: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.Call:
    """A call of a function of `batchnorm.surgery._fusing.runtime`."""
    function = ast.Attribute(ast.Name(RUNTIME, ast.Load()), name, ast.Load())
    return ast.Call(func=function, args=list(arguments), keywords=list(keywords))


OPERATORS = {
    name: ast.Attribute(ast.Attribute(ast.Name(RUNTIME, ast.Load()), "operator", ast.Load()), name, ast.Load())
    for name in ("add", "iadd", "mul")
}


def _place(node: ast.expr) -> Site:
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def uses(node: ast.AST, name: str) -> int:
    """How often a variable occurs in the code of a node."""
    return sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def producer_of(scope: Scope, node: ast.expr) -> ast.expr | None:
    """The module that an expression calls, if its output is always new memory."""
    return node.func if isinstance(node, ast.Call) and type(scope.value(node.func)) in FRESH else None


Block = list[ast.stmt]


class _MustSettleError(Exception):
    """The deferred variable must be settled before the statement."""


class MethodRewrite(NamedTuple):
    """A method's new source, its fusions, the layers that its value may defer, and the modules it calls."""

    text: str
    fusions: list[Fusion]
    tails: frozenset[nn.Module]
    relies_on: list[nn.Module]


def rewrite(
    scope: Scope, definition: ast.FunctionDef, ends_in: EndsIn, tail: bool, readers: dict[nn.Module, str]
) -> MethodRewrite | None:
    """Rewrite a method, or return None if nothing fuses; with `tail`, the returned value may be deferred.

    For layers with which nothing fuses, the statement that reads the output is added to `readers`.
    """
    excluded: set[Site] = set()
    while True:
        rewriter = _StatementRewriter(scope, definition, ends_in, excluded, tail)
        new = rewriter.rewrite_method()
        for layer, statement in rewriter.readers.items():
            readers.setdefault(layer, statement)
        unused = rewriter.starts.keys() - {s for fusion in (*rewriter.fusions, *rewriter.tails) for s in fusion.sites}
        if not unused:
            break
        excluded |= unused
    if not rewriter.starts:
        return None
    if tail:
        new.name = TAIL
    tails = frozenset(layer for fusion in rewriter.tails for layer in fusion.layers)
    relies_on = [called for called in rewriter.starts.values() if isinstance(called, nn.Module)]
    return MethodRewrite(ast.unparse(new) + "\n", rewriter.fusions, tails, relies_on)


class _StatementRewriter(ExpressionRewriter):
    """Rewrites the statements of one method; collects `tails`, the fusions that it returns deferred."""

    def __init__(
        self, scope: Scope, definition: ast.FunctionDef, ends_in: EndsIn, excluded: set[Site], tail: bool
    ) -> None:
        super().__init__(scope, ends_in, excluded)
        self.definition, self.tail = definition, tail
        self.tails: list[Fusion] = []
        self._may_defer = True
        self._previous: ast.stmt | None = None

    def rewrite_method(self) -> ast.FunctionDef:
        """Return the method's new definition."""
        body, deferred = self._block(self.definition.body, None)
        new = copy.copy(self.definition)
        new.body = [*body, *self._settle(deferred)]
        new.returns = None
        return ast.fix_missing_locations(new)

    def _block(self, statements: Block, deferred: Fusion | None) -> tuple[Block, Fusion | None]:
        new: Block = []
        for statement in map(_without_annotation, statements):
            rewritten, deferred = self._statement(statement, deferred)
            new += rewritten
            self._previous = statement
        return new, deferred

    def _statement(self, statement: ast.stmt, deferred: Fusion | None) -> tuple[Block, Fusion | None]:
        self.statement = statement
        if deferred is not None:
            fusions, tails = len(self.fusions), len(self.tails)
            self.producer = None
            with self._branch(deferred.live):
                try:
                    return self._deferred_statement(statement, deferred)
                except _MustSettleError:
                    self.statement = statement
                    self.note_reader(deferred)
                    del self.fusions[fusions:], self.tails[tails:]
                    first = self._settle(deferred)
            rest, after = self._statement(statement, None)
            return [*first, *rest], after
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)]):
                self._note_producer(statement, target)
                return self._bind(statement, target, None)
            case ast.Return(value=ast.expr()):
                self._note_producer(statement, None)
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

    def _deferred_statement(self, statement: ast.stmt, deferred: Fusion) -> tuple[Block, Fusion | None]:
        """Rewrite a statement that runs while a variable is deferred."""
        name = deferred.name
        match statement:
            case ast.AugAssign(target=ast.Name(id=target), op=ast.Add(), value=value) if target == name:
                self.deferred = deferred
                chain = self.add(("add", OPERATORS["iadd"]), (ast.Name(name, ast.Load()), value))
                if chain is None:
                    raise _MustSettleError
                return [_assign(name, chain[0], statement)], chain[1]
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if uses(value, name):
                if target != name and uses(self.definition, name) != 2:
                    raise _MustSettleError
                first = [] if self._is_read_first(value, name) else self._keep(deferred, statement)
                new, now = self._bind(statement, target, deferred)
                return [*first, *new], now
            case ast.Return(value=ast.expr() as value) if uses(value, name):
                first = [] if self._is_read_first(value, name) else self._keep(deferred, statement)
                return [*first, self._return(statement, deferred)], None
            case ast.If(test=test) if not uses(test, name):
                if any(isinstance(node, ast.Break | ast.Continue) for node in ast.walk(statement)):
                    raise _MustSettleError
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
        raise _MustSettleError

    def _value(self, node: ast.expr, deferred: Fusion | None) -> tuple[ast.expr, Fusion | None]:
        """Rewrite an expression; return it and what it defers. It must read a deferred variable exactly once."""
        if isinstance(node, ast.IfExp):
            return self._choice(node, deferred)
        self.deferred = deferred
        if deferred is not None and uses(node, deferred.name) != 1:
            raise _MustSettleError
        chain = self.chain(node)
        if chain is None:
            return self.rewrite(node), None
        if chain[1].act is None:
            return chain
        self.note(chain[1])
        return chain[0], None

    def _choice(self, node: ast.IfExp, deferred: Fusion | None) -> tuple[ast.expr, Fusion | None]:
        if deferred is not None and uses(node.test, deferred.name):
            raise _MustSettleError
        truth = self.scope.truth(node.test)
        with self._branch(truth is not False):
            body, one = self._value(node.body, deferred)
        with self._branch(truth is not True):
            orelse, other = self._value(node.orelse, deferred)
        new = ast.copy_location(ast.IfExp(self.rewrite_other(node.test), body, orelse), node)
        if truth is None:
            return new, one.join(other) if one is not None and other is not None else one or other
        first, second = (one, other) if truth else (other, one)
        return new, first if first is not None or second is None else replace(second, residual=False)

    def _bind(self, statement: ast.Assign, target: str, deferred: Fusion | None) -> tuple[Block, Fusion | None]:
        value, fusion = self._value(statement.value, deferred)
        if fusion is not None and not (
            self._may_defer and target in self.scope.locals and target not in self.scope.cells
        ):
            value, fusion = self.compute(value, fusion), None
        return [_assign(target, value, statement)], fusion and replace(fusion, name=target, live=self.live)

    def _return(self, statement: ast.Return, deferred: Fusion | None) -> ast.stmt:
        assert statement.value is not None
        value, fusion = self._value(statement.value, deferred)
        if fusion is not None:
            self.note(fusion)
            tail = self.tail and self._may_defer
            if tail and not fusion.residual and self.live:
                self.tails.append(fusion)
            value = runtime_call("tail" if tail else "settle", value)
        return ast.copy_location(ast.Return(value), statement)

    def _if(self, statement: ast.If, deferred: Fusion | None) -> tuple[Block, Fusion | None]:
        truth = self.scope.truth(statement.test)
        new = copy.copy(statement)
        new.test = self.rewrite_other(statement.test)
        previous = self._previous if self.scope.is_pure(statement.test) else None
        ends: list[tuple[Fusion, bool, Block]] = []
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
        return [new], replace(reduce(Fusion.join, lives or [ends[0][0]]), live=bool(lives))

    def _compound(self, statement: ast.stmt) -> ast.stmt:
        """Rewrite a loop, `with` or `try`: its end settles every variable; in `with` and `try` none is deferred."""
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

    def _settle(self, deferred: Fusion | None) -> Block:
        if deferred is None:
            return []
        with self._branch(deferred.live):
            self.note(deferred)
        return [_assign(deferred.name, runtime_call("settle", ast.Name(deferred.name, ast.Load())), self.definition)]

    def _keep(self, deferred: Fusion, between: ast.expr | ast.stmt) -> Block:
        """The statement to insert before code that runs while a variable is deferred; nothing if that code is pure."""
        if isinstance(between, ast.expr) and self.scope.is_pure(between):
            return []
        node = ast.Expression(between) if isinstance(between, ast.expr) else between
        if self.scope.may_run(node, deferred.layers):
            raise _MustSettleError
        return [_assign(deferred.name, runtime_call("keep", ast.Name(deferred.name, ast.Load())), self.definition)]

    def _is_read_first(self, node: ast.expr, name: str) -> bool:
        """Whether the expression reads the variable before it runs anything but pure code."""
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

    def _note_producer(self, statement: ast.Assign | ast.Return, target: str | None) -> None:
        """Set `producer` if the previous statement called a module for a variable that only this statement reads."""
        self.producer = None
        match self._previous:
            case ast.Assign(targets=[ast.Name(id=made)], value=value):
                is_only_reader = uses(statement, made) == (1 if target is None else 2) and target in (None, made)
                producer = producer_of(self.scope, value)
                if is_only_reader and producer is not None and made not in self.scope.cells:
                    self.producer = made, producer


def _without_annotation(statement: ast.stmt) -> ast.stmt:
    """`name = value` for `name: annotation = value`: Python does not evaluate annotations of local variables."""
    match statement:
        case ast.AnnAssign(target=ast.Name() as target, value=ast.expr() as value, simple=1):
            return ast.copy_location(ast.Assign([target], value), statement)
    return statement


def _assign(name: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), where)
