"""docs/watch.md, as a newcomer follows it: its code saved, its commands run, in under five minutes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "watch.md"
MINUTES = 5


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(command: str, folder: Path) -> str:
    program, *arguments = shlex.split(command)
    command_line = [sys.executable, *{"python": [], "batchnorm": ["-m", "batchnorm"]}[program], *arguments]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        command_line,
        cwd=folder, capture_output=True, text=True, timeout=60 * MINUTES, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_page_can_be_followed_as_it_stands(tmp_path: Path) -> None:
    (script,) = blocks("python")
    commands = [line for block in blocks("console") for line in block.splitlines()]
    assert [command.split()[0] for command in commands] == ["python", "batchnorm", "batchnorm", "batchnorm"]
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    began = time.monotonic()
    outputs = {command: run(command, tmp_path) for command in commands}
    assert time.monotonic() - began < 60 * MINUTES
    shown = outputs["batchnorm show runs/first"]
    assert "undo_index" in shown
    assert "bare normalization" in shown
    page = (tmp_path / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    assert "undo batch normalization" in page
    assert len(page) > 100_000


def test_the_numbers_that_the_page_names_are_those_of_the_code() -> None:
    from batchnorm.recording._recorder import writer
    from batchnorm.recording.steps import log_spaced

    page = PAGE.read_text(encoding="utf-8")
    wanted = log_spaced()
    dense = next(step for step in range(1, 1000) if not wanted(step))
    assert f"all of the first {dense} steps" in page.replace("\n", " ").replace("  ", " ")
    assert "105 of the first" in page
    assert f"at most the last {writer.AGE:.0f} seconds" in page
    assert writer.SHARE == 0.01
    assert f"{writer.HELD // 2**20} MB at most" in page
