"""A Run in a notebook: its answer and a small table with sparklines. No script, and every word of the Run escaped."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from batchnorm.report.watch.rows import COLUMNS, SVG_WIDTH, TEXTS, Spark, Summary
from batchnorm.words import count, shortened

MOST_LAYERS = 30
CELL = Markup('<td style="text-align:{}">{}</td>')


def card(runs: Sequence[Summary]) -> Markup:
    """HTML of the first, and only, run."""
    run = runs[0]
    reading, path = run.reading, shortened(str(run.reading.run.path), 120)
    last = "no step" if reading.last_step is None else f"step {count(reading.last_step)}"
    parts = [
        Markup("<p><b>{}</b> ({}, {})</p>").format(path, reading.status, last),
        Markup("<p>{}</p>").format(run.answer.headline),
        _table(run),
        Markup("<p>Findings: {}. The page: <code>batchnorm report {}</code></p>").format(run.row.findings, path),
    ]
    return Markup("<div>{}</div>").format(Markup("").join(parts))


def _table(run: Summary) -> Markup:
    if not run.layers:
        return Markup("")
    at = COLUMNS.index("undo_index") + 1
    names = (*COLUMNS[:at], "over time", "scale", *COLUMNS[at:])
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in names)
    sides = ["left" if name in TEXTS else "right" for name in names]
    rows = []
    for layer, row in list(zip(run.reading.layers, run.layers, strict=True))[:MOST_LAYERS]:
        spark = Spark.of(layer.curves.get("undo_index"), SVG_WIDTH // 2)
        drawn = Markup(spark.svg())  # of numbers alone
        texts = [shortened(cell) for cell in row.cells()]
        cells = [*texts[:at], drawn, spark.ends, *texts[at:]]
        lined = Markup("").join(CELL.format(side, cell) for side, cell in zip(sides, cells, strict=True))
        rows.append(Markup("<tr>{}</tr>").format(lined))
    more = len(run.layers) - MOST_LAYERS
    note = Markup("<p>and {} more layers</p>").format(count(more)) if more > 0 else Markup("")
    note += Markup("<p>Over time: undo_index on a scale of its own; the dashed line is 0.</p>")
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>{}").format(
        head, Markup("").join(rows), note
    )
