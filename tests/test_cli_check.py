"""`batchnorm check` as a user runs it: exit status, one line for the unreadable, JSON, the page, time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

COMMAND = [sys.executable, "-m", "batchnorm", "check"]
SECONDS = 2.0
MEGABYTES = 200


def run(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = COMMAND if code is None else [sys.executable, "-c", code]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked.fill_(100)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    torch.save(trained().state_dict(), tmp_path / "healthy.pt")
    return tmp_path / "healthy.pt"


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    model = trained()
    model[1].running_var[3] = float("nan")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "sick.pth")
    return tmp_path / "sick.pth"


def test_healthy_is_0_and_says_so(healthy: Path) -> None:
    done = run(healthy)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 batch norm layer, 8 units: nothing found" in done.stdout
    assert "undo_index" in done.stdout


@pytest.mark.slow
def test_an_error_is_1_with_the_layer_and_what_to_do(sick: Path) -> None:
    done = run(sick)
    assert (done.returncode, done.stderr) == (1, "")
    assert "  1: 1 of 8 units not finite" in done.stdout


@pytest.mark.slow
def test_json_has_it_all(sick: Path) -> None:
    result = json.loads(run(sick, "--json").stdout)
    assert result["format"] == "PyTorch"
    assert result["healthy"] is False
    assert [finding["slug"] for finding in result["findings"]] == ["non-finite"]
    assert result["findings"][0]["units"] == [3]
    assert result["layers"][0]["layer"] == "1"


@pytest.mark.slow
def test_the_page_is_written_and_never_over_another_file(sick: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run(sick, "--html", page)
    assert done.returncode == 1
    assert str(page) in done.stdout
    assert "non-finite" in page.read_text(encoding="utf-8")
    page.write_text("mine", encoding="utf-8")
    again = run(sick, "--html", page)
    assert again.returncode == 2
    assert page.read_text(encoding="utf-8") == "mine"
    assert run(sick, "--html", page, "--force").returncode == 1
    assert "non-finite" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_folder_with_one_checkpoint(healthy: Path) -> None:
    assert run(healthy.parent).returncode == 0


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100), b"\x80\x02" + bytes(50), bytes(1000)])
def test_what_cannot_be_read_is_2_and_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    done = run(tmp_path / "x.pt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("batchnorm: error: ")
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_not_there_is_2(tmp_path: Path) -> None:
    done = run(tmp_path / "no.pt")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "status"), [(lambda path: (os.system, (f"touch {path}",)), 2), (lambda path: (Path.touch, (path,)), 0)]
)
def test_a_pickle_never_runs_code(function: Any, status: int, tmp_path: Path) -> None:
    """One that names what only harmful files need is refused; in others, functions are inert."""

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return function(tmp_path / "ran")

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    done = run(tmp_path / "evil.pt")
    assert done.returncode == status
    assert done.stderr.count("\n") == status // 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_it_needs_no_torch(sick: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['check', *sys.argv[1:]];"
    assert run(sick, code=code + "from batchnorm.cli import main; main()").returncode == 1


MEASURED = """
import resource, sys, time
import numpy, rich.console, rich.table
import batchnorm.cli, batchnorm.report.checkup.page, batchnorm.checks.check, batchnorm.checks.readers
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
found = batchnorm.checks.check.check(sys.argv[1])
batchnorm.report.checkup.page.show(found, rich.console.Console())
print(len(found.network.layers), time.monotonic() - began,
      (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_of_100_megabytes_takes_2_seconds_and_200_megabytes(legacy: bool, tmp_path: Path) -> None:
    layers = [nn.Sequential(nn.Conv2d(256, 256, 3, bias=False), nn.BatchNorm2d(256)) for _ in range(43)]
    file = tmp_path / "large.pt"
    torch.save(nn.Sequential(*layers).state_dict(), file, _use_new_zipfile_serialization=not legacy)
    assert file.stat().st_size > 100e6
    done = run(file, code=MEASURED)
    layers_found, seconds, megabytes = map(float, done.stderr.split())
    assert layers_found == 43
    assert seconds < SECONDS
    assert megabytes < MEGABYTES
