"""What `batchnorm show` and `batchnorm report` print of watched trainings: tables of 80 columns, then words."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchnorm.checks.words import finding_lines
from batchnorm.console import encodable, write, write_table
from batchnorm.report.watch.page import Told
from batchnorm.report.watch.rows import RUN_COLUMNS
from batchnorm.report.watch.spark import ASCII_BARS, BARS, line
from batchnorm.words import shortened

NAME = 18
SPARK = 10
COLUMNS = (
    "layer", "units", "undo\nindex", "over time", "undo\nangle", "undone", "away", "dead", "gradient\ndiverted",
    "eval\ngap",
)  # fmt: skip


def show(told: Told, console: Console) -> None:
    """The layers with sparklines, the answer, and the findings."""
    write_table(console, layer_table(told, console), [row.name for row in told.layers])
    console.print()
    write(console, "\n\n".join(told.answer.lines()))
    write(console, "\n" + "\n".join(finding_lines(told.reading.findings)))


def layer_table(told: Told, console: Console) -> Table:
    """A row a layer. The sparkline is undo_index from 0 (low) to 1 (high), on a logarithmic scale of steps."""
    bars = BARS if console.encoding.lower().startswith("utf") else ASCII_BARS
    caption = f"Medians and shares over units at the last step. Over time: undo_index, {bars[0]} 0 to {bars[-1]} 1."
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption, caption_justify="left")
    for name in COLUMNS:
        left = name in (COLUMNS[0], "over time")
        table.add_column(name, justify="left" if left else "right", no_wrap=name == "over time", overflow="fold")
    for layer, row in zip(told.reading.layers, told.layers, strict=True):
        name, units, undo, *others = row.cells()
        spark = line(layer.curves.get("undo_index"), SPARK, 0.0, 1.0, bars)
        cells = [shortened(name, NAME), units, undo, spark, *others]
        table.add_row(*(Text(encodable(cell, console)) for cell in cells))
    return table


def run_lines(told: Sequence[Told], console: Console) -> None:
    """Several runs: a line of figures and the answer of each."""
    for run in told:
        facts = zip(RUN_COLUMNS[1:], run.row.cells(())[1:], strict=True)
        write(console, f"{run.label}: " + ", ".join(f"{name} {cell}" for name, cell in facts if cell))
        write(console, f"{run.answer.headline}\n")
