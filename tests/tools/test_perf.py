"""A slower kernel fails in all attempts, a disturbed attempt does not, and unknown machines have a wide limit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import perf
from batchnorm.bench import record
from batchnorm.bench.cases import Case
from batchnorm.bench.rotation import Room
from batchnorm.bench.timing import Samples

FIRST = perf.CASES[0].name


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "restart_with_policy", lambda policy: None)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let attempts at the first case have these ratios, and those at the others 2; returns the cases' names."""

    def start(*ratios: float) -> list[str]:
        attempts: list[str] = []
        remaining: Iterator[float] = iter(ratios)

        def attempt(case: Case, room: Room) -> float:
            attempts.append(case.name)
            return next(remaining) if case.name == FIRST else 2.0

        monkeypatch.setattr(perf, "attempt", attempt)
        return attempts

    return start


def stored(path: Path, ratio: float) -> Path:
    origin = record.machine() | record.begin([], {})["machine"]
    name = perf.machine_name(origin, perf.torch.get_num_threads())
    entry = {"date": "", "versions": {}, "ratios": {case.name: ratio for case in perf.CASES}}
    path.write_text(json.dumps({"format": perf.FORMAT, "machines": {name: entry}}), encoding="utf-8")
    return path


def test_a_ratio_far_below_the_stored_one_fails_after_three_attempts(
    play: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stored(tmp_path / "perf.json", 2.0)
    attempts = play(1.1, 1.19, 1.0)
    assert perf.main([], path) == 1
    assert attempts.count(FIRST) == 3
    assert len(attempts) == 3 + len(perf.CASES) - 1
    printed = capsys.readouterr().out
    assert f"{FIRST:52} x 1.19, at least 1.20 BELOW" in printed
    assert printed.count("BELOW") == 1
    assert "1 of 10 cases became slower" in printed


def test_one_good_attempt_is_enough(play: Callable[..., list[str]], tmp_path: Path) -> None:
    attempts = play(0.1, 1.21)
    assert perf.main([], stored(tmp_path / "perf.json", 2.0)) == 0
    assert attempts.count(FIRST) == 2


def test_a_machine_without_an_entry_has_a_wide_limit(
    play: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(0.81)
    assert perf.main([], tmp_path / "perf.json") == 0
    assert "nothing is stored, so ours must reach 0.8 of eager's speed" in capsys.readouterr().out
    play(0.7, 0.79, 0.7)
    assert perf.main([], tmp_path / "perf.json") == 1


def test_store_keeps_the_other_machines_and_takes_the_median(play: Callable[..., list[str]], tmp_path: Path) -> None:
    path = tmp_path / "perf.json"
    other = {"another processor": {"date": "", "versions": {}, "ratios": {FIRST: 9.0}}}
    path.write_text(json.dumps({"format": perf.FORMAT, "machines": other}), encoding="utf-8")
    play(3.0, 9.0, 1.0)
    assert perf.main(["--store"], path) == 0
    machines = perf.load(path)
    assert machines.pop("another processor") == other["another processor"]
    ((name, entry),) = machines.items()
    assert "thread" in name
    assert entry["ratios"] == {case.name: 3.0 if case.name == FIRST else 2.0 for case in perf.CASES}
    play(1.81)
    assert perf.main([], path) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[]", "cannot read"),
        ("{}", "cannot read"),
        ('{"format": "batchnorm-bench"}', "is not a file of this tool"),
        ('{"format": "batchnorm-perf"}', "cannot read"),
        ('{"format": "batchnorm-perf", "machines": {"a": {}}}', "cannot read"),
        ('{"format": "batchnorm-perf", "machines": {"a": {"ratios": {"b": "c"}}}}', "cannot read"),
        ('{"format": "batchnorm-perf", "machines": {"a": {"ratios": {"b": 0}}}}', "not more than 0"),
    ],
)
def test_a_damaged_file_is_one_line_and_stays(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], play: Callable[..., list[str]]
) -> None:
    path = tmp_path / "perf.json"
    path.write_text(text, encoding="utf-8")
    attempts = play()
    for arguments in ([], ["--store"]):
        assert perf.main(arguments, path) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert path.read_text(encoding="utf-8") == text
    assert attempts == []


def test_the_stored_file_can_be_read_and_has_the_cases() -> None:
    for entry in perf.load(perf.FILE).values():
        assert set(entry["ratios"]) == {case.name for case in perf.CASES}


def test_processors_of_one_name_differ_by_their_caches() -> None:
    machine = {"processor": "AMD EPYC", "caches": {"L1d": 32 << 10, "L3": 32 << 20}}
    assert perf.machine_name(machine, 2) == "AMD EPYC, 2 threads, L1d 32 KiB, L3 32768 KiB"
    assert perf.machine_name({"processor": "M4", "caches": {}}, 1) == "M4, 1 thread"


@pytest.mark.parametrize(
    ("ours", "eager", "ratio"),
    [([1.0, 9.0, 9.0], [2.0, 2.0, 9.0], 2.0), ([2.0, 2.0, 2.0], [1.0, 6.0, 6.0], 3.0), ([4.0] * 3, [2.0] * 3, 0.5)],
    ids=["the best times", "the median", "slower"],
)
def test_disturbed_rounds_do_not_make_an_attempt_slow(
    ours: list[float], eager: list[float], ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perf, "race", lambda *_, **__: {"ours": Samples(ours), "eager": Samples(eager)})
    assert perf.attempt(perf.CASES[0], Room(1, 1)) == ratio


@pytest.mark.slow
def test_an_attempt_times_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf, "SECONDS", 0.01)
    assert 0.05 < perf.attempt(Case((60, 100), "rows"), Room(1 << 20, 1 << 24)) < 20
