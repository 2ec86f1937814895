"""The docstrings of the whole package: who needs one, how it begins, and that it names what is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import batchnorm as bn

ROOT = Path(bn.__file__).parent
SHORT = 3
"""A function of at most this many statements may speak for itself."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes, functions and methods; those inside of functions are local."""
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")


MODULES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
MODULES = {name: tree for name, tree in sorted(MODULES.items()) if tree.body}
DEFINED = [(f"{name}:{label}", node) for name, tree in MODULES.items() for label, node in definitions(tree)]
DOCUMENTED = [(where, node) for where, node in DEFINED if ast.get_docstring(node)]


def failures(found: Iterator[str]) -> None:
    __tracebackhide__ = True
    listed = sorted(found)
    assert not listed, "\n" + "\n".join(listed)


def statements(node: ast.AST) -> int:
    return sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1


def test_the_walk_finds_the_package() -> None:
    assert len(MODULES) > 100
    assert len(DOCUMENTED) > 800


def speaks_for_itself(where: str, node: Definition) -> bool:
    """Short functions, overrides of documented methods, and classes whose decorator writes the docstring."""
    if isinstance(node, ast.ClassDef):
        return any(getattr(getattr(call, "func", None), "id", "") == "documented_as" for call in node.decorator_list)
    if statements(node) <= SHORT:
        return True
    path, _, label = where.partition(":")
    if "." not in label or "_triton" in path:
        return False
    module = importlib.import_module("batchnorm." + path.removesuffix(".py").replace("/", "."))
    return bool(inspect.getdoc(attrgetter(label)(module)))  # that of a base class, as this one has none


def test_every_module_class_and_longer_function_has_a_docstring() -> None:
    failures(name for name, tree in MODULES.items() if not ast.get_docstring(tree))
    failures(where for where, node in DEFINED if not ast.get_docstring(node) and not speaks_for_itself(where, node))


def test_the_first_line_is_a_sentence_or_a_formula() -> None:
    failures(
        f"{where}: {first}"
        for where, node in [*MODULES.items(), *DOCUMENTED]
        if not (first := (ast.get_docstring(node) or "").partition("\n")[0]).endswith((".", "?", ":"))
    )


def test_every_name_under_args_is_an_argument_or_a_field() -> None:
    def stale() -> Iterator[str]:
        for where, node in DOCUMENTED:
            listed = re.search(r"^Args:\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
            heads = re.findall(r"^ {4}(\*{0,2}\w[\w, ]*): ", listed[1] if listed else "", re.MULTILINE)
            inner = [child for child in ast.walk(node) if isinstance(child, ast.arguments)]
            known = {each.arg for one in inner for each in (*one.posonlyargs, *one.args, *one.kwonlyargs)}
            known |= {each.arg for one in inner for each in (one.vararg, one.kwarg) if each}
            if isinstance(node, ast.ClassDef):
                known |= {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
            has_base = isinstance(node, ast.ClassDef) and node.bases
            for name in re.split(r",\s*|\s+and\s+", ", ".join(heads).replace("*", "")):
                if name and name not in known and not has_base:
                    yield f"{where}: {name}"

    failures(stale())


def _raises_itself(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a call of it can raise an error that it makes: not one of an inner function."""
    waiting: list[ast.AST] = [*node.body]
    while waiting:
        child = waiting.pop()
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            return True
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(child)
    return False


def test_functions_of_public_modules_document_their_errors() -> None:
    """Public: no part of the path begins with `_`. A class may document those of its methods.

    The commands in cli/ print errors; their docstrings are the help.
    """
    public = [(where, node) for where, node in DOCUMENTED if not re.search(r"^cli/|(^|/)_(?!_)", where)]
    texts = dict(public)
    failures(
        where
        for where, node in public
        if isinstance(node, ast.FunctionDef) and _raises_itself(node)
        if not any(
            re.search(r"\b[Rr]aises?\b|\b[Ee]rror", ast.get_docstring(texts[each]) or "")
            for each in (where, where.rpartition(".")[0])
            if each in texts
        )
    )
