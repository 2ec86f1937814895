"""A Run as a data frame and as a notebook card."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from batchnorm.runs.run import Run, RunError

sys.path.insert(0, str(Path(__file__).parent.parent / "report"))
from synthetic import study
from watched import Made, log_spaced, watched


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    steps = log_spaced(100, 10)
    return watched(tmp_path_factory.mktemp("frames") / "run", [Made("a", 3), Made("b", 2)], steps=steps)


def test_of_a_training_every_quantity_of_every_unit(run: Run) -> None:
    polars, pandas = run.to_polars(), run.to_pandas()
    rows = 5 * len(run.table("steps" if "steps" in run.tables() else "units")["step"].unique())
    assert polars.height == len(pandas) == rows
    assert {"step", "layer", "unit", "gamma", "undo_index", "eval_gap"} <= set(polars.columns)
    assert list(pandas.columns) == polars.columns
    assert polars["undo_index"].to_list() == pandas["undo_index"].tolist()
    assert polars["layer"].cast(str).unique().sort().to_list() == ["a", "b"]


def test_a_raw_table_is_as_it_was_written(run: Run) -> None:
    raw = run.to_polars("units")
    assert raw.columns == run.table("units").column_names
    assert "rank" not in raw.columns
    assert raw.height == run.table("units").num_rows


def test_of_several_processes_all_rows_with_their_rank(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "watch", layers=[])
    run.append("log", {"step": [0, 1], "value": [1.0, 2.0]})
    run.append("log", {"step": [0], "value": [5.0]}, rank=2)
    frame = run.to_pandas("log")
    assert frame["rank"].tolist() == [0, 0, 2]
    assert frame["value"].tolist() == [1.0, 2.0, 5.0]


def test_of_a_study_the_table_units(tmp_path: Path) -> None:
    run = study(tmp_path / "run", seeds=(0,), measured=[0, 5], width=3)
    assert run.to_polars().height == run.table("units").num_rows


def test_a_missing_table_is_named(run: Run) -> None:
    with pytest.raises(RunError, match="no table 'probe'"):
        run.to_polars("probe")


@pytest.mark.parametrize("library", ["polars", "pandas"])
def test_without_the_library_one_line_says_what_to_install(
    run: Run, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"this needs {library}: pip install 'batchnorm\[dataframes\]'"):
        getattr(run, f"to_{library}")()


def test_a_run_says_what_it_is_in_a_line(run: Run) -> None:
    assert repr(run) == f"<Run {run.path}: watch, complete>"


def test_in_a_notebook_it_shows_its_answer_without_a_script(run: Run) -> None:
    shown = run._repr_html_()
    assert "undo_index" in shown
    assert shown.count("<path") == 2
    assert "<script" not in shown


def test_a_study_shows_its_answer_too(tmp_path: Path) -> None:
    run = study(tmp_path / "run", seeds=(0,), measured=[0, 5], width=3)
    assert "Could they?" in run._repr_html_()


def test_hostile_names_stay_text_in_a_notebook(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    run = watched(tmp_path / "<b>run", [Made(name, 3)], steps=log_spaced(100, 10))
    shown = run._repr_html_()
    assert "<script" not in shown
    assert "<b>run" not in shown
    assert "&lt;script&gt;" in shown


def test_a_damaged_run_shows_the_reason(tmp_path: Path) -> None:
    run = watched(tmp_path / "run", [Made("a", 3)], steps=log_spaced(100, 10))
    part = next(run.path.glob("units-*.parquet"))
    part.write_bytes(part.read_bytes()[:50])
    assert "is damaged" in run._repr_html_()


def test_a_run_of_an_unknown_kind_shows_itself(tmp_path: Path) -> None:
    assert "&lt;Run" in Run.create(tmp_path / "run", "other")._repr_html_()


def test_views_are_imported_at_first_use(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the report is imported by a Run, until it is shown."""
    imported: list[str] = []
    original: Any = builtins.__import__

    def noting(name: str, *args: Any, **kwargs: Any) -> Any:
        imported.append(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", noting)
    repr(Run.open(run.path))
    assert not [name for name in imported if "report" in name]
