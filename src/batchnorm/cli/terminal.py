"""What the commands share: one line for a mistake, progress on standard error, results on standard output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class CommandError(Exception):
    """What the user did that cannot be done, in one line."""


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
    print(f"\nbatchnorm: {line}", file=sys.stderr, flush=True)
