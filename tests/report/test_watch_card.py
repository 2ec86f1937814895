"""The card of a watched Run in a notebook: each layer's curve has its own scale, which is shown beside it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from watched import EPS, Made, watched

from batchnorm.report import card


def at(low: float, high: float) -> Made:
    """A layer whose undo_index goes evenly from `low` to `high`: s is 2, the mean 0, so bare gamma is 1, undone 2."""

    def change(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["mean"][:], columns["running_mean"][:], columns["beta"][:] = 0.0, 0.0, 0.0
        columns["var"][:], columns["running_var"][:] = 4.0 - EPS, 4.0 - EPS
        columns["gamma"][:] = 1 + np.linspace(low, high, len(steps))[:, None]

    return Made("bn", 8, change=change, facts={"producer": "conv.weight"})


@pytest.mark.parametrize(
    ("low", "high", "ends", "zero"),
    [(0.01, 0.02, "0..0.020", 1), (-0.5, 0.5, "-0.5..0.5", 1), (0.4, 0.5, "0.40..0.50", 0), (0.3, 0.3, "0.3", 0)],
)
def test_a_curve_has_its_own_scale_which_is_shown(
    tmp_path: Path, low: float, high: float, ends: str, zero: int
) -> None:
    shown = card(watched(tmp_path / "run", [at(low, high)]))
    heights = [float(y) for y in re.findall(r"[ML][\d.]+,([\d.]+)", shown)]
    assert max(heights) - min(heights) > 8 or low == high
    assert f">{ends}<" in shown
    assert shown.count("stroke-dasharray") == zero
    assert "BatchNorm2d" in shown
    assert ">conv<" in shown


def test_a_layer_that_never_ran_has_no_scale(tmp_path: Path) -> None:
    assert "undo_index with its scale" in card(watched(tmp_path / "run", [Made("bn", 3)], steps=np.array([])))
