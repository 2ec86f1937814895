"""What the terminal shows of a watched training: within 80 columns, plain in a pipe, nothing that moves the cursor."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text
from watched import EPS, Made, watched

from batchnorm.report.watch.answer import summarize
from batchnorm.report.watch.terminal import ASCII_BARS, show

DEEP = "backbone.body.stages.3.blocks.11.residual_branch.norm2"


def dying(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
    columns["gamma"][np.ix_(steps >= 300, np.arange(4))] = 1e-3
    columns["beta"][np.ix_(steps >= 300, np.arange(4))] = 0.0


def shown(folder: Path, layers: list[Made], encoding: str = "utf-8", width: int = 80) -> str:
    """As it goes into a pipe."""
    result = summarize([watched(folder / f"run{width}", layers)])
    held = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=held, width=width)
    show(result, console)
    held.flush()
    return held.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_a_row_a_layer_with_its_curve_then_the_answer_and_findings(tmp_path: Path) -> None:
    text = shown(tmp_path, [Made("stem", 2048, undo=0.95), Made(DEEP, 8, change=dying)])
    lines = text.splitlines()
    (stem,) = [row for row in lines if row.startswith("stem")]
    assert "2,048" in stem
    assert "▁" in stem
    assert "█" in stem
    (deep,) = [row for row in lines if row.startswith("backbon…")]
    assert "norm2" in deep
    assert "50%" in deep
    table = lines[: next(i for i, row in enumerate(lines) if row.startswith("Yes"))]
    assert max(map(len, table)) <= 80
    assert text.index("Yes, here") < text.index("error: dead units (dead-units)")
    assert f"  {DEEP}: 4 of 8 units dead since step" in text


def test_a_pipe_gets_no_escape_sequences(tmp_path: Path) -> None:
    assert "\x1b" not in shown(tmp_path, [Made("a", 3)])


def test_names_cannot_move_the_cursor_or_style_the_text(tmp_path: Path) -> None:
    text = shown(tmp_path, [Made("\x1b[2J[bold]bn[/bold]", 8, change=dying)])
    assert "\x1b" not in text
    assert "[bold]bn[/bold]" in text


def test_a_terminal_without_unicode_is_written_to(tmp_path: Path) -> None:
    text = shown(tmp_path, [Made("größe", 3, undo=0.95)], encoding="ascii")
    assert "gr??e" in text
    assert ASCII_BARS[-1] in text


def test_many_layers_with_a_finding_are_counted(tmp_path: Path) -> None:
    text = shown(tmp_path, [Made(f"bn{i}", 9 + i, change=dying) for i in range(8)])
    assert "bn4: 4 of 13 units dead" in text
    assert "bn5: 4 of 14 units dead" not in text
    assert "and in 3 more layers" in text


def test_layers_of_which_the_same_is_said_share_a_line(tmp_path: Path) -> None:
    text = shown(tmp_path, [Made(f"bn{i}", 8, change=dying) for i in range(8)])
    assert "bn0, bn1 … bn7 (8 layers): 4 of 8 units dead" in text
    assert "more layer" not in text


def test_no_findings_are_reported(tmp_path: Path) -> None:
    assert "No findings." in shown(tmp_path, [Made("bn", 4)])


SPARK_OF = {
    "rising a little": (np.linspace(0.01, 0.02, 40), "0..0.020", "█"),
    "from below 0 to above": (np.linspace(-0.5, 0.5, 40), "-0.5 0▅ 0.5", "█"),
    "below 0": (np.linspace(-3, -2.5, 40), "-3.00..-2.50", "█"),
    "constant": (np.full(40, 0.3), "0.3", "▅▅▅▅▅▅▅▅▅▅▅▅"),
}


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", SPARK_OF)
def test_a_curve_has_its_own_scale_which_is_shown(tmp_path: Path, name: str, width: int) -> None:
    wanted, scale, drawn = SPARK_OF[name]

    def change(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        # With a mean of 0 and s = 2: |gamma - 2| is 1 - undo_index, to first order, of what bare has.
        columns["mean"][:], columns["running_mean"][:], columns["beta"][:] = 0.0, 0.0, 0.0
        columns["var"][:], columns["running_var"][:] = 4.0 - EPS, 4.0 - EPS
        columns["gamma"][:] = (1 + wanted)[np.linspace(0, 39, len(steps)).astype(int), None]

    text = shown(tmp_path, [Made("bn", 8, change=change)], width=width)
    assert scale in text
    assert drawn in text.partition("Medians")[0]


def test_type_and_producer_stand_with_the_layer(tmp_path: Path) -> None:
    layers = [
        Made("stem.bn", 8, facts={"producer": "stem.conv.weight"}),
        Made("head", 8, facts={"class": "SyncBatchNorm"}),
        Made("old", 8, facts={"class": None}),
    ]
    narrow = shown(tmp_path, layers).splitlines()
    after = {row.split()[0]: below for row, below in pairwise(narrow) if row.strip()}
    assert after["stem.bn"].startswith("BN2d on conv ")
    assert after["head"].startswith("SyncBN ")
    assert after["old"].startswith("   ")
    (row,) = [row for row in shown(tmp_path, layers, width=140).splitlines() if row.startswith("stem.bn")]
    assert row.split()[:3] == ["stem.bn", "BatchNorm2d", "stem.conv"]


def test_in_a_notebook_no_line_is_wider_than_the_console(tmp_path: Path) -> None:
    """A cell's output does not wrap by itself: longer lines would be cut or scrolled."""
    console = Console(force_jupyter=True, width=100)
    with console.capture() as captured:
        show(summarize([watched(tmp_path / "run", [Made("stem", 8, change=dying)])]), console)
    lines = Text.from_ansi(captured.get()).plain.splitlines()
    assert "No:" in "\n".join(lines)
    assert max(len(line) for line in lines) <= 100
