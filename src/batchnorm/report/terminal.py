"""Text into a terminal, whatever it can write."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def write(console: Console, text: str) -> None:
    """Wrapped between words in a terminal, as it is into a file or a pipe."""
    console.print(encodable(text, console), markup=False, highlight=False, soft_wrap=not console.is_terminal)


def encodable(text: str, console: Console) -> str:
    """What the terminal cannot write becomes a question mark; control characters, which could move its cursor, too."""
    kept = "".join(each if each.isprintable() or each == "\n" else "?" for each in text)
    return kept.encode(console.encoding, "replace").decode(console.encoding)


def write_rows(
    console: Console,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str,
    names: Sequence[str] = (),
    left: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """A table of texts, as `write_table` writes it; columns of `left` are flush left, those of `whole` never wrap."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption, caption_justify="left")
    for head in heads:
        justify: Literal["left", "right"] = "left" if head in left else "right"
        table.add_column(head, justify=justify, no_wrap=head in whole, overflow="fold")
    for row in rows:
        table.add_row(*(Text(encodable(cell, console)) for cell in row))
    write_table(console, table, names)


def write_table(console: Console, table: Table, names: Sequence[str] = ()) -> None:
    """A table with every word whole; as a block of "name: value" lines for each row where that takes more columns.

    Args:
        console: where to; its width counts, whether it is a terminal or not.
        table: its first column says what the row is of, and titles its block.
        names: what the first column has in full, for the blocks; by default what it shows.
    """
    size = console.measure(table, options=console.options.update(width=10_000))
    if size.minimum > console.width:
        _write_blocks(console, table, names)
        return
    if size.maximum > console.width:
        _keep_words(console, table, size.maximum - console.width)
    console.print(table)


def _keep_words(console: Console, table: Table, excess: int) -> None:
    """Take the excess from the widest columns, but from none so much that a word would be cut, as rich does."""
    least, widths = [], []
    for column in table.columns:
        sizes = [console.measure(each) for each in (Text(str(cell)) for cell in (column.header, *column.cells))]
        widths.append(max(column.min_width or 0, *(each.maximum for each in sizes)))
        shortest = max(column.min_width or 0, *(each.minimum for each in sizes))
        least.append(widths[-1] if column.no_wrap else shortest)
    for _ in range(excess):
        spare = [place for place, width in enumerate(widths) if width > least[place]]
        if spare:
            widths[max(spare, key=lambda place: widths[place])] -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width


def _write_blocks(console: Console, table: Table, names: Sequence[str]) -> None:
    if table.title:
        _write_wrapped(console, str(table.title), "")
    heads = [" ".join(str(column.header).replace("/\n", "/").split()) for column in table.columns]
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    for number, (first, *others) in enumerate(rows):
        _write_wrapped(console, names[number] if names else first, "")
        for head, cell in zip(heads[1:], others, strict=True):
            if cell.strip():
                _write_wrapped(console, f"{head}: {' '.join(cell.split())}", "  ")
    if table.caption:
        _write_wrapped(console, f"\n{table.caption}", "")


def _write_wrapped(console: Console, text: str, margin: str) -> None:
    """Between words, further lines set in; a word that is longer than a line, such as a name, is folded."""
    text = encodable(text, console)
    indent = margin + " " * (len(text) - len(text.lstrip(" ")))
    for paragraph in text.split("\n"):
        lines = textwrap.wrap(
            paragraph,
            console.width,
            initial_indent=indent,
            subsequent_indent=indent + "  " * bool(indent),
            break_on_hyphens=False,
        )
        for line in lines or [""]:
            console.print(Text(line), soft_wrap=True)
