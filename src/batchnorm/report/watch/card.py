"""A Run in a notebook: its answer and a small table with sparklines. No script, and every word of the Run escaped."""

from __future__ import annotations

from markupsafe import Markup

from batchnorm.report.watch.answer import answer
from batchnorm.report.watch.numbers import Reading, read
from batchnorm.report.watch.rows import COLUMNS, counted, layer_rows
from batchnorm.report.watch.spark import svg
from batchnorm.runs.run import Run
from batchnorm.words import count, shortened

MOST_LAYERS = 30
CELL = Markup('<td style="text-align:{}">{}</td>')


def card(run: Run) -> str:
    """HTML. Raises RunError where the Run is damaged."""
    reading = read(run)
    last = "no step" if reading.last_step is None else f"step {count(reading.last_step)}"
    found = answer(reading)
    parts = [
        Markup("<p><b>{}</b> ({}, {})</p>").format(shortened(str(run.path), 120), reading.status, last),
        Markup("<p>{}</p>").format(found.headline),
        _table(reading),
        Markup("<p>Findings: {}. The page: <code>batchnorm report {}</code></p>").format(
            counted(reading), shortened(str(run.path), 120)
        ),
    ]
    return str(Markup("<div>{}</div>").format(Markup("").join(parts)))


def _table(reading: Reading) -> Markup:
    if not reading.layers:
        return Markup("")
    names = (*COLUMNS[:3], "over time", *COLUMNS[3:])
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in names)
    rows = []
    for layer, row in list(zip(reading.layers, layer_rows(reading), strict=True))[:MOST_LAYERS]:
        name, units, undo, *others = row.cells()
        spark = Markup(svg(layer.curves.get("undo_index"), 0.0, 1.0))  # drawn from numbers alone
        cells: list[str] = [shortened(name), units, undo, spark, *others]
        lined = Markup("").join(CELL.format("left" if at == 0 else "right", cell) for at, cell in enumerate(cells))
        rows.append(Markup("<tr>{}</tr>").format(lined))
    more = len(reading.layers) - MOST_LAYERS
    note = Markup("<p>and {} more layers</p>").format(count(more)) if more > 0 else Markup("")
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>{}").format(
        head, Markup("").join(rows), note
    )
