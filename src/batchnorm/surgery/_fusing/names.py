"""What the names in a method's source stand for on one instance: modules, functions, settings. Nothing is executed."""

from __future__ import annotations

import ast
import builtins
import inspect
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

# Stands for "not known before it runs".
UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "UNKNOWN"})()

_PLAIN_VALUES = (bool, int, float, str, type(None))


class Scope:
    """The instance behind `self`, the function's globals and its closure."""

    def __init__(self, instance: nn.Module, function: FunctionType, definition: ast.FunctionDef) -> None:
        arguments = [*definition.args.posonlyargs, *definition.args.args]
        self.self_name = arguments[0].arg if arguments else ""
        self.instance = instance
        code = function.__code__
        self.locals = set(code.co_varnames) | set(code.co_cellvars)
        self.cells = set(code.co_cellvars)
        stores = {n.id for n in ast.walk(definition) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        self.self_is_fixed = self.self_name not in stores and self.self_name not in self.cells
        self.outer = dict(vars(builtins)) | function.__globals__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.outer[name] = cell.cell_contents
            except ValueError:
                self.outer[name] = UNKNOWN

    def value(self, node: ast.expr) -> Any:
        """What a path such as self.block.norm, self.norms[0] or F.relu stands for; UNKNOWN where it may vary."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id == self.self_name and self.self_is_fixed:
                return self.instance
            return UNKNOWN if node.id in self.locals else self.outer.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            return _attribute(self.value(node.value), node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return _item(self.value(node.value), node.slice.value)
        return UNKNOWN

    def truth(self, test: ast.expr) -> bool | None:
        """Whether a test of settings holds on this instance as it is now; None where that is not known."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            every = isinstance(test.op, ast.And)
            known = [self.truth(value) for value in test.values]
            if (not every) in known:
                return not every
            return None if None in known else every
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            left, right = self.value(test.left), self.value(test.comparators[0])
            if left is UNKNOWN or right is UNKNOWN:
                return None
            match test.ops[0]:
                case ast.Is():
                    return left is right
                case ast.IsNot():
                    return left is not right
            return None
        value = self.value(test)
        if isinstance(test, ast.Attribute) and test.attr == "training":
            return None
        return bool(value) if value is not UNKNOWN and isinstance(value, _PLAIN_VALUES) else None

    def is_path(self, node: ast.expr) -> bool:
        """Whether reading it runs no code that could matter: names, attributes, constant items of them."""
        if isinstance(node, ast.Attribute | ast.Subscript):
            return self.is_path(node.value) and (
                isinstance(node, ast.Attribute) or isinstance(node.slice, ast.Constant)
            )
        return isinstance(node, ast.Name | ast.Constant)

    def reaches(self, node: ast.AST, layers: frozenset[nn.Module]) -> bool:
        """Whether code may run one of the layers: it calls a module that holds one, or hands self on to who knows."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.locals:
            return True
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute | ast.Subscript) and self._starts_at_self(child):
                value = self.value(child)
                if isinstance(value, nn.Module):
                    if not layers.isdisjoint(value.modules()):
                        return True
                elif not isinstance(value, (*_PLAIN_VALUES, Tensor)):
                    return True
            elif (isinstance(child, ast.Name) and child.id in (self.self_name, "super")) or self.reaches(child, layers):
                return True
        return False

    def _starts_at_self(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return isinstance(node, ast.Name) and node.id == self.self_name


def _attribute(owner: Any, name: str) -> Any:
    """getattr without running a property or a __getattr__: what is found must be a value of its own."""
    if owner is UNKNOWN:
        return UNKNOWN
    if isinstance(owner, ModuleType):
        return vars(owner).get(name, UNKNOWN)
    if isinstance(owner, nn.Module):
        on_class = inspect.getattr_static(type(owner), name, UNKNOWN)
        if hasattr(type(on_class), "__set__"):
            return UNKNOWN
        if name in vars(owner):
            return vars(owner)[name]
        if on_class is UNKNOWN:
            for held in (owner._parameters, owner._buffers, owner._modules):
                if name in held:
                    return held[name]
            return UNKNOWN
    else:
        on_class = inspect.getattr_static(type(owner), name, UNKNOWN)
        if on_class is UNKNOWN or not hasattr(type(on_class), "__set__"):
            try:
                return vars(owner).get(name, UNKNOWN if hasattr(type(on_class), "__get__") else on_class)
            except TypeError:
                return UNKNOWN
    return UNKNOWN if hasattr(type(on_class), "__get__") else on_class


def _item(owner: Any, key: Any) -> Any:
    if type(owner) in (nn.ModuleList, nn.Sequential) and isinstance(key, int) and -len(owner) <= key < len(owner):
        return owner[key]
    if type(owner) is nn.ModuleDict and key in owner:
        return owner[key]
    return UNKNOWN
