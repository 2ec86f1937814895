"""What Python runs before what, where a batch norm is held back in a variable."""

from __future__ import annotations

import ast

from batchnorm.surgery._fusing.names import Scope
from batchnorm.surgery._fusing.trails import mentions


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
