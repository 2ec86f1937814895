"""A Run in a notebook: its answer and a small table with sparklines. No script, and every word of the Run escaped."""

from __future__ import annotations

from markupsafe import Markup

from batchnorm.report.watch.answer import answer
from batchnorm.report.watch.numbers import Reading, read
from batchnorm.report.watch.rows import COLUMNS, TEXTS, counted, layer_rows
from batchnorm.report.watch.spark import SVG_WIDTH, Spark
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
    at = COLUMNS.index("undo_index") + 1
    names = (*COLUMNS[:at], "over time", "scale", *COLUMNS[at:])
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in names)
    sides = ["left" if name in TEXTS else "right" for name in names]
    rows = []
    for layer, row in list(zip(reading.layers, layer_rows(reading), strict=True))[:MOST_LAYERS]:
        spark = Spark.of(layer.curves.get("undo_index"), SVG_WIDTH // 2)
        drawn = Markup(spark.svg())  # of numbers alone
        texts = [shortened(cell) for cell in row.cells()]
        cells = [*texts[:at], drawn, spark.ends, *texts[at:]]
        lined = Markup("").join(CELL.format(side, cell) for side, cell in zip(sides, cells, strict=True))
        rows.append(Markup("<tr>{}</tr>").format(lined))
    more = len(reading.layers) - MOST_LAYERS
    note = Markup("<p>and {} more layers</p>").format(count(more)) if more > 0 else Markup("")
    note += Markup("<p>Over time: undo_index on a scale of its own; the dashed line is 0.</p>")
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>{}").format(
        head, Markup("").join(rows), note
    )
