"""Print where the package's language breaks the rule of docs/architecture.md: old words in identifiers and in prose.

python tools/plain_words.py [--all] prints the counts, and with --all each place. Exit status 1 where an identifier has
one of the words, or ten places in prose do.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
IDENTIFIERS = re.compile(
    r"(?:^|_)(told|tell|tells|telling|handed|whoever|none_is|seen_at|held_by)(?:_|$)", re.IGNORECASE
)
CLASSES = ("Told", "Held", "Seen", "Turned")
PROSE = re.compile(
    r"\b(told|tells?|telling|handed|hands? over|in the hands of|of its own|of their own|what is none|stands? for"
    r"|as it is|so many|whoever|there is none)\b",
    re.IGNORECASE,
)
Place = tuple[Path, int, str]


def sources() -> list[Path]:
    """The Python files of the package, its tests and tools."""
    return sorted(path for folder in ("src", "tests", "tools", "examples") for path in (ROOT / folder).rglob("*.py"))


def identifiers(path: Path) -> Iterator[Place]:
    """Names of functions, classes, arguments, variables and attributes that have one of the words."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node, "name", None) or getattr(node, "id", None) or getattr(node, "attr", None)
        name = name or (node.arg if isinstance(node, ast.arg | ast.keyword) else None)
        if isinstance(name, str) and (IDENTIFIERS.search(name) or name.lstrip("_") in CLASSES):
            yield path, getattr(node, "lineno", 0), name


def prose(path: Path) -> Iterator[Place]:
    """Comments, docstrings and texts that have one of the words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                for found in PROSE.finditer(token.string):
                    yield path, token.start[0] + token.string[: found.start()].count("\n"), found[0]
    else:
        for number, line in enumerate(text.splitlines(), 1):
            yield from ((path, number, found[0]) for found in PROSE.finditer(line))


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="print each place")
    show = parser.parse_args().all
    mine = Path(__file__).resolve()
    names = [place for path in sources() if path != mine for place in identifiers(path)]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    package = [path for path in sources() if path.is_relative_to(ROOT / "src")]
    texts = [place for path in (*package, *pages) for place in prose(path)]
    for what, places in (("identifiers", names), ("prose of the package and its pages", texts)):
        print(f"{what}: {len(places)}")
        for path, line, word in places if show else ():
            print(f"  {path.relative_to(ROOT)}:{line}: {word}")
    return int(bool(names) or len(texts) >= 10)


if __name__ == "__main__":
    sys.exit(main())
