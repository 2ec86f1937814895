"""Help that a narrow terminal shows without cutting words: plain text, an option's help on lines of its own."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

import typer

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
        lines = textwrap.wrap(
            text,
            self.width,
            initial_indent=margin + " " * first,
            subsequent_indent=margin + " " * others,
            break_long_words=False,
            break_on_hyphens=False,
        )
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
