"""docs/surgery.md, as a reader follows it: all of its code, in order, as one program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "surgery.md"


def test_the_page_is_one_program_with_correct_output(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    command = [sys.executable, "-W", "error", "page.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for promised in (
        "hardly trained",  # check
        "too-few-steps",  # compare
        "2 batch norm layers recalibrated",
        "1 batch norm layer frozen",
        "\nFalse\n",  # still not in training after train()
        "2 of 2 batch norm layers folded",
        "for keras",
        "gamma and beta undo it: of 16 units, 100% are undone;",
    ):
        assert promised.lower() in done.stdout.lower(), promised
