"""The page's main charts as PNG files on white, for a README or a slide."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import vl_convert

from batchnorm.report.charts import Spec
from batchnorm.report.html import vega_lite_version
from batchnorm.report.page import Section
from batchnorm.report.study import charts
from batchnorm.report.study.page import StudyPage
from batchnorm.runs.run import RunError

MAIN = ("accuracy", "undo", "gamma-beta", "optimal", "percentiles", "gradient")
TOTAL_WIDTH = 960
PIXEL_RATIO = 1.5
LONGEST_TITLE = 40
INK = "#333333"


def write_pictures(page: StudyPage, folder: str | os.PathLike[str], sections: tuple[str, ...] = MAIN) -> list[Path]:
    """Write one PNG for each of these sections that has charts, named after it; the folder is made where missing.

    Raises RunError where a file cannot be written.
    """
    target = Path(folder)
    written = []
    for section in page.sections:
        if section.id in sections and section.panels:
            picture = vl_convert.vegalite_to_png(
                compose(section), vl_version=vega_lite_version(), scale=PIXEL_RATIO, config=_config()
            )
            path = target / f"{section.id}.png"
            try:
                target.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture)
            except OSError as error:
                raise RunError(f"cannot write pictures into {target}: {error.strerror or error}") from error
            written.append(path)
    return written


def compose(section: Section) -> Spec:
    """The panels of a section in rows, each under its title, and the legend below, as one Vega-Lite chart."""
    width = TOTAL_WIDTH // section.columns - 60
    panels = []
    for panel in section.panels:
        title = panel.title if len(panel.title) <= LONGEST_TITLE else f"{panel.title[:LONGEST_TITLE]}…"
        body = {key: value for key, value in panel.chart.items() if key not in ("$schema", "config")}
        panels.append({**body, "width": width, "title": title})
    rows: list[Spec] = [
        {"hconcat": panels[first : first + section.columns], "spacing": 24}
        for first in range(0, len(panels), section.columns)
    ]
    if section.legend:
        rows.append({k: v for k, v in charts.legend(section.legend).items() if k not in ("$schema", "config")})
    return {"$schema": section.panels[0].chart["$schema"], "vconcat": rows, "spacing": 22}


def _config() -> dict[str, Any]:
    axis = {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "gridColor": "#e6e6e6"}
    return {"background": "white", "view": {"stroke": None}, "axis": axis, "title": {"anchor": "start", "color": INK}}
