"""docs/architecture.md names files, functions and classes that exist, and no public file is missing from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "src" / "batchnorm"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)))


def defined(path: Path) -> set[str]:
    """Functions, classes, their methods, and names that are assigned at the top of a module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_the_page_names_functions() -> None:
    assert len(NAMED) > 30


@pytest.mark.parametrize(("file", "name"), NAMED, ids=":".join)
def test_named_functions_exist(file: str, name: str) -> None:
    assert name in defined(PACKAGE / file)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:[\w]+/)*[\w]+\.py|(?:[\w]+/)+)`", TEXT))))
def test_every_path_exists(path: str) -> None:
    """A name without a folder may be that of a file in the folder that stands before it in its row."""
    places = [
        PACKAGE,
        ROOT,
        *(folder for folder in PACKAGE.rglob("*") if folder.is_dir() and "/" not in path.strip("/")),
    ]
    assert any((place / path).exists() for place in (*places, PACKAGE.parent))


@pytest.mark.parametrize(
    "path", sorted(path for path in PACKAGE.rglob("*.py") if "/_" not in str(path.relative_to(PACKAGE.parent))), ids=str
)
def test_every_public_file_is_answered_for(path: Path) -> None:
    """By its own name, or by its folder's, of which the row says what the files in it are named by."""
    relative = path.relative_to(PACKAGE)
    by_folder = len(relative.parts) > 1 and f"`{relative.parent}/`" in TEXT
    assert by_folder or re.search(rf"[`/]{relative.name}[`:]", TEXT)
