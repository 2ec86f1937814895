"""The prose of each page and of its terminal form, whole: gold/*.txt. Other tests assert on verdicts and numbers."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import write
from rich.console import Console
from synthetic import study
from watched import Made, log_spaced, watched

import batchnorm as bn
from batchnorm.report import Report
from gold import assert_gold


def a_study(folder: Path) -> Any:
    return study(folder / "study")


def a_watched_run(folder: Path) -> Any:
    layers = [Made("stem", 70, undo=0.95), Made("last", 4)]
    return watched(folder / "watched", layers, logged={"loss": np.exp(-log_spaced(5000) / 500)})


def several_runs(folder: Path) -> Any:
    return [a_watched_run(folder), watched(folder / "b", [Made("stem", 70), Made("new", 8)], seed=1)]


def a_checkup(folder: Path) -> Any:
    rng = np.random.default_rng(0)
    state = {}
    for name in ("stem.bn", "head.bn"):
        state[f"{name}.weight"] = 1 + 0.2 * rng.standard_normal(20)
        state[f"{name}.bias"] = 0.2 * rng.standard_normal(20)
        state[f"{name}.running_mean"] = rng.standard_normal(20)
        state[f"{name}.running_var"] = 1 + rng.random(20)
        state[f"{name}.num_batches_tracked"] = np.array(1000)
    state["head.bn.running_var"][:2] = float("nan"), 1e-7
    return bn.check(state)


PAGES: dict[str, Callable[[Path], Any]] = {
    "study": a_study,
    "watched": a_watched_run,
    "several": several_runs,
    "checkup": a_checkup,
}


def text_of(page: str) -> str:
    """What a reader sees of a page before its scripts run, one line per element."""
    page = re.sub(r"(?s)<(script|style|svg)\b.*?</\1>", "", page)
    lines = (" ".join(html.unescape(line).split()) for line in re.sub(r"<[^>]+>", "\n", page).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def without_places(text: str, folder: Path) -> str:
    """The text without the folder, versions and dates, which differ from run to run."""
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?( UTC|Z|\+00:00)?", "DATE", text)
    text = re.sub(r"(?m)^(python|batchnorm|torch|numpy|pyarrow|system|processor|cores)\n.+$", r"\1\nVERSION", text)
    return re.sub(r"batchnorm \d+\.\d+\.\d+\S*", "batchnorm VERSION", text)


@pytest.mark.parametrize("name", PAGES)
def test_the_page(name: str, tmp_path: Path) -> None:
    page = write(PAGES[name](tmp_path), tmp_path / "page.html").read_text(encoding="utf-8")
    assert_gold(f"{name}.txt", without_places(text_of(page), tmp_path))


@pytest.mark.parametrize("name", PAGES)
def test_the_terminal(name: str, tmp_path: Path) -> None:
    out = io.StringIO()
    Report.of(PAGES[name](tmp_path)).show(Console(file=out, width=100))
    assert_gold(f"{name}-terminal.txt", without_places(out.getvalue(), tmp_path))
