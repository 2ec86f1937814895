"""What the page's script reads: every curve and every unit's last values, packed; charts as specifications.

Nothing here is drawn until it is chosen: a map of all layers needs medians only, and one layer's curves are unpacked
when that layer is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from batchnorm.report.watch import panels
from batchnorm.report.watch.numbers import UNIT_COLUMNS, Curve, LayerReading
from batchnorm.report.watch.packing import pack
from batchnorm.report.watch.page import Told, WatchPage
from batchnorm.verdict import CLASS_NAMES
from batchnorm.words import shortened

# What the map shows: a curve's name, what it is called, and the scale that its colours are on.
MAPS = (
    ("undo_index", "undo_index (median over units)", "diverging"),
    ("gradient_diverted", "gradient diverted (median over units)", "share"),
    ("dead", "dead units (share)", "share"),
    ("eval_gap", "train/eval gap (median over units)", "decades"),
)
HEADERS = {
    "undo_index": "undo_index",
    "undo_angle": "undo_angle",
    "bare_angle": "bare_angle",
    "input_mean": "mean",
}
SCATTERS = (("s", "gamma"), ("input_mean", "beta"))


def payload(page: WatchPage) -> dict[str, Any]:
    """JSON values; numbers of layers in `panels.LAYER`'s and `UNIT_COLUMNS`' order, packed."""
    names = [run.label for run in page.runs]
    last = max((run.reading.last_step or 0 for run in page.runs), default=0)
    known = {name for run in page.runs for layer in run.reading.layers for name in layer.curves}
    place = {name: at for at, name in enumerate(page.layers)}
    drawn = panels.present(panels.LAYER, known)
    return {
        "layers": [{"name": name[:1000], "short": shortened(name, 48)} for name in page.layers],
        "runs": [_run(run, place) for run in page.runs],
        "last": last,
        "maps": [{"id": name, "title": title, "scale": scale} for name, title, scale in MAPS if name in known],
        "panels": [
            {
                "id": panel.id,
                "title": panel.title,
                "series": [[name, side] for name, side in panel.series.items()],
                "limits": panel.limits,
                "log": panel.log,
                "spec": panels.spec(panel, names, last),
            }
            for panel in drawn
        ],
        "scatters": [
            {"x": x, "y": y, "title": f"{y} against {HEADERS.get(x, x)}", "spec": panels.scatter(x, y, names)}
            for x, y in SCATTERS
        ],
        "classes": [*CLASS_NAMES.values()],
        "logged": _logged(page, names),
        "columns": [*(["run"] if page.several else []), "unit", *UNIT_COLUMNS],
        "headers": HEADERS,
    }


def _run(run: Told, place: dict[str, int]) -> dict[str, Any]:
    steps = run.reading.steps
    return {
        "label": run.label,
        "steps": steps.tolist(),
        "layers": {
            place[layer.name]: {
                "units": layer.units,
                "at": layer.at,
                "about": [row.kind, row.producer and f"fed by {row.producer}"],
                "curves": {name: _curve(curve, steps) for name, curve in layer.curves.items()},
                "last": _last(layer),
            }
            for layer, row in zip(run.reading.layers, run.layers, strict=True)
        },
    }


def _curve(curve: Curve, steps: np.ndarray) -> dict[str, Any]:
    packed: dict[str, Any] = {"rows": len(curve.values), "values": pack(curve.values)}
    return (
        packed
        if curve.steps is steps or np.array_equal(curve.steps, steps)
        else packed | {"steps": curve.steps.tolist()}
    )


def _last(layer: LayerReading) -> str | None:
    if layer.at is None:
        return None
    return pack(np.stack([layer.last[name] for name in UNIT_COLUMNS]))


def _logged(page: WatchPage, labels: list[str]) -> list[dict[str, Any]]:
    """A chart a name: the mean of each stretch of steps, and the range in it."""
    charts = []
    for name in page.logged:
        curves = []
        last = 0
        for run in page.runs:
            scalar = next((each for each in run.reading.scalars if each.name == name), None)
            if scalar is not None:
                steps = scalar.steps.tolist()
                last = max(last, *steps)
                curves.append({"run": run.label, "steps": steps, "rows": 3, "values": pack(scalar.values)})
        panel = panels.Curves("logged", name, {"logged": name})
        charts.append({"title": shortened(name), "curves": curves, "spec": panels.spec(panel, labels, last)})
    return charts
