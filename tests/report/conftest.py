"""One whole synthetic study, made once: most tests only read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
import synthetic
from pages import build

from batchnorm.report.study.page import StudyPage
from batchnorm.runs.run import Run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return synthetic.study(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def page(run: Run) -> StudyPage:
    return build(run)


@pytest.fixture(scope="session")
def browser() -> Iterator[chromium.Chromium]:
    program = chromium.find()
    if program is None:
        pytest.skip("Chromium is not installed")
    with chromium.Chromium(program) as opened:
        yield opened


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Where a test writes a Run of its own."""
    return tmp_path / "run"
