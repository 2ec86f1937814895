"""A followed page: written again when the Run grows, left alone when it does not, done when the training is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from watched import Made, columns_of, log_spaced, units_table, watched

from batchnorm.cli.report import followed
from batchnorm.report import Report
from batchnorm.runs.run import Run, RunError

LAYERS = [Made("bn", 4)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return watched(tmp_path / "run", LAYERS, steps=log_spaced(100, 10), status="running")


def grow(run: Run, step: int) -> None:
    steps = np.array([step])
    run.append("units", units_table(LAYERS, steps, [columns_of(np.random.default_rng(step), LAYERS[0], steps)]))


def acting(*actions: Callable[[], object]) -> Callable[[float], None]:
    """Instead of sleeping: one action after the other."""
    left: Iterator[Callable[[], object]] = iter(actions)
    return lambda seconds: next(left)() and None


def reloads(page: Path) -> bool:
    return 'name="reload" content="3"' in page.read_text(encoding="utf-8")


def statuses(found: Report) -> list[str]:
    return [run.info["status"] for run in found.subjects]


@pytest.mark.slow
def test_the_page_grows_with_the_run_and_ends_with_it(run: Run) -> None:
    page = run.path / "report.html"
    nothing = lambda: None  # noqa: E731
    sleep = acting(nothing, lambda: grow(run, 200), nothing, lambda: grow(run, 300), lambda: run.finish("complete"))
    seen = [
        (found.summary[0].reading.last_step, reloads(page), statuses(found))
        for found in followed([run.path], page, 3.0, sleep)
    ]
    assert [step for step, _, _ in seen] == [100, 200, 300, 300], "and not once more for nothing"
    assert [again for _, again, _ in seen] == [True, True, True, False]
    assert seen[-1][2] == ["complete"]


def test_a_run_that_has_ended_is_written_once(tmp_path: Path) -> None:
    run = watched(tmp_path / "run", LAYERS, steps=log_spaced(100, 10))
    assert len(list(followed([run.path], tmp_path / "page.html", 1.0, acting()))) == 1


@pytest.mark.slow
def test_several_runs_are_followed_until_the_last_has_ended(run: Run, tmp_path: Path) -> None:
    other = watched(tmp_path / "other", LAYERS, steps=log_spaced(100, 10))
    seen = followed([other.path, run.path], tmp_path / "page.html", 1.0, acting(lambda: run.finish("failed")))
    assert [statuses(found) for found in seen] == [["complete", "running"], ["complete", "failed"]]


@pytest.mark.parametrize("ends", ["ctrl-c", "removed"])
def test_what_ends_it_leaves_a_page_that_stands_still(run: Run, tmp_path: Path, ends: str) -> None:
    def interrupt() -> None:
        if ends == "ctrl-c":
            raise KeyboardInterrupt
        for entry in run.path.iterdir():
            entry.unlink()

    page = tmp_path / "page.html"
    with pytest.raises(KeyboardInterrupt if ends == "ctrl-c" else RunError):
        list(followed([run.path], page, 1.0, acting(interrupt)))
    text = page.read_text(encoding="utf-8")
    assert text.endswith("</html>\n")
    assert "refresh" not in text.split("</head>")[0]
