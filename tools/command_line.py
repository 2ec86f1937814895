"""Write docs/reference/command-line.md from the help texts of the commands: python tools/command_line.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "command-line.md"
COLUMNS = 59
"""Narrow enough for plain lines without a frame, which also fit a telephone."""
COMMANDS = ("study", "report", "show", "check", "diff", "bench")
EXAMPLES = {
    "study": "batchnorm study --data mnist --data-dir FOLDER",
    "report": "batchnorm report runs/a runs/b --out both.html",
    "show": "batchnorm show runs/a",
    "check": "batchnorm check model.pt --html check.html",
    "diff": "batchnorm diff before.pt after.safetensors",
    "bench": "batchnorm bench --quick",
}
INTRODUCTION = """\
# Command line

Every command and option, as `batchnorm COMMAND --help` prints them. The command needs `pip install 'batchnorm[tools]'`.
`python -m batchnorm` is the same.

Results go to standard output, progress and errors to standard error. With `--json` the result is JSON. The exit status
is 0 on success, 1 if `check` finds an error, `diff` a difference or `bench` a wrong result, 2 for a wrong option or a
file or Run that cannot be read, and 130 after Ctrl-C.
"""


def help_of(*command: str) -> str:
    """What the command prints for --help, without spaces at the ends of lines."""
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def page() -> str:
    """The whole page."""
    sections = (
        f"## batchnorm {command}\n\n    {EXAMPLES[command]}\n\n```text\n{help_of(command)}\n```\n"
        for command in COMMANDS
    )
    return "\n".join([INTRODUCTION, f"```text\n{help_of()}\n```\n", *sections])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
