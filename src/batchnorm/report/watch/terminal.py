"""Watched trainings in the terminal: tables of 80 columns, then words; and the same as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchnorm.checks.findings import finding_lines
from batchnorm.report.tables import jsonable
from batchnorm.report.terminal import encodable, write, write_table
from batchnorm.report.watch.rows import ASCII_BARS, BARS, RUN_COLUMNS, LayerRow, Spark, Summary
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


def show(runs: Sequence[Summary], console: Console) -> None:
    """Of one run the layers with sparklines, the answer and the findings; of several figures and the answer of each."""
    if len(runs) > 1:
        for run in runs:
            facts = zip(RUN_COLUMNS[1:], run.row.cells(())[1:], strict=True)
            write(console, f"{run.label}: " + ", ".join(f"{name} {cell}" for name, cell in facts if cell))
            write(console, f"{run.answer.headline}\n")
        return
    (run,) = runs
    write_table(console, layer_table(run, console), [_whole_name(row) for row in run.layers])
    console.print()
    write(console, "\n\n".join(run.answer.lines()))
    write(console, "\n" + "\n".join(finding_lines(run.reading.findings)))


def _whole_name(row: LayerRow) -> str:
    return f"{row.name} ({row.brief})" if row.brief else row.name


def layer_table(run: Summary, console: Console) -> Table:
    """A row a layer; of two lines where the terminal is narrow: type and scale stand in the second."""
    bars = BARS if console.encoding.lower().startswith("utf") else ASCII_BARS
    wide = console.width >= WIDE
    caption = (
        "Medians and shares over units at the last step. Over time: undo_index, with the scale of its bars; "
        f"0{bars[2]} is the height of 0."
    )
    if not wide and any(row.producer for row in run.layers):
        caption += " On: the layer that feeds it."
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption, caption_justify="left")
    for name in COLUMNS if wide else (name for name in COLUMNS if name not in ("type", "fed by", "scale")):
        whole = name in ("over time", "scale")
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=whole, overflow="fold")
    for layer, row in zip(run.reading.layers, run.layers, strict=True):
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


def describe(runs: Sequence[Summary]) -> dict[str, Any]:
    """JSON values: of one run, or of several as a list under "runs"."""
    return _described(runs[0]) if len(runs) == 1 else {"runs": [_described(run) for run in runs]}


def _described(run: Summary) -> dict[str, Any]:
    return {
        "run": str(run.reading.run.path),
        "status": run.reading.status,
        "last_step": run.reading.last_step,
        "answer": jsonable(run.answer),
        "classes": run.answer.classes.as_dict(),
        "layers": [jsonable(row) for row in run.layers],
        "logged": dict(run.row.logged),
        "findings": [finding.as_dict() for finding in run.reading.findings],
    }
