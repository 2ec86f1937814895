"""The sweep's cases are always alike, a loss is measured again before it is one, and the verdict counts them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import batchnorm as bn
import sweep
from batchnorm.bench import record
from batchnorm.bench.cases import Case
from batchnorm.bench.rotation import Room
from batchnorm.bench.timing import Samples

ROOM = Room(1 << 16, 1 << 20)
SMALL, LARGE = Case((60, 100), "rows"), Case((60, 1000), "rows")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "restart_with_policy", lambda policy: None)


def samples(ours: float, eager: float) -> dict[str, Samples]:
    return {
        name: Samples([seconds / 4] * 3, [3 * seconds / 4] * 3) for name, seconds in (("ours", ours), ("eager", eager))
    }


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Let the attempts have these times of ours, in µs, where eager always takes 1000; returns their seconds."""

    def start(*ours: float) -> list[float]:
        attempts: list[float] = []
        remaining = iter(ours)

        def race(case: Case, room: Room, *, seconds: float) -> dict[str, Samples]:
            attempts.append(seconds)
            return samples(next(remaining) * 1e-6, 1e-3)

        monkeypatch.setattr(sweep, "race", race)
        return attempts

    return start


def test_the_cases_are_always_alike_and_spread_over_sizes_and_kinds() -> None:
    found = sweep.chosen_cases()
    assert found == sweep.chosen_cases()
    assert len(found) == len(set(found)) == sweep.COUNT == 200
    assert found[0] == Case((2, 8), "rows")
    assert 0.8 * sweep.LARGEST < max(case.tensor_bytes for case in found) < 1.2 * sweep.LARGEST
    octaves = [int(math.log2(case.tensor_bytes)) for case in found]
    assert min(octaves.count(octave) for octave in range(8, 27)) >= 4
    for field, names in (
        ("dtype", {"float32", "bfloat16", "float16", "float64"}),
        ("variant", {"bn", "bn+relu", "bn+silu", "bn+add+relu"}),
        ("mode", {"train", "eval"}),
        ("layout", {"rows", "contiguous", "channels_last", "channels_last_3d"}),
    ):
        assert {getattr(case, field) for case in found} == names
    assert {len(case.shape) for case in found} == {2, 3, 4, 5}
    assert all(case.values >= 2 for case in found)


@pytest.mark.parametrize(
    ("case", "ours", "eager", "words"),
    [
        (SMALL, 100e-6, 95e-6, None),  # 5 %, but 5 µs
        (SMALL, 102e-5, 100e-5, None),  # 20 µs, but 2 %
        (SMALL, 110e-6, 99e-6, "slower by 11 % and 11 µs"),
        (SMALL, 100e-6, 100e-6, None),
        (LARGE, 100e-6, 100e-6, "not faster, x 1.000"),
        (LARGE, 100e-6, 101e-6, None),
    ],
)
def test_what_is_lost(case: Case, ours: float, eager: float, words: str | None) -> None:
    assert sweep.lost(case, sweep.figures(samples(ours, eager))) == words


def test_rounds_that_others_disturbed_are_no_loss() -> None:
    disturbed = {"ours": Samples([900e-6, 5e-3, 5e-3]), "eager": Samples([1e-3] * 3)}
    found = sweep.figures(disturbed)
    assert found["ratios"]["whole"] == pytest.approx(0.2)
    assert sweep.lost(LARGE, found) is None
    lucky = {"ours": Samples([900e-6, 900e-6, 900e-6]), "eager": Samples([800e-6, 1e-3, 1e-3])}
    assert sweep.lost(LARGE, sweep.figures(lucky)) is None


def test_a_loss_is_measured_again_and_longer_and_the_best_counts(play: Callable[..., list[float]]) -> None:
    attempts = play(1200, 1100, 1300, 1150)
    found = sweep.measure(SMALL, ROOM, 1.0)
    assert attempts == [1.0, 1.5, 2.25, 3.375]
    assert found["attempts"] == 4
    assert found["lost"] == "slower by 10 % and 100 µs"
    attempts = play(1200, 900)
    found = sweep.measure(SMALL, ROOM, 1.0)
    assert (len(attempts), found["lost"]) == (2, None)
    assert found["ratios"]["whole"] == pytest.approx(1 / 0.9)
    play(1000)
    assert sweep.measure(SMALL, ROOM, 1.0)["attempts"] == 1


