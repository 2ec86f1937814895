"""Shared by the commands: one-line errors, progress on standard error, results on standard output."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


class CommandError(Exception):
    """A mistake of the user, in one line."""


usage_error: type[Exception] = typer.BadParameter.__mro__[1]
"""click's UsageError, whose message refers to the command's help. Its module depends on typer's version."""

Errors = type[Exception] | tuple[type[Exception], ...]


@contextmanager
def in_one_line(failure: Errors, usage: Errors = ()) -> Iterator[None]:
    """Convert errors of the library to those of the command; the line of `usage` errors names the command's help."""
    try:
        yield
    except usage as error:
        raise usage_error(str(error)) from error
    except failure as error:
        raise CommandError(str(error)) from error


def keep_file(path: Path | None, force: bool) -> None:
    """Raise CommandError if an output would replace a file."""
    if path is not None and path.exists() and not force:
        raise CommandError(f"{path} exists: choose another name, or --force to replace it")


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error; call the yielded function with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(label, total=None)

    def update(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


def print_status(line: str) -> None:
    print_error(f"\nbatchnorm: {line}")


_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}


def print_error(text: str) -> None:
    """Print to standard error, wrapped between words in a terminal."""
    if sys.stderr.isatty():
        width = max(shutil.get_terminal_size().columns, 20)
        text = "\n".join("\n".join(textwrap.wrap(line, width, **_WHOLE_WORDS)) for line in text.split("\n"))
    print(text, file=sys.stderr, flush=True)


NARROW = 60
"""Below this width, typer's boxes leave too little room for words."""

_Formatter: Any = typer.Context.formatter_class


class PlainFormatter(_Formatter):  # type: ignore[misc]
    """A help formatter that breaks lines between words only."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(width=shutil.get_terminal_size().columns)

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        self._lines(f"{prefix or 'Usage: '}{prog} {args}", 0, 4)

    def write_text(self, text: str) -> None:
        for number, paragraph in enumerate(text.split("\n\n")):
            self.write("\n" if number else "")
            self._lines(" ".join(paragraph.split()), 0, 0)

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
    """The program's command, with plain help in a narrow terminal."""
    narrow = shutil.get_terminal_size().columns < NARROW
    original, app.rich_markup_mode = app.rich_markup_mode, None if narrow else app.rich_markup_mode
    try:
        group: Any = typer.main.get_command(app)
    finally:
        app.rich_markup_mode = original
    if narrow:
        context = type("PlainContext", (group.context_class,), {"formatter_class": PlainFormatter})
        for subcommand in (group, *group.commands.values()):
            subcommand.context_class = context
            subcommand.short_help = " ".join((subcommand.help or "").partition("\n\n")[0].split())  # typer's is cut
    return group
