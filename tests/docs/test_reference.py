"""docs/reference: every public name has one entry, help texts and variables are those of the code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import batchnorm as bn
import command_line
from test_public import SURFACE

ROOT = Path(__file__).parent.parent.parent
REFERENCE = ROOT / "docs" / "reference"
ENTRIES = [
    entry
    for page in sorted(REFERENCE.glob("*.md"))
    for entry in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


def found(path: str) -> Any:
    """The object of a dotted path: a module, or a name in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(found(module), name)


def home(path: str) -> str:
    """Where an object is defined: one text for each, however it is reached."""
    value = found(path)
    if hasattr(value, "__file__"):
        return str(value.__name__)
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    if name and str(module).startswith("batchnorm"):
        return f"{module}.{name}"
    module, _, name = path.rpartition(".")
    return f"{found(module).__name__}.{name}"  # a constant, or an alias of a type


def missing(entries: list[str]) -> list[str]:
    """Public names that have no entry, or several."""
    homes = [home(entry) for entry in entries]
    public = sorted({home(f"{module}.{name}") for module, names in SURFACE.items() for name in names})
    return [name for name in public if homes.count(name) != 1]


def test_every_public_name_has_one_entry() -> None:
    assert missing(ENTRIES) == []


def test_no_entry_is_there_twice() -> None:
    homes = [home(entry) for entry in ENTRIES]
    assert sorted(homes) == sorted(set(homes))


def test_a_name_without_an_entry_and_one_with_two_are_found() -> None:
    assert missing([entry for entry in ENTRIES if entry != "batchnorm.fold"]) == ["batchnorm.surgery.fold.fold"]
    assert missing([*ENTRIES, "batchnorm.surgery.fold.fold"]) == ["batchnorm.surgery.fold.fold"]


def test_entries_have_the_names_that_users_write() -> None:
    """`batchnorm.fold`, not `batchnorm.surgery.fold.fold`: the anchor of a link is the entry's path."""
    by_home = {home(f"batchnorm.{name}"): f"batchnorm.{name}" for name in bn.__all__}
    assert [entry for entry in ENTRIES if by_home.get(home(entry), entry) != entry] == []


def test_the_table_of_the_reference_has_every_name() -> None:
    table = (REFERENCE / "index.md").read_text(encoding="utf-8")
    assert [name for name in bn.__all__ if f"[`{name}`][batchnorm.{name}]" not in table] == []


def test_the_command_line_is_what_help_prints() -> None:
    shown = command_line.PAGE.read_text(encoding="utf-8")
    assert shown == command_line.page(), "python tools/command_line.py writes the page again"


def test_every_command_is_on_the_page() -> None:
    listed = command_line.help_of().partition("Commands:")[2]
    assert tuple(re.findall(r"^  (\w+)$", listed, re.MULTILINE)) == command_line.COMMANDS


VARIABLE = re.compile(r"\bBATCHNORM_[A-Z_]+\b")


def read_in(*folders: str) -> set[str]:
    """The package's variables that files in these folders name."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".pyi"))
    return {name for file in files for name in VARIABLE.findall(file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    ("folders", "part"), [(("src",), 0), (("tests", "tools", "examples"), 1)], ids=["src", "tests"]
)
def test_every_variable_is_described(folders: tuple[str, ...], part: int) -> None:
    """The first table has those of the package, the second the others; each with a default and a meaning."""
    tables = (REFERENCE / "environment.md").read_text(encoding="utf-8").split("\n## ")
    rows = [re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE) for table in tables]
    described = {name for name, default, meaning in rows[part] if default.strip() and meaning.strip()}
    expected = read_in(*folders) - (read_in("src") if part else set())
    assert described == expected
