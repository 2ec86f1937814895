"""What the commands share: one line for a mistake, progress on standard error, results on standard output."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


class CommandError(Exception):
    """What the user did that cannot be done, in one line."""


usage_error: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer itself raises on a bad command line: for options that exclude each other, and values that are no choice.

Raised in a command, it comes to know the command, so that its message can point to the help of it. It is
click's UsageError; where that lives differs between typer's versions.
"""


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with the time left, from the first word of (done, total) to the yielded function on."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=None)

    def told(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield told
    finally:
        if bar.live.is_started:
            bar.stop()


def print_json(value: Any) -> None:
    print(json.dumps(_unknown_as_null(value), indent=2, allow_nan=False))


def print_text(text: str) -> None:
    """Wrapped between words in a terminal, as it is into a file or a pipe."""
    from rich.console import Console

    console = Console()
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _unknown_as_null(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, dict):
        return {key: _unknown_as_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_unknown_as_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tell(line: str) -> None:
    say(f"\nbatchnorm: {line}")


def say(text: str) -> None:
    """On standard error, wrapped between words in a terminal."""
    if sys.stderr.isatty():
        width = max(shutil.get_terminal_size().columns, 20)
        wrapped = (
            textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")
        )
        text = "\n".join("\n".join(lines) for lines in wrapped)
    print(text, file=sys.stderr, flush=True)
