"""Pages of Runs, as data and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batchnorm.report import Report


def build(subjects: Any) -> Any:
    return Report.of(subjects).page


def write(subjects: Any, path: Path | None = None, refresh: int | None = None) -> Path:
    return Report.of(subjects).write(path, refresh)


def answer(run: Any) -> Any:
    return Report.of(run).summary.answer


def summary(run: Any) -> Any:
    return Report.of(run).summary.rows
