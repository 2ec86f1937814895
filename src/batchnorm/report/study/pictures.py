"""Write the charts of a study's sections as PNG files, one per section."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import vl_convert

import batchnorm.report.charts as charts
from batchnorm.report.page import Section
from batchnorm.runs.run import RunError

MAIN = ("accuracy", "undo", "gamma-beta", "optimal", "percentiles", "gradient")
TOTAL_WIDTH = 960
PIXEL_RATIO = 1.5
LONGEST_TITLE = 40
INK = "#333333"
AXIS = {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "gridColor": "#e6e6e6"}
CONFIG = {"background": "white", "view": {"stroke": None}, "axis": AXIS, "title": {"anchor": "start", "color": INK}}


def write_pictures(
    sections: Sequence[Section], folder: str | os.PathLike[str], names: tuple[str, ...] = MAIN
) -> list[Path]:
    """Write one PNG per named section that has charts, and create the folder if missing.

    Raises RunError if a file cannot be written.
    """
    target = Path(folder)
    written = []
    version = charts.vega_lite_version()
    for section in sections:
        if section.id in names and section.panels:
            picture = vl_convert.vegalite_to_png(compose(section), version, scale=PIXEL_RATIO, config=CONFIG)
            path = target / f"{section.id}.png"
            try:
                target.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture)
            except OSError as error:
                raise RunError(f"cannot write pictures into {target}: {error.strerror or error}") from error
            written.append(path)
    return written


def compose(section: Section) -> charts.Spec:
    """One Vega-Lite chart of a section: its panels in rows, with titles, and the legend below."""

    def body(spec: charts.Spec) -> charts.Spec:
        return {key: value for key, value in spec.items() if key not in ("$schema", "config")}

    width = TOTAL_WIDTH // section.columns - 60
    panels = []
    for panel in section.panels:
        title = panel.title if len(panel.title) <= LONGEST_TITLE else f"{panel.title[:LONGEST_TITLE]}…"
        panels.append({**body(panel.chart), "width": width, "title": title})
    starts = range(0, len(panels), section.columns)
    rows: list[charts.Spec] = [{"hconcat": panels[start : start + section.columns], "spacing": 24} for start in starts]
    if section.legend:
        rows.append(body(charts.legend(section.legend)))
    return {"$schema": section.panels[0].chart["$schema"], "vconcat": rows, "spacing": 22}
