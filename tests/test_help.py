"""help() of every public name stands alone: what it does, every argument and field, what it returns and raises."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

import batchnorm as bn
from test_public import SURFACE

# Records within the records, and what watch() returns: help() of these is where a reader goes next.
REACHED = {
    "batchnorm.checks.check": ["Row"],
    "batchnorm.checks.sources": ["Network"],
    "batchnorm.checks.findings": ["Kind"],
    "batchnorm.recording.watch": ["Recorder"],
    "batchnorm.surgery.convert": ["Layer"],
    "batchnorm.records": ["Skipped"],
    "batchnorm.surgery.pool_statistics": ["Disagreement"],
    "batchnorm.surgery.to_group_norm": ["Replaced"],
    "batchnorm.words": ["ClassCounts"],
}
TORCHS = {"initialize_parameters"}
"""torch.nn calls it, with whatever forward was given."""


def surface() -> Iterator[tuple[str, Any]]:
    for module, names in (SURFACE | REACHED).items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("batchnorm."):
                yield f"{module}.{name}", value


def members(name: str, cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that this package defines, where torch.nn's help does not hold already."""
    for base in cls.__mro__:
        if not base.__module__.startswith("batchnorm."):
            continue
        for key, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not key.startswith("_") and key not in TORCHS and inspect.isfunction(function):
                yield f"{name}.{key}", function


def documented() -> dict[str, Any]:
    found: dict[int, tuple[str, Any]] = {}
    for name, value in surface():
        found.setdefault(id(value), (name, value))
        for each, function in members(name, value) if inspect.isclass(value) else ():
            found.setdefault(id(function), (each, function))
    return {name.removeprefix("batchnorm."): value for name, value in found.values()}


DOCUMENTED = documented()


def text(value: Any) -> str:
    own = value.__doc__ if inspect.isclass(value) else inspect.getdoc(value)  # a class does not inherit its help
    return inspect.cleandoc(own or "")


def named(word: str, where: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}\b", where) is not None


def summary_of(value: Any) -> str:
    return text(value).partition("\n")[0]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_first_line_is_a_sentence(name: str) -> None:
    """It says what the thing does: a formula comes after it."""
    first = summary_of(DOCUMENTED[name])
    assert first.endswith("."), first
    assert not re.match(r"\S+ = ", first), first
    assert re.match(r"[A-Z`]", first), first
    assert len(re.findall(r"[a-z)`]\. [A-Z`]", first)) == 0, f"more than one sentence: {first}"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_argument_and_field_is_named(name: str) -> None:
    value = DOCUMENTED[name]
    wanted = {each for each in inspect.signature(value).parameters if each not in ("self", "cls", "args", "kwargs")}
    if dataclasses.is_dataclass(value):
        wanted |= {field.name for field in dataclasses.fields(value)}
    described = text(value)
    assert {each for each in wanted if not each.startswith("_") and not named(each, described)} == set()


@pytest.mark.parametrize("name", [name for name, value in DOCUMENTED.items() if dataclasses.is_dataclass(value)])
def test_every_field_of_a_record_has_a_line(name: str) -> None:
    value = DOCUMENTED[name]
    _, _, listed = text(value).partition("Args:\n" if "Args:\n" in text(value) else "Attributes:\n")
    heads = [head for line in listed.splitlines() if (head := re.match(r"    ([\w, ]+): ", line))]
    assert {field.name for field in dataclasses.fields(value)} <= {
        each for head in heads for each in head[1].split(", ")
    }


@pytest.mark.parametrize("name", DOCUMENTED)
def test_errors_are_documented(name: str) -> None:
    """Where the function, or the making of an object, raises an error itself."""
    value = DOCUMENTED[name]
    makers = [vars(value).get("__init__"), vars(value).get("__post_init__")] if inspect.isclass(value) else [value]
    written = [each for each in makers if inspect.isfunction(each) and each.__code__.co_filename != "<string>"]
    sources = [textwrap.dedent(inspect.getsource(inspect.unwrap(each))) for each in written]
    errors = {
        node.exc.func.id
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    assert not errors or re.search(r"\bRaises? ", text(value)), errors


@pytest.mark.parametrize("name", [name for name in bn.__all__ if inspect.isfunction(getattr(bn, name))])
def test_functions_say_what_they_take_return_and_raise(name: str) -> None:
    described = text(getattr(bn, name))
    assert "\nArgs:\n" in described
    assert "\nReturns:\n" in described or "\nYields:\n" in described or name in ("domain", "register_layer")
    assert re.search(r"^Raises ", described, re.MULTILINE)
    heads = {
        each
        for line in described.partition("\nArgs:\n")[2].splitlines()
        if (head := re.match(r"    ([\w, ]+): ", line))
        for each in head[1].split(", ")
    }
    assert set(inspect.signature(getattr(bn, name)).parameters) <= heads
