"""The command as a user runs it: a study, its report, interrupts, and one clear line for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchnorm import __version__
from batchnorm.cli import main

COMMAND = [sys.executable, "-m", "batchnorm"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study run as a program: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = run("study", "--seeds", "1", "--steps", "8", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False, **options)


def mistake(capsys, monkeypatch, *arguments: str) -> str:
    """The one line that main() prints on standard error, with exit status 2 and nothing on standard output."""
    monkeypatch.setattr(sys, "argv", ["batchnorm", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("batchnorm: error: ")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_a_study_writes_a_run_and_its_report_and_prints_the_answer(finished):
    folder, done = finished
    assert (folder / "report.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "complete"
    assert info["command"] == f"batchnorm study --seeds 1 --steps 8 --out {folder}"
    assert info["config"]["steps"] == 8
    for word in ("undone", "learned", "Could they?", "Do they?", "What stays", str(folder / "report.html")):
        assert word in done.stdout
    assert "100%" in done.stderr, "progress goes to standard error"


@pytest.mark.slow
def test_the_report_is_rendered_again_from_the_run_alone(finished, tmp_path):
    folder, _ = finished
    page = tmp_path / "again.html"
    done = run("report", str(folder), "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert page.read_bytes() == (folder / "report.html").read_bytes()


@pytest.mark.slow
def test_the_report_does_not_import_torch(finished, tmp_path):
    folder, _ = finished
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['report', sys.argv[1], '--out', sys.argv[2]];"
        "from batchnorm.cli import main; main()"
    )
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "page.html")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").exists()


def test_the_block_on_torch_above_can_fail(finished):
    """The same trick over a module that needs torch ends in an error."""
    code = "import sys; sys.modules['torch'] = None; import batchnorm.layers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "torch" in done.stderr


def test_json_is_json_and_nothing_else(finished):
    folder, _ = finished
    done = run("report", str(folder), "--json")
    result = json.loads(done.stdout)
    assert result["status"] == "complete"
    assert {row["arm"] for row in result["summary"]} == {"none", "learned", "fixed", "undone"}
    assert "headline" in result["answer"]
    assert not re.search(r"\bNaN\b", done.stdout)


def test_pictures_are_png(finished, tmp_path):
    folder, _ = finished
    done = run("report", str(folder), "--out", str(tmp_path / "page.html"), "--pictures", str(tmp_path / "pictures"))
    assert done.returncode == 0, done.stderr
    pictures = list((tmp_path / "pictures").glob("*.png"))
    assert len(pictures) >= 3
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured_and_reports_it(tmp_path):
    folder = tmp_path / "run"
    arguments = ["study", "--seeds", "2", "--steps", "100000", "--out", str(folder)]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted: writing the report" in error
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    assert list(folder.glob("curves-*.parquet"))
    assert "interrupted" in (folder / "report.html").read_text(encoding="utf-8").lower()
    assert "Could they?" in out
    assert "Traceback" not in error


def test_an_existing_run_is_never_overwritten_without_force(finished, capsys, monkeypatch):
    folder, _ = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    line = mistake(capsys, monkeypatch, "study", "--steps", "1", "--seeds", "1", "--out", str(folder))
    assert "already has a Run: choose another folder, or pass --force" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_force_replaces_a_run(tmp_path):
    folder = tmp_path / "run"
    for steps, force in (("2", []), ("1", ["--force"])):
        done = run("study", "--seeds", "1", "--steps", steps, "--out", str(folder), *force)
        assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]["steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "--data", "imagenet"], "use one of digits, mnist"),
        (["study", "--act", "tanh"], "use sigmoid or relu"),
        (["study", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["study", "--seeds", "-1"], "--seeds must be at least 1, got -1"),
        (["study", "--lr", "nan"], "--lr must be a positive number"),
        (["study", "--lr", "-0.1"], "--lr must be a positive number"),
        (["study", "--steps", "many"], "--steps"),
        (["study", "--data", "mnist", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["study", "--data-dir", "."], "digits is embedded"),
        (["study", "--bogus"], "--bogus"),
        (["studdy"], "studdy"),
        (["report"], "'RUN'"),
        (["report", "nowhere"], "no Run in nowhere"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_gets_one_line(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in mistake(capsys, monkeypatch, *arguments)
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing behind"


def test_an_out_folder_that_cannot_be_written_gets_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    line = mistake(capsys, monkeypatch, "study", "--steps", "1", "--out", str(tmp_path / "file" / "run"))
    assert "cannot write to" in line


def test_a_folder_with_other_things_is_not_touched_even_with_force(capsys, monkeypatch, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    line = mistake(capsys, monkeypatch, "study", "--steps", "1", "--force", "--out", str(tmp_path))
    assert "not empty and has no Run" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_part_gets_one_line(finished, capsys, monkeypatch, tmp_path):
    folder, _ = finished
    copy = tmp_path / "run"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    part = next(copy.glob("units-*.parquet"))
    part.write_bytes(part.read_bytes()[:1000])
    assert part.name in mistake(capsys, monkeypatch, "report", str(copy))


def test_a_full_disk_ends_in_one_line_and_a_run_that_says_so(capsys, monkeypatch, tmp_path):
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".parquet"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["batchnorm", "study", "--seeds", "1", "--steps", "1", "--out", str(folder)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert not list(folder.glob("*.tmp"))


def test_a_run_of_an_unknown_kind_is_not_reported(capsys, monkeypatch, tmp_path):
    (tmp_path / "run.json").write_text('{"format": "batchnorm-run", "version": 1, "kind": "other"}', encoding="utf-8")
    assert "kind 'other'" in mistake(capsys, monkeypatch, "report", str(tmp_path))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_a_page_or_pictures_that_cannot_be_written_get_one_line(finished, capsys, monkeypatch, tmp_path):
    folder, _ = finished
    (tmp_path / "file").write_text("", encoding="utf-8")
    line = mistake(capsys, monkeypatch, "report", str(folder), "--out", str(tmp_path / "file" / "page.html"))
    assert "cannot write" in line
    line = mistake(capsys, monkeypatch, "report", str(folder), "--pictures", str(tmp_path / "file"))
    assert "cannot write pictures into" in line


def test_an_existing_run_is_found_before_the_data_is_loaded(finished, capsys, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr("batchnorm.study.runner.load", lambda *_: pytest.fail("loaded first"))
    assert "--force" in mistake(capsys, monkeypatch, "study", "--out", str(folder))


def test_no_command_prints_the_help_alone(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["batchnorm"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr()
    assert "Usage" in printed.out + printed.err
    assert "error" not in printed.err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["study", "--help"], ["report", "--help"], ["show", "--help"], ["--version"]]
)
def test_help_and_version(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["batchnorm", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert (__version__ if arguments == ["--version"] else "Usage") in capsys.readouterr().out


def test_the_console_script_is_the_module():
    script = Path(sys.executable).with_name("batchnorm")
    if not script.exists():
        pytest.skip("the package is on the path, but not installed")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == run("--version").stdout == f"batchnorm {__version__}\n"
