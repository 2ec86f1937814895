"""The page of a study of regimes -> one self-contained HTML file."""

from __future__ import annotations

import os
from pathlib import Path

from batchnorm.report.html import FILE, filled, write_text
from batchnorm.report.regimes.page import RegimesPage, build
from batchnorm.runs.run import Run


def render(page: RegimesPage) -> str:
    """The HTML of a page. The same page gives the same text."""
    charts = {panel.id: panel.chart for _, panels in page.parts for panel in panels}
    return filled("regimes", {"page": page}, {"charts": charts}, scripts=("units",))


def write(run: Run, path: str | os.PathLike[str] | None = None) -> Path:
    """Build the Run's page and write it, whole or not at all, to `path`, or to report.html in the Run's folder."""
    return write_text(render(build(run)), Path(path) if path is not None else run.path / FILE)
