"""Texts that tests pin whole, one file per page; BATCHNORM_UPDATE_GOLD=1 writes them again, git shows the changes."""

from __future__ import annotations

import difflib
import os
from pathlib import Path


def assert_gold(name: str, text: str) -> None:
    """Compare a text with the file of this name in this folder."""
    file = Path(__file__).parent / name
    if os.environ.get("BATCHNORM_UPDATE_GOLD"):
        file.write_text(text, encoding="utf-8")
    expected = file.read_text(encoding="utf-8")
    changes = difflib.unified_diff(expected.splitlines(), text.splitlines(), f"gold/{name}", "now", n=1, lineterm="")
    assert text == expected, "\n".join(changes) + "\nIf that is meant: BATCHNORM_UPDATE_GOLD=1 writes the file again."
