"""docs/variants.md, as a reader follows it: train.py under torchrun, and all other code, in order, as one program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent.parent / "docs" / "variants.md"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_torchrun_trains_and_every_process_has_the_same_statistics(blocks: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(blocks[0], encoding="utf-8")
    (line,) = re.findall(r"^torchrun (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    # Standalone, so that runs side by side do not want one port.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    means = dict(re.findall(r"process (\d): 1 batch norm layer synchronized, running mean (-?\d+\.\d{6})", done.stdout))
    assert means.keys() == {"0", "1"}, done.stderr
    assert means["0"] == means["1"]


def test_the_rest_is_one_program_with_correct_output(blocks: list[str], tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text("\n".join(blocks[1:]), encoding="utf-8")
    command = [sys.executable, "-W", "error", "page.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for promised in (
        "accumulated as one batch: True",
        "valid positions alone: True",
        "nothing elsewhere: True",
        "a batch of one: torch.Size([1, 64])",
        "apart: tensor(True)",
        "averaged over 3 states",
    ):
        assert promised in done.stdout, promised
