"""Read a function's source, check that it is what runs, and build a function from changed source.

The file on disk may have changed since the import, and a decorator may have replaced the function: so the source is
compiled again and must give the function's bytecode.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import hashlib
import inspect
import linecache
import marshal
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from batchnorm.surgery._fusing import runtime

# The name of `batchnorm.surgery._fusing.runtime` in changed source; classes do not mangle a name of this form.
RUNTIME = "__batchnorm__"

_FUTURE = 0
for _feature in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _feature).compiler_flag


class SourceError(Exception):
    """The source is not available; the message is for the report."""


def parse(function: FunctionType) -> ast.FunctionDef:
    """The definition of a method, with the file's line numbers.

    Raises SourceError if it is not available, or is not what the function was compiled from.
    """
    code = function.__code__
    unusual = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
    if code.co_flags & unusual:
        raise SourceError(f"{function.__qualname__} is a generator or a coroutine")
    try:
        lines, _ = inspect.findsource(code)
        tree, compiled = _file("".join(lines), code.co_filename, code.co_flags & _FUTURE)
    except (OSError, TypeError, SyntaxError, ValueError, IndexError) as error:
        raise SourceError(f"the source of {function.__qualname__} is not available") from error
    here = code.co_name, code.co_firstlineno
    definitions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and (n.name, n.lineno) == here]
    if len(definitions) != 1 or definitions[0].decorator_list:
        raise SourceError(f"{function.__qualname__} is no plain function (a decorator or a lambda)")
    if _bytecode(code) not in [_bytecode(c) for c in compiled.get(here, [])]:
        raise SourceError(f"the source of {function.__qualname__} is not the code that runs")
    return definitions[0]


def digest(function: FunctionType) -> str:
    """A hash of the function's bytecode, in 16 digits."""
    return hashlib.sha256(_bytecode(function.__code__)).hexdigest()[:16]


def build(text: str, function: FunctionType, owner_name: str) -> FunctionType:
    """The function that `text` defines, with the globals, the closure and the defaults of `function`.

    It is compiled as the method of a class, inside a function that binds its free variables, with a file name that
    tracebacks and debuggers resolve.
    """
    old = function.__code__
    filename = f"<fused {function.__qualname__} {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    free = ", ".join(name for name in (*old.co_freevars, RUNTIME) if name != "__class__")
    module: Any = ast.parse(f"def surroundings({free}):\n    class Owner: pass")
    definition: Any = ast.parse(text).body[0]
    owner = module.body[0].body[0]
    owner.name, owner.body = owner_name, [definition]
    code = compile(module, filename, "exec", flags=old.co_flags & _FUTURE, dont_inherit=True)
    for name in ("surroundings", owner_name, definition.name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    cells = dict(zip(old.co_freevars, function.__closure__ or (), strict=True)) | {RUNTIME: CellType(runtime)}
    closure = tuple(cells[name] for name in code.co_freevars)
    built = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(built, name, getattr(function, name))
    return built


@lru_cache(maxsize=16)
def _file(text: str, filename: str, flags: int) -> tuple[ast.Module, dict[tuple[str, int], list[CodeType]]]:
    """A parsed file, and its code objects by name and first line: bytecode depends on the imports at the top."""
    codes: dict[tuple[str, int], list[CodeType]] = {}
    todo = [compile(text, filename, "exec", flags=flags, dont_inherit=True)]
    while todo:
        code = todo.pop()
        codes.setdefault((code.co_name, code.co_firstlineno), []).append(code)
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    return ast.parse(text), codes


def _bytecode(code: CodeType) -> bytes:
    """A code object without its position; empty if another tool has put objects into it.

    Version 2 of marshal does not depend on which strings are shared.
    """
    try:
        return marshal.dumps(_without_position(code), 2)
    except ValueError:
        return b""


def _without_position(code: CodeType) -> CodeType:
    constants = tuple(_without_position(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"", co_consts=constants)


# The value of an expression that is not known before it runs.
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
        """The value of a path such as self.block.norm, self.norms[0] or F.relu; UNKNOWN if it may vary."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name(id=name) if name == self.self_name and self.self_is_fixed:
                return self.instance
            case ast.Name(id=name) if name not in self.locals:
                return self.outer.get(name, UNKNOWN)
            case ast.Attribute():
                return _attribute(self.value(node.value), node.attr)
            case ast.Subscript(slice=ast.Constant(value=key)):
                return _item(self.value(node.value), key)
        return UNKNOWN

    def truth(self, test: ast.expr) -> bool | None:
        """Whether a test of settings is true on this instance; None if unknown."""
        match test:
            case ast.UnaryOp(op=ast.Not()):
                inner = self.truth(test.operand)
                return None if inner is None else not inner
            case ast.BoolOp():
                every = isinstance(test.op, ast.And)
                known = [self.truth(value) for value in test.values]
                if (not every) in known:
                    return not every
                return None if None in known else every
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as op]):
                left, right = self.value(test.left), self.value(test.comparators[0])
                unknown = left is UNKNOWN or right is UNKNOWN
                return None if unknown else (left is right) is isinstance(op, ast.Is)
            case ast.Attribute(attr="training"):
                return None
        value = self.value(test)
        return bool(value) if isinstance(value, _PLAIN_VALUES) else None

    def is_pure(self, node: ast.expr) -> bool:
        """Whether evaluating it has no side effects: paths, and `is`, `and`, `or` and `not` of them."""
        match node:
            case ast.Compare():
                plain = all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
                return plain and all(map(self.is_pure, (node.left, *node.comparators)))
            case ast.BoolOp():
                return all(map(self.is_pure, node.values))
            case ast.UnaryOp(op=ast.Not()):
                return self.is_pure(node.operand)
        return self.is_path(node)

    def is_path(self, node: ast.expr) -> bool:
        """Whether it is a name, or attributes and constant items of one, which read without side effects."""
        match node:
            case ast.Attribute(value=inner) | ast.Subscript(value=inner, slice=ast.Constant()):
                return self.is_path(inner)
        return isinstance(node, ast.Name | ast.Constant)

    def may_run(self, node: ast.AST, layers: frozenset[nn.Module]) -> bool:
        """Whether code may run one of the layers: it reads a module that contains one, or passes self on."""
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
            elif (isinstance(child, ast.Name) and child.id in (self.self_name, "super")) or self.may_run(child, layers):
                return True
        return False

    def _starts_at_self(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return isinstance(node, ast.Name) and node.id == self.self_name


def _attribute(owner: Any, name: str) -> Any:
    """getattr without running a property or a __getattr__: the result must be a value, not a descriptor."""
    if owner is UNKNOWN:
        return UNKNOWN
    value = inspect.getattr_static(owner, name, UNKNOWN)
    if value is UNKNOWN and isinstance(owner, nn.Module):
        tables = (owner._parameters, owner._buffers, owner._modules)
        return next((table[name] for table in tables if name in table), UNKNOWN)
    try:
        on_instance = vars(owner).get(name, UNKNOWN) is value
    except TypeError:
        on_instance = False
    return value if on_instance or not hasattr(type(value), "__get__") else UNKNOWN


def _item(owner: Any, key: Any) -> Any:
    if type(owner) in (nn.ModuleList, nn.Sequential) and isinstance(key, int) and -len(owner) <= key < len(owner):
        return owner[key]
    if type(owner) is nn.ModuleDict and key in owner:
        return owner[key]
    return UNKNOWN
