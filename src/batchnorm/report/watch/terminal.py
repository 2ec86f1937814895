"""What `batchnorm show` and `batchnorm report` print of watched trainings: tables of 80 columns, then words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchnorm.checks.words import finding_lines
from batchnorm.console import encodable, write, write_table
from batchnorm.report.tables import jsonable
from batchnorm.report.watch.page import Told
from batchnorm.report.watch.rows import RUN_COLUMNS
from batchnorm.report.watch.spark import ASCII_BARS, BARS, Spark
from batchnorm.words import shortened

NAME, NARROW_NAME = 18, 15
SPARK = 12
WIDE = 120
"""Columns from which on a layer's type and the scale of its curve stand in columns of their own."""
COLUMNS = (
    "layer", "type", "fed by", "units", "undo\nindex", "over time", "scale", "undo\nangle", "undone", "away", "dead",
    "gradient\ndiverted", "eval\ngap",
)  # fmt: skip
LEFT = ("layer", "type", "fed by", "over time", "scale")


def show(told: Told, console: Console) -> None:
    """The layers with sparklines, the answer, and the findings."""
    write_table(console, layer_table(told, console), [row.name for row in told.layers])
    console.print()
    write(console, "\n\n".join(told.answer.lines()))
    write(console, "\n" + "\n".join(finding_lines(told.reading.findings)))


def layer_table(told: Told, console: Console) -> Table:
    """A row a layer; of two lines where the terminal is narrow: type and scale stand in the second."""
    bars = BARS if console.encoding.lower().startswith("utf") else ASCII_BARS
    wide = console.width >= WIDE
    caption = (
        "Medians and shares over units at the last step. Over time: undo_index on a scale of its own, which stands "
        f"{'beside' if wide else 'below'} it; 0{bars[2]} is the height of 0."
    )
    if not wide and any(row.producer for row in told.layers):
        caption += " On: the layer that feeds it."
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption, caption_justify="left")
    for name in COLUMNS if wide else (name for name in COLUMNS if name not in ("type", "fed by", "scale")):
        whole = name in ("over time", "scale")
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=whole, overflow="fold")
    for layer, row in zip(told.reading.layers, told.layers, strict=True):
        spark = Spark.of(layer.curves.get("undo_index"), SPARK)
        name, kind, producer, units, undo, *others = row.cells()
        others = [cell.replace("under ", "<") for cell in others]
        name, drawn, scale = shortened(name, NAME if wide else NARROW_NAME), spark.line(bars), spark.scale(bars)
        if wide:
            cells = [name, shortened(kind, NAME), shortened(producer, NAME), units, undo, drawn, scale, *others]
        else:
            below = shortened(row.brief, NARROW_NAME)
            cells = [f"{name}\n{below}".rstrip(), units, undo, f"{drawn}\n{scale}".rstrip("\n"), *others]
        table.add_row(*(Text(encodable(cell, console)) for cell in cells))
    return table


def run_lines(told: Sequence[Told], console: Console) -> None:
    """Several runs: a line of figures and the answer of each."""
    for run in told:
        facts = zip(RUN_COLUMNS[1:], run.row.cells(())[1:], strict=True)
        write(console, f"{run.label}: " + ", ".join(f"{name} {cell}" for name, cell in facts if cell))
        write(console, f"{run.answer.headline}\n")


def described(told: Sequence[Told], page: Path | None) -> dict[str, Any]:
    """Of one run its description with the page's path (None where none was written); of several, a list of them."""
    where = {} if page is None else {"report": str(page)}
    if len(told) == 1:
        return where | _run(told[0])
    return where | {"runs": [_run(run) for run in told]}


def _run(told: Told) -> dict[str, Any]:
    return {
        "run": str(told.reading.run.path),
        "status": told.reading.status,
        "last_step": told.reading.last_step,
        "answer": jsonable(told.answer),
        "classes": told.answer.classes.as_dict(),
        "layers": [jsonable(row) for row in told.layers],
        "logged": dict(told.row.logged),
        "findings": [finding.as_dict() for finding in told.reading.findings],
    }
