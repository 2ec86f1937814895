"""Run the code of documentation pages as a reader would, and hold what it prints against the page.

python tools/page_code.py PAGE.md … prints where a page and its code differ; --write puts the real output on the page.

All ```python blocks of a page are one program, in their order, and run in an empty folder with `-W error`. A block that
the page saves as a file (```python title="train.py", or the paragraph before it is "`train.py`:" or says "Save
this as `train.py`") is written there and not run. Then the commands of ```console blocks run in the same folder, with
NAME=value before one setting a variable, and of ```sh blocks and indented lines those `batchnorm` commands whose files
the page has made.

A ```text block directly after such a block is what it prints; a line `...` in it means any lines, and a rounding error
such as 1.2e-07 means any of them, since it depends on the processor. After a training all figures do: those of a
```text trained block may differ by 10 points, or 0.2.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
_MARK = "\x1e"
_FENCE = re.compile(r'^```(?P<language>\w+)?(?P<trained> trained)?(?:.*\btitle="(?P<title>[^"]+)")?')
_SAVED = re.compile(r"^`(?P<alone>[\w./-]+\.py)`:$|[Ss]ave this as\s`(?P<named>[\w./-]+\.py)`")
_PROGRAMS = {
    "python": [],
    "batchnorm": ["-m", "batchnorm"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
}
_ROUNDING = re.compile(r"\d(?:\.\d+)?e-(?:0[6-9]|1\d)")
_FIGURE = re.compile(r"(-?\d+\.\d+%?|-?\d+%)")
_SECONDS = 300


class PageError(Exception):
    """A page's code fails."""


@dataclass(frozen=True)
class Block:
    """A fenced block, or an indented line (language "indented"), of a page.

    Attributes:
        language: the first word after the fence.
        text: the lines between the fences.
        line: the number of its first line, from 1.
        file: the name under which the page saves it; None if it is part of the program.
        is_output: whether it directly follows a block that prints.
        trained: whether its figures come from a training.
    """

    language: str
    text: str
    line: int
    file: str | None = None
    is_output: bool = False
    trained: bool = False

    @property
    def commands(self) -> list[str]:
        """The shell commands, without a prompt; a backslash continues a line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.removeprefix("$ ").strip() for line in lines if line.strip() and not line.startswith("#")]


@dataclass
class Result:
    """What a page's code printed.

    Attributes:
        folder: where it ran.
        outputs: by the number of the block.
        commands: by the command.
    """

    folder: Path
    outputs: dict[int, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)

    @property
    def printed(self) -> str:
        """Everything."""
        return "".join(self.outputs.values())


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, and its indented `batchnorm` commands."""
    found: list[Block] = []
    lines = text.splitlines()
    number, since, paragraph = 0, 0, ""
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence:
            end = next((n for n in range(number + 1, len(lines)) if lines[n].startswith("```")), len(lines))
            saved = _SAVED.search(paragraph)
            file = (
                (fence["title"] or (saved and saved[saved.lastgroup or 0])) if fence["language"] == "python" else None
            )
            is_output = bool(found) and fence["language"] == "text" and not "".join(lines[since:number]).strip()
            content = "".join(f"{line}\n" for line in lines[number + 1 : end])
            found.append(Block(fence["language"] or "", content, number + 2, file, is_output, bool(fence["trained"])))
            number, since, paragraph = end + 1, end + 1, ""
            continue
        if lines[number].startswith("    batchnorm "):
            found.append(Block("indented", lines[number].split(" #")[0].strip() + "\n", number + 1))
            since = number + 1
        elif lines[number].strip():
            paragraph = f"{paragraph}\n{lines[number]}" if number and lines[number - 1].strip() else lines[number]
        number += 1
    return found


def program(blocks: list[Block]) -> str:
    """The page's program; its lines have the numbers that they have on the page, for tracebacks."""
    parts = [(number, block) for number, block in enumerate(blocks) if block.language == "python" and not block.file]
    lines: list[str] = []
    for number, block in parts:
        lines += [""] * (block.line - 1 - len(lines))
        lines += [*block.text.splitlines(), f"print({_MARK + str(number) + _MARK!r}, flush=True)"]
    return "".join(f"{line}\n" for line in lines)