def test_the_command_prints_the_kernel_of_each_case_and_stores_the_figures(
    play: Callable[..., list[float]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    todo = sweep.chosen_cases()[:3]
    play(*[500] * 3)
    path = tmp_path / "sweep.json"
    monkeypatch.setattr(sweep, "chosen_cases", lambda: todo)
    assert sweep.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for case in todo:
        assert case.name in printed
    assert bn.kernels.choose(torch.empty(2, 8)).why in printed
    assert "3 cases, x 2.00 in the median: 0 lost (0 slower, 0 not faster), 0 of 1 wrong" in printed
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert (stored["format"], stored["status"]) == (sweep.FORMAT, "complete")
    assert [result["name"] for result in stored["results"]] == [case.name for case in todo]
    assert stored["results"][0]["errors"] == []
    assert stored["results"][1]["errors"] is None


def a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "chosen_cases", lambda: [SMALL, LARGE])


def test_a_lost_case_is_exit_status_1(
    play: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_case(monkeypatch)
    play(900, *[1000] * 4)
    assert sweep.main([]) == 1
    printed = capsys.readouterr().out
    assert f"lost: {LARGE.name}: not faster, x 1.000" in printed
    assert "2 cases, x 1.06 in the median: 1 lost (0 slower, 1 not faster), 0 of 1 wrong" in printed


def test_a_wrong_result_is_exit_status_1(
    play: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_case(monkeypatch)
    play(900, 900)
    monkeypatch.setattr("batchnorm.bench.conduct.errors", lambda *_: ["y: error 1.0e+00"])
    assert sweep.main([]) == 1
    printed = capsys.readouterr().out
    assert f"wrong: {SMALL.name}: y: error 1.0e+00" in printed
    assert "0 lost (0 slower, 0 not faster), 1 of 1 wrong" in printed


def test_ctrl_c_shows_and_stores_what_was_measured(
    play: Callable[..., list[float]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a_case(monkeypatch)
    play(900)
    measure = sweep.measure

    def interrupted(case: Case, room: Room, seconds: float) -> dict[str, Any]:
        if case is LARGE:
            raise KeyboardInterrupt
        return measure(case, room, seconds)

    monkeypatch.setattr(sweep, "measure", interrupted)
    assert sweep.main(["--json", str(tmp_path / "sweep.json")]) == 130
    assert "1 case, x 1.11" in capsys.readouterr().out
    stored = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert (stored["status"], len(stored["results"])) == ("interrupted", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--filter", "resnet"], "no case matches --filter 'resnet': a case is named like '2x8 rows"),
        (["--seconds", "0"], "--seconds must be more than 0, got 0.0"),
        (["--seconds", "nan"], "--seconds must be more than 0, got nan"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, play: Callable[..., list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    play()
    assert sweep.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_existing_file_stays(
    tmp_path: Path, play: Callable[..., list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    path.write_text("years of work", encoding="utf-8")
    play()
    assert sweep.main(["--json", str(path)]) == 2
    assert "exists: choose another file" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(
    "case",
    [
        Case((8, 6, 10), "contiguous", "float64", "bn+silu"),
        Case((30, 6), "rows", "float16", "bn+add+relu"),
        Case((4, 6, 5, 3), "channels_last", "float16", "bn", "eval"),
        Case((3, 6, 2, 3, 4), "channels_last_3d", "float64"),
    ],
    ids=lambda case: case.name,
)
def test_every_kind_is_right_and_is_timed(case: Case) -> None:
    assert sweep.errors(case) == []
    found = sweep.figures(sweep.race(case, ROOM, seconds=0.0, rounds=3))
    assert found["rounds"] == 3
    assert set(found["ratios"]) == ({"whole", "forward", "backward"} if case.train else {"whole"})
