"""The page of watched trainings -> one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from batchnorm.report.html import FILE, filled, write_text
from batchnorm.report.watch import payload as panels
from batchnorm.report.watch import rows
from batchnorm.report.watch.page import WatchPage, build
from batchnorm.report.watch.payload import payload
from batchnorm.runs.run import Run


def render(page: WatchPage, refresh: int | None = None) -> str:
    """The HTML of a page. The same page gives the same text. `refresh`: have an open one load itself again."""
    content = {"page": page, "rows": rows, "colours": panels.COLOURS}
    return filled("watch", content, payload(page), refresh, scripts=("heatmap", "watch"))


def target(runs: Sequence[Run], path: str | os.PathLike[str] | None) -> Path:
    """Where the page goes: `path`, or report.html in the Run's folder, which only one Run has."""
    return Path(path) if path is not None else runs[0].path / FILE


def write(runs: Sequence[Run], path: str | os.PathLike[str] | None = None, refresh: int | None = None) -> Path:
    """Build the page and write it, whole or not at all.

    Raises RunError where a table is damaged or the file cannot be written.
    """
    return write_text(render(build(runs), refresh), target(runs, path))
