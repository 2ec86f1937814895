"""What `batchnorm check` prints: the headline, the table of layers, the findings."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchnorm.checks.check import Checkup
from batchnorm.checks.explain import COLUMNS, origins
from batchnorm.checks.findings import finding_lines
from batchnorm.console import encodable, write, write_table
from batchnorm.words import plural, shortened

NAME = 24
WIDE = 110
"""Columns from which on the table says where a layer stands."""
LAYERS = 200
"""Rows of the table: a file may claim a million layers."""


def describe(found: Checkup) -> dict[str, Any]:
    """JSON values."""
    return found.as_dict()


def show(found: Checkup, console: Console) -> None:
    """The whole check-up, in 80 columns."""
    network = found.network
    size = "" if network.size is None else f", {network.size / 1e6:,.1f} MB"
    write(console, f"{network.source} ({network.format}{size})")
    write(console, f"{found.headline}\n")
    if network.layers:
        names = [row.layer for row in found.explanation.rows[:LAYERS]]
        write_table(console, _table(found, console), names)
        explained = found.explanation
        write(console, "\n" + "\n".join(filter(None, (explained.headline, explained.scale_free))) + "\n")
    write(console, "\n".join(finding_lines(found.findings)))


def _table(found: Checkup, console: Console) -> Table:
    rows = found.explanation.rows
    caption = "Medians over units, shares and counts of them; of the running variance min and max."
    if len(rows) > LAYERS:
        caption += f" The first {LAYERS:,} of {plural(len(rows), 'layer')}."
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption, caption_justify="left")
    origin = origins(rows) if console.width >= WIDE else ()
    texts = (COLUMNS[0], *(name for _, name in origin))
    for name in (*texts, *COLUMNS[1:]):
        head = name.replace("_", "\n").replace(" ", "\n").replace("/", "/\n")
        table.add_column(head, justify="left" if name in texts else "right", overflow="fold")
    for row in rows[:LAYERS]:
        layer, *others, variance = (cell.partition(" [") for cell in row.cells())
        stands = (shortened(row.origin[at], NAME) for at, _ in origin)
        cells = [shortened(layer[0], NAME), *stands, *(middle for middle, _, _ in others), variance[2].rstrip("]")]
        table.add_row(*(Text(encodable(cell, console)) for cell in cells))
    return table
