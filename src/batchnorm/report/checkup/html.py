"""The page of a check-up -> one self-contained HTML file."""

from __future__ import annotations

import os
from pathlib import Path

from batchnorm.checks.check import Checkup
from batchnorm.report.checkup.page import CheckPage, build
from batchnorm.report.html import filled, write_text


def render(page: CheckPage) -> str:
    """The HTML of a page. The same page gives the same text."""
    data = {"charts": {panel.id: panel.chart for panel in page.panels}, "units": page.units}
    return filled("check", {"page": page}, data, scripts=("units",))


def write(found: Checkup, path: str | os.PathLike[str]) -> Path:
    """Build the page and write it, whole or not at all. Raises RunError where it cannot be written."""
    return write_text(render(build(found)), Path(path))
