"""Writing files so that no reader ever sees a part of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Write = Callable[[Path], object]
"""Writes a file under the path that it is given."""


def write_atomically(target: Path, write: Write, check: Callable[[], None] | None = None) -> None:
    """`write` a temporary file beside `target`, then rename it; where that fails, nothing is left of it.

    `check` may raise before the rename, when what was written does not belong there any more. A child process that was
    forked in between leaves the file to its parent. Raises OSError, and what `write` and `check` raise.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    process = os.getpid()
    try:
        write(temporary)
        if os.getpid() != process:
            raise OSError("the process was forked while it wrote")
        if check is not None:
            check()
        os.replace(temporary, target)
    finally:
        if os.getpid() == process:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text_atomically(target: Path, text: str) -> None:
    """The same of a text in UTF-8; what UTF-8 cannot hold becomes a question mark."""
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))
