"""`batchnorm diff` as a user runs it: exit status, one line for the unreadable, JSON and the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_cli_check import trained

COMMAND = [sys.executable, "-m", "batchnorm", "diff"]


def run(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = COMMAND if code is None else [sys.executable, "-c", code]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model = trained()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    model[1].running_var.mul_(63 / 64)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "b.pt")
    return tmp_path / "a.pt", tmp_path / "b.pt"


def test_different_files_are_1_with_what_differs(files: tuple[Path, Path]) -> None:
    done = run(*files)
    assert (done.returncode, done.stderr) == (1, "")
    assert "1 of 1 batch norm layer differs" in done.stdout
    assert "biased in B, for m = 64 values" in done.stdout
    assert str(files[0]) in done.stdout


@pytest.mark.slow
def test_equal_files_are_0(files: tuple[Path, Path]) -> None:
    done = run(files[0], files[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("1 batch norm layer: no difference.\n")


@pytest.mark.slow
def test_json_and_the_page(files: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run(*files, "--json", "--html", page)
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert [change["aspect"] for change in result["changes"]] == ["biased variance"]
    assert result["a"]["source"] == str(files[0])
    assert result["report"] == str(page)
    assert "biased variance" in page.read_text(encoding="utf-8")
    again = run(*files, "--html", page)
    assert (again.returncode, again.stdout) == (2, "")
    assert "--force" in again.stderr


@pytest.mark.slow
def test_what_cannot_be_read_is_2_and_one_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"hello")
    for arguments in ((files[0], tmp_path / "x.pt"), (tmp_path / "no.pt", files[0]), (files[0],)):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_it_needs_no_torch(files: tuple[Path, Path]) -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['diff', *sys.argv[1:]];"
    assert run(*files, code=code + "from batchnorm.cli import main; main()").returncode == 1