def run(page: Path, folder: Path) -> Result:
    """Run a page's program, then its commands. Raises PageError."""
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    result = Result(folder)
    code = program(blocks)
    if code:
        (folder / page.name).with_suffix(".py").write_text(code, encoding="utf-8")
        printed = _run(["-W", "error", f"{page.stem}.py"], folder)
        for part, number in zip(*[iter(re.split(rf"{_MARK}(\d+){_MARK}\n", printed))] * 2, strict=False):
            result.outputs[int(number)] = part
    for block in blocks:
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    for number, block in enumerate(blocks):
        for command in block.commands if block.language in ("console", "sh", "indented") else ():
            if block.language == "console" or _follows(command, folder):
                result.commands[command] = _command(command, folder)
                result.outputs[number] = result.outputs.get(number, "") + result.commands[command]
    return result


def _follows(command: str, folder: Path) -> bool:
    """Whether it is a `batchnorm` command about files that the page has made."""
    words = shlex.split(command)
    return words[0] == "batchnorm" and len(words) > 2 and (folder / words[2]).exists()


def _command(command: str, folder: Path) -> str:
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in itertools.takewhile(_is_setting, words))
    name, *arguments = words[len(variables) :]
    if name not in _PROGRAMS:
        raise PageError(f"{command}: only {', '.join(_PROGRAMS)} can be run from a page")
    # `check` ends with 1 where it finds errors.
    accepted = (0, 1) if arguments[:1] == ["check"] else (0,)
    return _run([*_PROGRAMS[name], *arguments], folder, accepted, variables)


def _is_setting(word: str) -> bool:
    return re.match(r"\w+=", word) is not None


def _run(
    arguments: list[str], folder: Path, accepted: tuple[int, ...] = (0,), variables: Mapping[str, str] | None = None
) -> str:
    # PyTorch 2.13 aborts at times when processes with gloo end, without this package too.
    tries = 10 if "torch.distributed.run" in arguments else 1
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "COLUMNS": "100", **(variables or {})}
    for _ in range(tries):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment,
        )  # fmt: skip
        if "terminate called without an active exception" not in done.stderr:
            break
    if done.returncode not in accepted:
        printed = re.sub(rf"{_MARK}\d+{_MARK}\n", "", done.stdout)
        raise PageError(f"{' '.join(arguments)} ended with {done.returncode}\n{printed}\n{done.stderr}")
    return done.stdout


def differences(page: Path, result: Result) -> Iterator[tuple[Block, str]]:
    """Output blocks of the page that differ from what was printed, with what was printed."""
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    for number, block in enumerate(blocks):
        printed = result.outputs.get(number - 1)
        if block.is_output and printed is not None and not agree(block.text, printed, block.trained):
            yield block, printed


def agree(shown: str, printed: str, trained: bool = False) -> bool:
    """Whether a page shows what was printed, up to ends of lines and rounding errors; `...` matches any lines."""
    figures = _FIGURE if trained else _ROUNDING
    lines = ["(?:.*\n)*?" if line == "..." else f"{_pattern(line, figures)}\n" for line in _trimmed(shown)]
    found = re.fullmatch("".join(lines), "".join(f"{line}\n" for line in _trimmed(printed)))
    if found is None or not trained:
        return found is not None
    pairs = zip(
        figures.findall("\n".join(line for line in _trimmed(shown) if line != "...")), found.groups(), strict=True
    )
    return all(abs(float(a.strip("%")) - float(b.strip("%"))) <= (10 if "%" in a else 0.2) for a, b in pairs)


def _pattern(line: str, figures: re.Pattern[str]) -> str:
    parts = re.split(figures.pattern.replace("(", "(?:", 1) if figures.groups else figures, line)
    return figures.pattern.join(re.escape(part) for part in parts)


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def write(page: Path, result: Result) -> int:
    """Replace the output blocks that differ; returns how many."""
    wrong = list(differences(page, result))
    lines = page.read_text(encoding="utf-8").splitlines()
    for block, printed in reversed(wrong):
        lines[block.line - 1 : block.line - 1 + len(block.text.splitlines())] = _trimmed(printed)
    page.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(wrong)


def main() -> int:
    """Run pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put the real output on the page")
    arguments = parser.parse_args()
    failed = False
    for page in arguments.pages:
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = run(page, Path(folder))
            except PageError as error:
                print(f"{page}: {error}")
                failed = True
                continue
            if arguments.write:
                print(f"{page}: {write(page, result)} output blocks written")
                continue
            for block, printed in differences(page, result):
                print(f"{page}:{block.line}: the page shows\n{block.text}\nand its code prints\n{printed}")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
