"""A Run on disk: tables are read back, partial files are never seen, and no foreign file is removed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchnorm.runs.run import (
    FORMAT,
    VERSION,
    Run,
    RunError,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a" / "run"


def one_line(error: pytest.ExceptionInfo[RunError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_written_tables_are_read_back(folder: Path) -> None:
    run = Run.create(folder, "study", config={"seeds": 3}, command="batchnorm study")
    run.append("units", {"step": [0, 1], "gamma": [1.0, math.nan]})
    run.append("units", {"step": [2], "gamma": [3.0]})
    run.append("arms", pa.table({"arm": ["none"]}))
    run.note(machine="a laptop")
    run.finish("complete")
    read = Run.open(folder)
    assert read.info == run.info
    assert read.info["format"] == FORMAT
    assert read.info["version"] == VERSION
    assert (read.info["kind"], read.info["status"], read.info["config"]) == ("study", "complete", {"seeds": 3})
    assert read.info["started"] <= read.info["ended"]
    assert read.tables() == ["arms", "units"]
    assert read.table("units")["step"].to_pylist() == [0, 1, 2]
    assert math.isnan(read.table("units")["gamma"][1].as_py())
    assert sorted(p.name for p in folder.iterdir()) == [
        "arms-00001.parquet",
        "run.json",
        "units-00001.parquet",
        "units-00002.parquet",
    ]


def test_parts_stay_in_order_beyond_five_digits(folder: Path) -> None:
    run = Run.create(folder, "study")
    for number, written in ((9, 1), (99_999, 10)):
        run.append("units", {"step": [number]})
        (folder / f"units-{written:05d}.parquet").rename(folder / f"units-{number:05d}.parquet")
    run.append("units", {"step": [100_000]})
    assert (folder / "units-100000.parquet").exists()
    assert run.table("units")["step"].to_pylist() == [9, 99_999, 100_000]


def test_later_parts_may_have_more_columns_and_no_rows_make_no_part(folder: Path) -> None:
    run = Run.create(folder, "study")
    run.append("units", {"step": []})
    assert run.tables() == []
    run.append("units", {"step": [1]})
    run.append("units", {"step": [2], "gamma": [0.5]})
    assert run.table("units")["gamma"].to_pylist() == [None, 0.5]


def test_any_dataframe_tool_reads_it(folder: Path) -> None:
    run = Run.create(folder, "study")
    run.append("units", {"step": [1, 2]})
    assert pq.read_table(folder / "units-00001.parquet")["step"].to_pylist() == [1, 2]


def test_a_reader_never_sees_a_partial_file(folder: Path) -> None:
    run = Run.create(folder, "study")
    for step in range(5):
        run.append("units", {"step": [step] * 100})
        (folder / "units-00099.tmp").write_bytes(b"half a part")
        reader = Run.open(folder)
        assert reader.info["status"] == "running"
        assert reader.table("units").num_rows == 100 * (step + 1)
        assert reader.tables() == ["units"]


def test_an_existing_run_is_kept_without_force(folder: Path) -> None:
    Run.create(folder, "study", mine=1).append("units", {"step": [1]})
    with pytest.raises(RunError, match="already has a Run: choose another folder, or pass force=True") as e:
        Run.create(folder, "study")
    assert str(folder) in one_line(e)
    assert Run.open(folder).info["mine"] == 1
    assert Run.open(folder).table("units").num_rows == 1


def test_force_removes_only_the_files_of_the_run(folder: Path) -> None:
    run = Run.create(folder, "study")
    run.append("units", {"step": [1]})
    mine = ["notes.txt", "my.parquet", "units-1.parquet", "Units-00001.parquet", "figure.html", "data.tmp"]
    for name in mine:
        (folder / name).write_text("mine")
    (folder / "sub").mkdir()
    for name in ("report.html", "run.tmp", "units-00002.tmp"):
        (folder / name).write_text("the Run's")
    fresh = Run.create(folder, "study", force=True)
    assert fresh.tables() == []
    assert sorted(p.name for p in folder.iterdir()) == sorted([*mine, "sub", "run.json"])
    assert all((folder / name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_things_is_refused_and_untouched(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="is not empty and has no Run: choose a new or empty folder"):
        Run.create(tmp_path, "study", force=force)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_leftovers_of_a_killed_create_do_not_block_the_next(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json.tmp").write_text("{")
    Run.create(folder, "study")
    assert [p.name for p in folder.iterdir()] == ["run.json"]


GARBAGE = {
    "no JSON": ("{", "cannot read"),
    "empty": ("", "cannot read"),
    "binary": (b"\xff\xfe\x00", "cannot read"),
    "deep": ("[" * 100_000, "cannot read"),
    "a list": ("[1]", "does not describe a Run"),
    "null": ("null", "does not describe a Run"),
    "foreign": ('{"format": "else", "version": 1}', "does not describe a Run"),
    "no format": ('{"version": 1}', "does not describe a Run"),
    "newer": (json.dumps({"format": FORMAT, "version": VERSION + 1}), "upgrade"),
    "no version": (json.dumps({"format": FORMAT}), "version None"),
    "version text": (json.dumps({"format": FORMAT, "version": "1"}), "version 1"),
    "version true": (json.dumps({"format": FORMAT, "version": True}), "version True"),
    "version 0": (json.dumps({"format": FORMAT, "version": 0}), "version 0"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_an_invalid_run_json_is_refused_and_never_replaced(tmp_path: Path, name: str) -> None:
    content, words = GARBAGE[name]
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "run.json").write_bytes(raw)
    with pytest.raises(RunError, match=words) as error:
        Run.open(tmp_path)
    assert str(tmp_path) in one_line(error)
    for force in (False, True):
        with pytest.raises(RunError, match=words):
            Run.create(tmp_path, "study", force=force)
    assert (tmp_path / "run.json").read_bytes() == raw


def test_no_run_is_said_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunError, match=r"no Run in .*: it has no run.json") as error:
            Run.open(path)
        one_line(error)
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RunError, match="cannot read"):
        Run.open(tmp_path)


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def damage_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def damage_by_garbage(path: Path) -> None:
    path.write_bytes(b"PAR1" + b"\x07" * 500 + b"PAR1")


def damage_in_the_middle(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[60] ^= 1  # one bit of a value; a checksum sees it
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage", [damage_by_truncation, damage_by_emptying, damage_by_garbage, damage_in_the_middle, Path.unlink]
)
def test_a_damaged_part_is_named(folder: Path, damage) -> None:
    run = Run.create(folder, "study")
    for step in range(3):
        run.append("units", {"step": list(range(step, step + 1000)), "gamma": [0.1 * i for i in range(1000)]})
    part = folder / "units-00002.parquet"
    damage(part)
    if not part.exists():
        assert Run.open(folder).table("units").num_rows == 2000
        return
    with pytest.raises(RunError, match=r"units-00002\.parquet is damaged .*: remove it to read the rest") as e:
        Run.open(folder).table("units")
    one_line(e)
    part.unlink()
    assert Run.open(folder).table("units").num_rows == 2000


def test_parts_that_do_not_fit_together_are_refused(folder: Path) -> None:
    run = Run.create(folder, "study")
    run.append("units", {"step": [1]})
    run.append("units", {"step": ["one"]})
    with pytest.raises(RunError, match=r"the parts of table 'units' in .* do not fit together") as error:
        run.table("units")
    one_line(error)


HOSTILE = [
    "../units",
    "/etc/units",
    "units/..",
    "**",
    "*",
    "[a-z]",
    "Units",
    "units-1",
    "",
    ".",
    "a b",
    "é",
    "a\n",
    "a\0",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_cannot_be_named_out_of_the_folder(folder: Path, name: str) -> None:
    run = Run.create(folder, "study")
    run.append("units", {"step": [1]})
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match="lower-case letters and underscores"):
        run.append(name, {"step": [1]})
    with pytest.raises(RunError, match=r"has no table .*; it has: units"):
        run.table(name)
    assert sorted(folder.parent.rglob("*")) == before


def test_an_unknown_table_is_answered_with_those_there_are(folder: Path) -> None:
    run = Run.create(folder, "study")
    with pytest.raises(RunError, match="has no table 'units'; it has: none"):
        run.table("units")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"cannot write to .*: (File exists|Not a directory)") as error:
            Run.create(path, "study")
        one_line(error)


def test_a_full_disk_leaves_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(folder, "study")
    run.append("units", {"step": [1]})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    for write in (
        lambda: run.append("units", {"step": [2]}),
        lambda: run.note(machine="x"),
        lambda: run.finish("failed"),
    ):
        with pytest.raises(RunError, match=r"cannot write .*: No space left on device") as error:
            write()
        one_line(error)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(RunError, match="No space left"):
        Run.create(folder.parent / "other", "study")
    assert list((folder.parent / "other").iterdir()) == []
    monkeypatch.undo()
    run.append("units", {"step": [2]})
    assert "machine" not in run.info
    assert Run.open(folder).table("units")["step"].to_pylist() == [1, 2]


def test_facts_that_json_cannot_hold_are_refused_without_a_change(folder: Path) -> None:
    run = Run.create(folder, "study")
    before = run.info.copy()
    for value in (math.nan, math.inf, object(), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            run.note(loss=value)
    with pytest.raises(pa.ArrowException):
        run.append("units", {"step": [1, 2], "gamma": [1]})
    with pytest.raises((pa.ArrowException, TypeError)):
        run.append("units", {"step": [object()]})
    with pytest.raises(ValueError, match="status is one of complete, interrupted, failed, got 'done'"):
        run.finish("done")
    assert run.info == before
    assert Run.open(folder).info == before
    run.note(loss=1.0)
    assert Run.open(folder).info["loss"] == 1.0
    assert [p.name for p in folder.iterdir()] == ["run.json"]


def test_a_killed_writer_loses_only_unwritten_rows(folder: Path) -> None:
    code = f"""
