"""What the commands share: one line for a mistake, progress on standard error, results on standard output."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
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


Errors = type[Exception] | tuple[type[Exception], ...]


@contextmanager
def in_one_line(failure: Errors, usage: Errors = ()) -> Iterator[None]:
    """Errors of the library as those of the command; of `usage` errors, the line names the command's help, too."""
    try:
        yield
    except usage as error:
        raise usage_error(str(error)) from error
    except failure as error:
        raise CommandError(str(error)) from error


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


def _unknown_as_null(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, dict):
        return {key: _unknown_as_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_unknown_as_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tell(line: str) -> None:
    say(f"\nbatchnorm: {line}")


_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}


def say(text: str) -> None:
    """On standard error, wrapped between words in a terminal."""
    if sys.stderr.isatty():
        width = max(shutil.get_terminal_size().columns, 20)
        text = "\n".join("\n".join(textwrap.wrap(line, width, **_WHOLE_WORDS)) for line in text.split("\n"))
    print(text, file=sys.stderr, flush=True)


NARROW = 60
"""With fewer columns than these typer's boxes leave too little for the words in them."""

_Formatter: Any = typer.Context.formatter_class


class PlainFormatter(_Formatter):  # type: ignore[misc]
    """Breaks lines between words only."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(width=shutil.get_terminal_size().columns)

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        self._lines(f"{prefix or 'Usage: '}{prog} {args}", 0, 4)

    def write_text(self, text: str) -> None:
        paragraphs = [" ".join(each.split()) for each in text.split("\n\n")]
        for number, paragraph in enumerate(paragraphs):
            self.write("\n" if number else "")
            self._lines(paragraph, 0, 0)

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 0, col_spacing: int = 0) -> None:
        for term, words in rows:
            self._lines(term, 0, 4)
            self._lines(words, 4, 4)

    def _lines(self, text: str, first: int, others: int) -> None:
        margin = " " * self.current_indent
        indents = {"initial_indent": margin + " " * first, "subsequent_indent": margin + " " * others}
        lines = textwrap.wrap(text, self.width, **indents, **_WHOLE_WORDS)
        self.write("".join(f"{line}\n" for line in lines))


def command(app: typer.Typer) -> Any:
    """The program's command, made for the width that the terminal has now."""
    narrow = shutil.get_terminal_size().columns < NARROW
    wanted, app.rich_markup_mode = app.rich_markup_mode, None if narrow else app.rich_markup_mode
    try:
        made: Any = typer.main.get_command(app)
    finally:
        app.rich_markup_mode = wanted
    if narrow:
        context = type("PlainContext", (made.context_class,), {"formatter_class": PlainFormatter})
        for each in (made, *made.commands.values()):
            each.context_class = context
            each.short_help = " ".join((each.help or "").partition("\n\n")[0].split())  # typer's ends in "..."
    return made
