"""What `--json` prints of watched trainings: the answer, every layer's figures and the findings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.report.jsonable import jsonable
from batchnorm.report.watch.page import Told


def described(told: Sequence[Told], page: Path | None) -> dict[str, Any]:
    """Of one run its description with the page's path (None where none was written); of several, a list of them."""
    where = {} if page is None else {"report": str(page)}
    if len(told) == 1:
        return where | _run(told[0])
    return where | {"runs": [_run(run) for run in told]}


def _run(told: Told) -> dict[str, Any]:
    return {
        "run": str(told.reading.run.path),
        "status": told.reading.status,
        "last_step": told.reading.last_step,
        "answer": jsonable(told.answer),
        "classes": told.answer.classes.as_dict(),
        "layers": [jsonable(row) for row in told.layers],
        "logged": dict(told.row.logged),
        "findings": [finding.as_dict() for finding in told.reading.findings],
    }