import os
from batchnorm.runs.run import Run
run = Run.create({str(folder)!r}, "study")
run.append("units", {{"step": [1, 2, 3]}})
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    read = Run.open(folder)
    assert read.info["status"] == "running"
    assert read.table("units").num_rows == 3


@pytest.mark.parametrize("as_given", [str, Path])
def test_a_path_opens_its_run(folder: Path, as_given) -> None:
    made = Run.create(folder, "study", mine=1)
    made.append("units", {"step": [1]})
    for read in (Run(as_given(folder)), Run.open(as_given(folder))):
        assert type(read) is Run
        assert read.path == folder
        assert read.info == made.info
        assert read.table("units").num_rows == 1
    for path, words in ((folder / "missing", "no Run in"), (folder.parent, "no Run in")):
        with pytest.raises(RunError, match=words):
            Run(as_given(path))
    (folder / "run.json").write_text("{")
    with pytest.raises(RunError, match="cannot read"):
        Run(as_given(folder))


def files(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def writes(run: Run) -> list[Callable[[], None]]:
    return [
        lambda: run.append("units", {"step": [2]}),
        lambda: run.append("units", {"step": [2]}, rank=1),
        lambda: run.note(mine=2),
        lambda: run.finish("complete"),
    ]


@pytest.mark.parametrize("by", ["removal", "force", "run.json alone"])
def test_a_run_that_was_replaced_does_not_write_into_the_next(folder: Path, by: str) -> None:
    old = Run.create(folder, "study")
    old.append("units", {"step": [1]})
    if by == "removal":
        shutil.rmtree(folder)
    elif by == "run.json alone":
        (folder / "run.json").unlink()
        (folder / "units-00001.parquet").unlink()
    Run.create(folder, "study", force=by == "force").append("units", {"step": [9]})
    before = files(folder)
    for write in writes(old):
        with pytest.raises(RunError, match="was replaced by another Run while it was being recorded") as error:
            write()
        one_line(error)
    assert files(folder) == before


def test_a_run_that_was_removed_is_not_made_again(folder: Path) -> None:
    run = Run.create(folder, "study")
    shutil.rmtree(folder)
    for write in writes(run):
        with pytest.raises(RunError, match="was removed while it was being recorded: choose a folder that stays"):
            write()
    assert not folder.exists()


def test_a_run_that_is_replaced_while_it_writes_a_part_keeps_the_part_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Run.create(folder, "study")
    write_table = pq.write_table

    def replaced(*arguments, **named) -> None:
        monkeypatch.undo()
        shutil.rmtree(folder)
        Run.create(folder, "study").append("units", {"step": [9]})
        write_table(*arguments, **named)

    monkeypatch.setattr(pq, "write_table", replaced)
    with pytest.raises(RunError, match="was replaced by another Run"):
        old.append("units", {"step": [1]})
    assert sorted(files(folder)) == ["run.json", "units-00001.parquet"]
    assert Run(folder).table("units")["step"].to_pylist() == [9]


def test_a_run_without_an_id_goes_on_as_before(folder: Path) -> None:
    """Those of earlier versions have none."""
    Run.create(folder, "study")
    info = json.loads((folder / "run.json").read_text())
    del info["id"]
    (folder / "run.json").write_text(json.dumps(info))
    old = Run(folder)
    for write in writes(old):
        write()
    assert Run(folder).info["mine"] == 2
    Run.create(folder, "study", force=True)
    for write in writes(old):
        with pytest.raises(RunError, match="was replaced"):
            write()
