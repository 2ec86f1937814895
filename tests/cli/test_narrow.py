"""In a terminal of 40 columns no command cuts a word, and nothing is left out for "…"."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

TESTS = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "batchnorm"]
COMMANDS = ["study", "report", "show", "check", "diff", "bench"]


def in_terminal(*arguments: object, columns: int = 40) -> str:
    """What the command writes into a terminal of that width, standard output and error together."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "LINES": "1000"}
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    process.wait(timeout=60)
    text = b"".join(parts).decode().replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def words(text: str) -> list[str]:
    return re.sub(r"[─━│╭╮╰╯╸╺]", " ", text).split()


def fits(narrow: str, columns: int = 40) -> None:
    """No line is longer than the terminal is wide: it would break it anywhere."""
    assert "…" not in narrow
    assert "..." not in narrow.replace("]...", "").replace("}...", "")
    assert [line for line in narrow.splitlines() if len(line) > columns] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", [40, 59])
def test_help_is_whole(command: str, columns: int) -> None:
    narrow = in_terminal(*command.split(), "--help", columns=columns)
    wide = in_terminal(*command.split(), "--help", columns=200)
    fits(narrow, columns)
    kinds = {word for word in words(wide) if word.startswith("<")} | {
        "*",
        "-h",
        "--help",
        "[default:",
        "[required]",
        "required",
    }
    assert {word.strip(",.:[]") for word in words(wide)} - kinds <= {word.strip(",.:[]") for word in words(narrow)}


def test_help_without_a_command_is_the_same_help() -> None:
    assert in_terminal().strip() == in_terminal("--help").strip()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["v3-study", "v3-watch", "v2-watch", "v1-study"])
def test_runs_are_shown_whole(run: str) -> None:
    folder = os.path.relpath(TESTS / "runs" / "runs" / run)
    narrow, wide = in_terminal("show", folder), in_terminal("show", folder, columns=100)
    fits("\n".join(line for line in narrow.splitlines() if "/runs/" not in line))
    cells = [word for word in words(wide) if not set(word) & set("▁▂▃▄▅▆▇█") and "/runs/" not in word]
    whole = {word.strip(":()") for word in words(narrow)}
    assert {word.strip(":()") for word in cells} - {"layer", "arm"} <= whole


@pytest.mark.slow
def test_check_is_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder_of_the_first_stage = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(4))

    model = Named()
    model.encoder_of_the_first_stage[0].running_var[3] = float("nan")
    monkeypatch.chdir(tmp_path)
    torch.save(model.state_dict(), "model.pt")
    narrow = in_terminal("check", "model.pt")
    fits(narrow)
    assert "\nencoder_of_the_first_stage.1\n  units: 4\n" in narrow


@pytest.mark.slow
def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = TESTS / "runs" / "runs" / "v3-watch"
    os.symlink(trained, "a")
    os.symlink(trained, "b")
    fits(in_terminal("report", "a", "b", "--out", "both.html"))


@pytest.mark.slow
def test_a_study_prints_everything_from_progress_to_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    narrow = in_terminal("study", "--seeds", "1", "--steps", "2", "--out", "run")
    assert "undo_index: " in narrow
    fits(narrow)


@pytest.mark.slow
def test_bench_prints_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    narrow = in_terminal("bench", "--filter", "60x100 float32 train", "--repeats", "1", "--out", "result.json")
    assert "x eager: " in narrow
    fits("\n".join(line for line in narrow.splitlines() if "Command" not in line))


@pytest.mark.slow
def test_facts_about_the_machine_are_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_MACHINE", "defaults")
    narrow, wide = in_terminal("bench", "--machine"), in_terminal("bench", "--machine", columns=100)
    fits(narrow)
    assert "512 KiB" in narrow
    assert {word.strip(":") for word in words(wide)} <= {word.strip(":") for word in words(narrow)}


@pytest.mark.slow
def test_a_mistake_is_broken_between_words() -> None:
    narrow = in_terminal("bench", "--quick", "--full")
    fits(narrow)
    assert " ".join(narrow.split()).endswith("--quick and --full exclude each other (see batchnorm bench --help)")
