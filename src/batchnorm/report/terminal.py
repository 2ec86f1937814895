"""Write text and tables to a terminal of any width and encoding, and values as JSON.

The values of a report's JSON come from the function `describe` of its kind (`report.KINDS`).
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def write(console: Console, text: str) -> None:
    """Write text, wrapped between words in a terminal or a notebook and not wrapped into a file or a pipe."""
    console.print(
        encodable(text, console),
        markup=False,
        highlight=False,
        soft_wrap=not (console.is_terminal or console.is_jupyter),
    )


def encodable(text: str, console: Console) -> str:
    """Replace control characters, and those that the terminal cannot encode, by question marks."""
    printable = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    return printable.encode(console.encoding, "replace").decode(console.encoding)


def write_rows(
    console: Console,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    names: Sequence[str] = (),
    left: Sequence[str] = (),
    no_wrap: Sequence[str] = (),
    title: str | None = None,
) -> None:
    """Write a table without breaking words; if the console is too narrow, write "name: value" lines per row.

    Columns in `left` are aligned left, those in `no_wrap` never wrap. `names` are the rows' full names for a narrow
    console; by default the first column.
    """
    justified: Any = {"title_justify": "left", "caption_justify": "left"}
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, title=title, caption=caption, **justified)
    for head in heads:
        justify: Literal["left", "right"] = "left" if head in left else "right"
        table.add_column(head, justify=justify, no_wrap=head in no_wrap, overflow="fold")
    for row in rows:
        table.add_row(*(Text(encodable(cell, console)) for cell in row))
    size = console.measure(table, options=console.options.update(width=10_000))
    if size.minimum > console.width:
        _write_blocks(console, table, names)
        return
    if size.maximum > console.width:
        _keep_words(console, table, size.maximum - console.width)
    console.print(table)


def _keep_words(console: Console, table: Table, excess: int) -> None:
    """Narrow the widest columns by `excess` in total, but none so much that a word would be cut."""
    narrowest, widths = [], []
    for column in table.columns:
        sizes = [console.measure(Text(str(cell))) for cell in (column.header, *column.cells)]
        widths.append(max(size.maximum for size in sizes))
        narrowest.append(widths[-1] if column.no_wrap else max(size.minimum for size in sizes))
    for _ in range(excess):
        wide = [i for i, width in enumerate(widths) if width > narrowest[i]]
        if wide:
            widths[max(wide, key=widths.__getitem__)] -= 1
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
    """Wrap between words and indent further lines; a word longer than a line is folded."""
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


def json_text(value: Any, indent: int) -> str:
    """The value as JSON; NaN and infinity, which JSON lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)
