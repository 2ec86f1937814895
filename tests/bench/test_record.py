"""The stored result: its content, its file, and that nothing is overwritten or half written."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest

import batchnorm
from batchnorm.bench import record as records
from batchnorm.bench.record import BenchError
from batchnorm.kernels.cpu import system
from batchnorm.report.terminal import json_text


@pytest.fixture
def begun():
    return records.begin(["bench", "--quick"], {"threads": 1})


def test_a_record_has_its_provenance(begun):
    assert begun["command"] == "batchnorm bench --quick"
    assert {"python", "torch", "numpy", "batchnorm"} <= set(begun["versions"])
    assert {"processor", "cores", "caches", "memory", "kernel", "libc", "huge_pages"} <= set(begun["machine"])
    assert records.second_level(begun["machine"]) == begun["machine"]["l2_bytes"] >= 1 << 16
    assert begun["machine"]["memory"] > 1 << 28
    assert begun["allocator"] in ("tuned", "default", "set")


def test_the_l2_is_the_measured_one(monkeypatch):
    def refuse():
        raise ValueError("the variable cannot be parsed")

    monkeypatch.setattr(records, "facts", lambda: SimpleNamespace(l2_bytes=12345))
    assert records.second_level(records.machine()) == 12345
    assert records.second_level(records.machine() | {"gpu": {"L2": 50 << 20}}) == 50 << 20
    monkeypatch.setattr(records, "facts", refuse)
    with pytest.raises(BenchError, match="the variable cannot be parsed"):
        records.machine()


def test_only_variables_that_bear_on_speed_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    monkeypatch.setenv("SECRET_OMP_KEY", "hidden")
    kept = records.begin([], {})["environment"]
    assert kept["OMP_NUM_THREADS"] == "1"
    assert kept["MALLOC_TRIM_THRESHOLD_"] == "5"
    assert not {"SECRET_OMP_KEY", "HOME", "USER", "PATH"} & set(kept)


def test_caches_are_read_from_sysfs(tmp_path):
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1024K"), ("3", "Unified", "96M")]
    ):
        entry = tmp_path / f"index{index}"
        entry.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (entry / name).write_text(f"{text}\n", encoding="utf-8")
    caches = system.caches(tmp_path)
    assert caches == {"L1d": 32 << 10, "L2": 1 << 20, "L3": 96 << 20}
    assert records.last_level({"caches": caches}) == 96 << 20
    assert system.caches(tmp_path / "nowhere") == {}
    assert records.last_level({"caches": {}}) == 8 << 20


def test_stored_and_read_again_it_is_the_same(begun, tmp_path):
    path = tmp_path / "new" / "result.json"
    begun["results"] = [{"x": float("nan"), "y": (1, float("inf"))}]
    records.store(begun, path)
    assert records.load(path) == {**begun, "results": [{"x": None, "y": [1, None]}]}
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]
    json.loads(json_text(begun, 1), parse_constant=lambda name: pytest.fail(name))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(begun, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    records.store(begun, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BenchError, match="No space left on device"):
        records.store({**begun, "status": "complete"}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_an_existing_file_is_in_the_way_and_force_takes_only_results(begun, tmp_path):
    path = tmp_path / "result.json"
    records.check_vacant(path, force=False)
    records.store(begun, path)
    with pytest.raises(BenchError, match="force=True"):
        records.check_vacant(path, force=False)
    records.check_vacant(path, force=True)
    path.write_text("years of work", encoding="utf-8")
    with pytest.raises(BenchError, match="cannot read"):
        records.check_vacant(path, force=True)
    assert path.read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[]", "is not a result of batchnorm bench"),
        ('{"format": "batchnorm-run", "version": 1}', "is not a result of batchnorm bench"),
        (
            '{"format": "batchnorm-bench", "schema": 1, "settings": {"rounds": 3}}',
            "holds no times: it is the result of another tool",
        ),
        ('{"format": "batchnorm-bench", "schema": 3}', "upgrade it"),
        ('{"format": "batchnorm-bench", "schema": true}', "upgrade it"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, text, words):
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BenchError, match=words):
        records.load(path)
    with pytest.raises(BenchError, match="No such file"):
        records.load(tmp_path / "nowhere.json")


def test_elsewhere_a_result_goes_into_the_folder_one_runs_in(begun, tmp_path):
    date = begun["date"][:10]
    (tmp_path / "benchmarks").mkdir()
    assert records.default_path(begun, tmp_path) == tmp_path / f"batchnorm-bench-{date}.json"
    (tmp_path / f"batchnorm-bench-{date}.json").touch()
    assert records.default_path(begun, tmp_path) == tmp_path / f"batchnorm-bench-{date}-2.json"


def test_in_the_packages_own_checkout_it_goes_into_benchmarks_if_there_is_such_a_folder(begun, tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    home = tmp_path / "src" / "batchnorm" / "__init__.py"
    home.parent.mkdir(parents=True)
    home.touch()
    monkeypatch.setattr(batchnorm, "__file__", str(home))
    assert records.git() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    found = records.git()
    assert found["dirty"] is False
    begun |= {"git": found, "date": "2026-01-02T03:04:05+00:00"}
    begun["machine"] |= {"processor": "AMD EPYC (TM)", "cores": 2}
    assert records.default_path(begun, tmp_path).name == "batchnorm-bench-2026-01-02.json"
    (tmp_path / "benchmarks").mkdir()
    expected = tmp_path / "benchmarks" / f"2026-01-02-amd-epyc-tm-2-{found['commit']}.json"
    assert records.default_path(begun, tmp_path / "src") == expected
    home.write_text("changed", encoding="utf-8")
    begun["git"] = records.git()
    assert records.default_path(begun, tmp_path).stem == f"{expected.stem}-dirty"


def test_the_stored_command_names_no_folder_of_the_user() -> None:
    typed = ["bench", "--out", "/home/me/secret.json", "--quick", "--force", "--out=/home/me/other.json"]
    assert records.begin(typed, {})["command"] == "batchnorm bench --quick"
    assert records.begin(["bench", "--out"], {})["command"] == "batchnorm bench"
