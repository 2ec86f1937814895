"""What the terminal shows of a watched training: within 80 columns, plain in a pipe, nothing that moves the cursor."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from watched import Made, watched

from batchnorm.report.watch.numbers import Curve
from batchnorm.report.watch.page import tell
from batchnorm.report.watch.spark import ASCII_BARS, BARS, line
from batchnorm.report.watch.terminal import show

DEEP = "backbone.body.stages.3.blocks.11.residual_branch.norm2"


def dying(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
    columns["gamma"][np.ix_(steps >= 300, np.arange(4))] = 1e-3
    columns["beta"][np.ix_(steps >= 300, np.arange(4))] = 0.0


def shown(folder: Path, layers: list[Made], encoding: str = "utf-8") -> str:
    """As it goes into a pipe."""
    (told,) = tell([watched(folder / "run", layers)])
    held = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=held, width=80)
    show(told, console)
    held.flush()
    return held.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_a_row_a_layer_with_its_curve_then_the_answer_and_findings(tmp_path: Path) -> None:
    text = shown(tmp_path, [Made("stem", 2048, undo=0.95), Made(DEEP, 8, change=dying)])
    lines = text.splitlines()
    (stem,) = [row for row in lines if row.startswith("stem")]
    assert "2,048" in stem
    assert "▁" in stem
    assert "█" in stem
    (deep,) = [row for row in lines if row.startswith("backbone…")]
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


def test_no_findings_are_told(tmp_path: Path) -> None:
    assert "No findings." in shown(tmp_path, [Made("bn", 4)])


@pytest.mark.parametrize("length", [0, 1, 40])
def test_an_unknown_curve_is_blank(length: int) -> None:
    assert line(Curve(np.arange(length), np.full((3, length), np.nan)), 8, 0.0, 1.0) == " " * 8


def test_a_sparkline_goes_as_the_curve_goes() -> None:
    steps = np.arange(0, 1000)
    rising = Curve(steps, (np.log1p(steps) / np.log1p(999))[None])
    assert line(rising, 8, 0.0, 1.0) == BARS
    assert line(Curve(steps, 1 - rising.values), 8, 0.0, 1.0) == BARS[::-1]
    late = rising.values.copy()
    late[0, :500] = np.nan
    assert line(Curve(steps, late), 8, 0.0, 1.0).startswith(" " * 6)
    assert line(None, 4, 0.0, 1.0) == "    "


def test_values_outside_the_scale_are_at_its_ends() -> None:
    assert line(Curve(np.arange(4), np.array([[-9.0, -9.0, 9.0, 9.0]])), 2, 0.0, 1.0) == BARS[0] + BARS[-1]
