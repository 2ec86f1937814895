"""Rows are buffered in memory and written to the Run in parts."""

import numpy as np
import pyarrow as pa

from batchnorm.runs.run import Run
from batchnorm.study import experiment as rows_module
from batchnorm.study.experiment import Rows


def test_blocks_become_one_part_with_keys_repeated(tmp_path):
    run = Run.create(tmp_path / "run", "study")
    rows = Rows(run)
    three, two = np.arange(3), np.arange(2)
    rows.add("units", {"seed": 0, "arm": "none", "step": 5, "unit": three}, {"mean": np.array([1.0, np.nan, 3.0])})
    rows.add("units", {"seed": 1, "arm": "fixed", "step": 5, "unit": two}, {"mean": np.array([4.0, 5.0])})
    rows.add("curves", {"seed": 0, "arm": "none", "step": 5}, {"loss": 0.5})
    assert run.tables() == []
    rows.flush()
    table = run.table("units")
    assert table["seed"].to_pylist() == [0, 0, 0, 1, 1]
    assert table["arm"].to_pylist() == ["none"] * 3 + ["fixed"] * 2
    assert table["unit"].to_pylist() == [0, 1, 2, 0, 1]
    np.testing.assert_array_equal(table["mean"].to_numpy(), [1, np.nan, 3, 4, 5])
    assert table.schema.field("step").type == pa.int64()
    assert run.table("curves").num_rows == 1
    rows.flush()
    assert len(list(run.path.glob("*.parquet"))) == 2, "nothing new, no new part"


def test_parts_are_written_now_and_then(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", "study")
    rows = Rows(run)
    rows.add("curves", {"seed": 0}, {"loss": 0.5})
    rows.flush_if_due()
    assert run.tables() == []
    monkeypatch.setattr(rows_module, "SECONDS_BETWEEN_PARTS", -1.0)
    rows.flush_if_due()
    assert run.tables() == ["curves"]


def test_columns_missing_from_a_block_are_null(tmp_path):
    run = Run.create(tmp_path / "run", "study")
    rows = Rows(run)
    rows.add("units", {"unit": np.arange(1)}, {"a": np.ones(1), "b": np.ones(1)})
    rows.add("units", {"unit": np.arange(1)}, {"a": np.ones(1)})
    rows.flush()
    assert run.table("units")["b"].to_pylist() == [1.0, None]
