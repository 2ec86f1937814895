"""Runs as earlier versions wrote them stay readable: the folders in runs/ are never written anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from batchnorm.record.history import DERIVED, MEASURED, History
from batchnorm.record.run import VERSION, Run, RunError

RUNS = Path(__file__).parent / "runs"


def test_a_study_of_version_1_can_be_read_and_reported(tmp_path: Path) -> None:
    from batchnorm.report.html import write

    run = Run.open(RUNS / "v1-study")
    assert run.info["version"] == 1
    assert run.tables() == ["curves", "optimal", "parting", "start", "units"]
    assert run.table("curves").num_rows == 16
    assert "undo" in write(run, tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_recording_of_version_2_has_every_documented_column() -> None:
    run = Run.open(RUNS / "v2-watch")
    assert run.info["version"] == 2
    assert run.tables() == ["log", "probe", "shift", "steps", "units"]
    history = History.read(run)
    assert history.steps.tolist() == [0, 2, 4, 6, 8]
    page = (Path(__file__).parent.parent.parent / "docs" / "run-format.md").read_text(encoding="utf-8")
    for table in run.tables():
        for column in run.table(table).column_names:
            assert f"`{column}`" in page, f"docs/run-format.md does not name {column} of {table}"
    for layer in history.layers:
        for name in (*MEASURED, *DERIVED):
            assert layer[name].shape == (5, layer.units)
        assert np.isfinite(layer["undo_index"]).all()


def test_a_newer_version_is_told_and_not_guessed(tmp_path: Path) -> None:
    shutil.copytree(RUNS / "v2-watch", tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**info, "version": VERSION + 1}))
    with pytest.raises(RunError, match="upgrade it"):
        Run.open(tmp_path / "run")
