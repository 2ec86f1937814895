"""`batchnorm study regimes`, and its Run rendered again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def batchnorm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batchnorm", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    done = batchnorm(folder, "study", "regimes", "--seeds", "1", "--steps", "2", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "Fewer than 3 seeds" in done.stdout
    assert (folder / "run" / "report.html").stat().st_size > 100_000
    return folder


def test_the_run_is_rendered_again_without_torch(folder: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from batchnorm.cli.program import main; main()"
    for command in ("report", "show"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "run", "--json"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["status"] == "complete"
        assert len(told["arms"]) > 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("study", "regimes", "--out", "run"), "already holds a Run"),
        (("study", "regimes", "--seeds", "0"), "--seeds must be at least 1"),
        (("study", "regimes", "--data", "mnist"), "leave out --data"),
        (("study", "everything"), "unknown study 'everything': use undo or regimes"),
        (("report", "run", "--pictures", "x"), "--pictures is for the study of undoing"),
        (("report", "run", "--follow"), "--follow is for trainings"),
    ],
)
def test_mistakes_get_one_line(arguments: tuple[str, ...], words: str, folder: Path) -> None:
    done = batchnorm(folder, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
