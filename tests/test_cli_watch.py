"""The command over watched trainings: report, show, --follow, --json, and one clear line for every mistake."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "report"))
from synthetic import study
from watched import Made, log_spaced, watched

from test_cli import COMMAND, mistake, run


def dying(columns, steps):
    columns["gamma"][np.ix_(steps >= 300, np.arange(4))] = 1e-3
    columns["beta"][np.ix_(steps >= 300, np.arange(4))] = 0.0


LAYERS = [Made("stem", 8, undo=0.95), Made("dying", 8, change=dying)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def trained(folder):
    return watched(folder / "a", LAYERS, logged={"loss": np.ones(len(log_spaced(5000)))}).path


@pytest.fixture(scope="module")
def other(folder):
    return watched(folder / "b", LAYERS[:1], status="interrupted", seed=1).path


@pytest.fixture(scope="module")
def studied(folder):
    return study(folder / "study", seeds=(0,), measured=[0, 5], width=3).path


def test_report_writes_the_page_and_prints_layers_answer_and_findings(trained):
    done = run("report", str(trained))
    assert done.returncode == 0, done.stderr
    page = trained / "report.html"
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    for words in ("stem", "In part: at step 5,000", "dying: 4 of 8 units dead since step", f"report  {page}"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout


def test_show_prints_the_same_and_writes_nothing(other):
    before = sorted(path.name for path in other.iterdir())
    done = run("show", str(other))
    assert done.returncode == 0, done.stderr
    assert "Yes, here they do: at step 5,000" in done.stdout
    assert "▁" in done.stdout
    assert sorted(path.name for path in other.iterdir()) == before


def test_show_of_a_study_is_what_report_prints(studied):
    assert "Could they?" in run("show", str(studied)).stdout


@pytest.mark.parametrize("command", ["report", "show"])
def test_json_is_json_and_nothing_else(trained, command):
    done = run(command, str(trained), "--json")
    result = json.loads(done.stdout)
    assert result["status"] == "complete"
    assert result["answer"]["verdict"] == "partly"
    assert sum(result["classes"].values()) == sum(layer["units"] for layer in result["layers"])
    assert result["layers"][1]["classes"]["dead"] == 4
    assert [layer["name"] for layer in result["layers"]] == ["stem", "dying"]
    (finding,) = result["findings"]
    assert (finding["slug"], finding["layer"], finding["units"]) == ("dead-units", "dying", [0, 1, 2, 3])
    assert result["logged"] == {"loss": 1.0}
    assert not re.search(r"\b(NaN|Infinity)\b", done.stdout)
    assert result["answer"]["batch_noise"] is None


@pytest.mark.slow
def test_several_runs_make_one_page(trained, other, tmp_path):
    page = tmp_path / "both.html"
    done = run("report", str(trained), str(other), "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "a: status complete" in done.stdout
    assert "b: status interrupted" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert "The runs differ: in a gamma and beta undo it in part" in text
    result = json.loads(run("report", str(trained), str(other), "--out", str(page), "--json").stdout)
    assert [each["answer"]["verdict"] for each in result["runs"]] == ["partly", "yes"]


@pytest.mark.slow
def test_neither_report_nor_show_imports_torch(trained, tmp_path):
    code = "import sys; sys.modules['torch'] = None; sys.argv[1:] = sys.argv[1:];from batchnorm.cli import main; main()"
    for arguments in (["report", str(trained), "--out", str(tmp_path / "page.html")], ["show", str(trained)]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr


def test_show_loads_no_plotting_library(trained):
    code = (
        "import sys; sys.modules['altair'] = None; sys.modules['vl_convert'] = None;"
        "from batchnorm.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "show", str(trained)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "{a}", "{b}"], "with --out"),
        (["report", "{a}", "{study}"], "got kinds study and watch"),
        (["report", "{study}", "{study}"], "a page shows one study"),
        (["report", "{study}", "--follow"], "--follow is for watched trainings"),
        (["report", "{a}", "--pictures", "x"], "--pictures is for studies"),
        (["report", "{a}", "--follow", "--every", "0"], "--every must be a positive number"),
        (["report", "{a}", "--follow", "--every", "nan"], "--every must be a positive number"),
        (["show"], "'RUN'"),
        (["show", "nowhere"], "no Run in nowhere"),
        (["report", "{a}", "nowhere"], "no Run in nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_line(capsys, monkeypatch, tmp_path, trained, other, studied, arguments, words):
    monkeypatch.chdir(tmp_path)
    filled = [each.format(a=trained, b=other, study=studied) for each in arguments]
    assert words in mistake(capsys, monkeypatch, *filled)
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing behind"


@pytest.mark.parametrize("command", ["report", "show"])
def test_a_damaged_part_gets_one_line(capsys, monkeypatch, tmp_path, command):
    path = watched(tmp_path / "run", LAYERS, steps=log_spaced(100, 10)).path
    part = next(path.glob("units-*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    assert part.name in mistake(capsys, monkeypatch, command, str(path))


def test_follow_ends_with_the_training(tmp_path):
    training = watched(tmp_path / "run", LAYERS, status="running")
    process = subprocess.Popen(
        [*COMMAND, "report", str(training.path), "--follow", "--every", "0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    page = training.path / "report.html"
    wait_for(lambda: page.exists())
    assert 'name="reload"' in page.read_text(encoding="utf-8")
    training.finish("complete")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert 'name="reload"' not in page.read_text(encoding="utf-8")
    assert "In part: at step 5,000" in out
    assert error.count("at step 5000") == 2


@pytest.mark.slow
def test_ctrl_c_ends_following_quietly(tmp_path):
    training = watched(tmp_path / "run", LAYERS, status="running")
    process = subprocess.Popen(
        [*COMMAND, "report", str(training.path), "--follow", "--every", "0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    page = training.path / "report.html"
    wait_for(lambda: page.exists())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert out == ""
    assert "Traceback" not in error
    assert 'name="reload"' not in page.read_text(encoding="utf-8")


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("command", [[], ["study"], ["report"], ["show"], ["check"], ["diff"], ["bench"]])
def test_help_by_its_short_name(command):
    done = run(*command, "-h")
    assert done.returncode == 0, done.stderr
    assert "Usage: batchnorm" in done.stdout


@pytest.mark.parametrize("command", ["study", "report", "show", "check", "diff"])
def test_a_mistake_points_to_the_help_of_its_command(command):
    done = run(command, "--nope")
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith(f"(see batchnorm {command} --help)")


@pytest.mark.slow
def test_following_waits_for_a_run_that_does_not_exist_yet(tmp_path):
    arguments = [sys.executable, "-m", "batchnorm", "report", str(tmp_path / "run"), "--follow", "--every", "0.2"]
    waiting = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert "waiting for a Run in" in waiting.stderr.readline() + waiting.stderr.readline()
        watched(tmp_path / "run", LAYERS)
        _, said = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert waiting.returncode == 0, said
    assert "at step 5000" in said
    assert (tmp_path / "run" / "report.html").exists()
