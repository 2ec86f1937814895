"""Rewrite a method's products and averages over positions to the functions of `gates`, which return the same values.

No other code is moved, and operands are evaluated in the same order, so any method may be rewritten.
"""

from __future__ import annotations

import ast
import copy

from batchnorm.surgery._fusing.gates import POOLS, PRODUCTS
from batchnorm.surgery._fusing.rewriting import OPERATORS, runtime_call
from batchnorm.surgery._fusing.source import Scope


def definition_of(text: str) -> ast.FunctionDef:
    """The definition in a method's rewritten source."""
    definition = ast.parse(text).body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


def rewrite_products(scope: Scope, definition: ast.FunctionDef) -> tuple[str, int, int]:
    """The method's new source, the number of its products, and the number of its averages."""
    rewriter = _Rewriter(scope)
    new = copy.deepcopy(definition)
    new.body = [rewriter.visit(statement) for statement in new.body]
    new.returns = None
    return ast.unparse(ast.fix_missing_locations(new)) + "\n", rewriter.products, rewriter.averages


class _Rewriter(ast.NodeTransformer):
    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.products = self.averages = 0

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if (
            not isinstance(node.op, ast.Mult)
            or isinstance(node.left, ast.Constant)
            or isinstance(node.right, ast.Constant)
        ):
            return node
        self.products += 1
        return runtime_call("multiply", OPERATORS["mul"], node.left, node.right)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = self.scope.value(node.func)
        is_plain = not node.keywords and not any(isinstance(argument, ast.Starred) for argument in node.args)
        if is_plain and len(node.args) == 2 and any(called is function for function in PRODUCTS):
            self.products += 1
            return runtime_call("multiply", node.func, *node.args)
        if is_plain and type(called) in POOLS:
            self.averages += 1
            return runtime_call("pool", node.func, *node.args)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "mean":
            self.averages += 1
            return runtime_call("mean", node.func.value, *node.args, keywords=node.keywords)
        return node

    def _leave(self, node: ast.AST) -> ast.AST:
        """Code of another scope does not see the name of the runtime."""
        return node

    visit_Lambda = visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _leave  # noqa: N815
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _leave  # noqa: N815
