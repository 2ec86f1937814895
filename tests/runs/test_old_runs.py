"""Runs of earlier versions stay readable: the folders in runs/ are never written again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from batchnorm.quantities import CLASSES, class_names
from batchnorm.report.study.numbers import Study, _classified
from batchnorm.report.tables import Table
from batchnorm.runs.history import DERIVED, MEASURED, History
from batchnorm.runs.run import VERSION, Run, RunError
from batchnorm.words import ClassCounts

RUNS = Path(__file__).parent / "runs"


@pytest.mark.slow
def test_a_study_of_version_1_can_be_read_and_reported(tmp_path: Path) -> None:
    from batchnorm.report import render

    run = Run.open(RUNS / "v1-study")
    assert run.info["version"] == 1
    assert run.tables() == ["curves", "optimal", "parting", "start", "units"]
    assert run.table("curves").num_rows == 16
    assert "undo" in render(run, tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_units_of_an_old_study_get_their_classes_from_its_columns() -> None:
    old, new = (Study.read(Run.open(RUNS / name)) for name in ("v1-study", "v3-study"))
    assert "nearer_undone" in Run.open(RUNS / "v1-study").table("units").column_names
    assert {"class", "undo_angle", "bare_angle"} <= set(Run.open(RUNS / "v3-study").table("units").column_names)
    for table in (old.units, old.optimal):
        assert set(table.names("class")) <= set(CLASSES)
        assert np.isfinite(table.rows(arm="learned")["undo_angle"]).all()
    for arm in ("learned", "fixed", "undone"):
        one, other = (study.units.rows(arm=arm) for study in (old, new))
        assert ClassCounts.of(one["code"]) == ClassCounts.of(other["code"]), "the same study, run by both versions"
        np.testing.assert_allclose(one["undo_index"], other["undo_index"], rtol=1e-4, atol=1e-4)
    assert set(old.units.rows(arm="none").names("class")) == {"unknown"}


def test_stored_quantities_follow_from_the_stored_columns() -> None:
    run = Run.open(RUNS / "v3-study")
    stored = Study.read(run).units
    bare = Table(stored.numbers, {name: words for name, words in stored.words.items() if name != "class"})
    computed = _classified(bare, run.info["config"])
    assert computed.texts("class") == stored.texts("class")
    for name in ("undo_index", "undo_angle", "bare_angle", "dead"):
        np.testing.assert_allclose(computed[name], stored[name], rtol=1e-6, atol=1e-6)


def test_a_recording_of_version_3_ends_with_the_last_step() -> None:
    run = Run.open(RUNS / "v3-watch")
    assert (run.info["version"], run.info["steps"]) == (3, 8)
    history = History.read(run)
    assert history.steps.tolist() == [0, 4, 7]
    for layer in history.layers:
        assert np.isnan(layer["mean"][2]).all()
        assert np.isfinite(layer["undo_index"][2]).any()
        assert (layer["count"][2] == 0).all()
    assert run.to_polars()["class"].unique().is_in([*CLASSES]).all()


def test_a_recording_of_version_2_has_every_documented_column() -> None:
    run = Run.open(RUNS / "v2-watch")
    assert run.info["version"] == 2
    assert run.tables() == ["log", "probe", "shift", "steps", "units"]
    history = History.read(run)
    assert history.steps.tolist() == [0, 2, 4, 6, 8]
    assert {name for layer in history.layers for row in layer["class"] for name in class_names(row)} <= set(CLASSES)
    page = (Path(__file__).parent.parent.parent / "docs" / "run-format.md").read_text(encoding="utf-8")
    for table in run.tables():
        for column in run.table(table).column_names:
            assert f"`{column}`" in page, f"docs/run-format.md does not name {column} of {table}"
    for layer in history.layers:
        for name in (*MEASURED, *DERIVED):
            assert layer[name].shape == (5, layer.units)
        assert np.isfinite(layer["undo_index"]).all()


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    shutil.copytree(RUNS / "v2-watch", tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**info, "version": VERSION + 1}))
    with pytest.raises(RunError, match="upgrade it"):
        Run.open(tmp_path / "run")
