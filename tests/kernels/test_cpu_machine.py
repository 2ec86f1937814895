"""Facts about the machine: plausible on any, measured once, stored safely, and never the reason that a layer fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.kernels.cpu import compiler, machine, probes, system
from batchnorm.kernels.cpu.machine import DEFAULTS, MEASURED, STORED, Facts
from batchnorm.kernels.cpu.probes import Rate

FOUND = Facts(1 << 20, 24 << 20, (Rate(2 << 20, 2e11, 8e10),), ((2 << 20, 3e11),), 2e-6, origin=MEASURED)

CALM = 60.0
"""Seconds for a region: other processes may stop this one for as long."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a process that knows nothing yet."""
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine, "_known", {})
    monkeypatch.setattr(machine, "_DISTURBED", CALM)
    monkeypatch.setattr(machine, "_UTILIZED", 0.0)
    monkeypatch.setattr(probes, "perf_counter", time.process_time)
    return tmp_path / "cache"


@pytest.fixture
def measurements(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The measurements that were asked for, which all find FOUND."""
    made: list[int] = []

    def measure(count: int) -> Facts:
        made.append(count)
        time.sleep(0.02)
        return FOUND

    monkeypatch.setattr(machine, "_measure", measure)
    return made


def facts_of_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Facts:
    monkeypatch.setattr(machine, "_known", {})
    return machine.facts()


def script(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process that prints the origin of its facts, and whatever else the code prints."""
    before = f"""
        import os, time, torch
        from batchnorm.kernels.cpu import compiler, machine, probes
        torch.set_num_threads({torch.get_num_threads()})
        machine._DISTURBED, machine._UTILIZED, probes.perf_counter = {CALM}, 0.0, time.process_time
    """
    environment = {name: value for name, value in os.environ.items() if name != machine.VARIABLE}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(code)],
        env={**environment, "BATCHNORM_CACHE": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""
    return out.strip()


def test_what_is_measured_is_plausible_on_any_machine(folder: Path) -> None:
    found = machine.facts()
    assert found.origin == MEASURED
    assert machine._is_plausible(found)
    assert 256 << 10 <= found.l2_bytes <= 4 << 20
    assert min(found.l2_bytes * torch.get_num_threads(), 256 << 20) <= found.cached_bytes <= 256 << 20
    totals = [rate.total for rate in found.bandwidth]
    assert totals == sorted(totals) == [total for total, _ in found.read_bandwidth]
    for kind in (1, 2):
        rates = [rate[kind] for rate in found.bandwidth]
        assert rates == sorted(rates, reverse=True)


def test_the_measurement_takes_little_time_and_leaves_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processor time of all threads: the clock also counts while this process is stopped."""
    sizes: list[int] = []
    touched = probes.touched
    monkeypatch.setattr(probes, "touched", lambda size: sizes.append(size) or touched(size))
    compiler.processor()  # imports llvmlite, which any kernel needs
    start = time.process_time()
    machine.facts()
    assert time.process_time() - start < 0.3 * (1 + torch.get_num_threads())
    assert len(sizes) == 1
    assert sizes[0] <= 96 << 20
    maps = Path("/proc/self/smaps")
    if maps.exists():
        assert f"Size: {sizes[0] >> 10:14} kB" not in maps.read_text(encoding="utf-8")


def test_a_second_process_reads_what_the_first_has_stored(folder: Path) -> None:
    found = machine.facts()
    assert printed(script("print(machine.facts())", folder)) == str(replace(found, origin=STORED))


def test_two_processes_may_measure_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print(machine.facts().origin, machine._is_plausible(machine.facts()))"
    both = [script(code, folder) for _ in range(2)]
    assert {printed(process) for process in both} <= {f"{MEASURED} True", f"{STORED} True"}
    assert facts_of_a_new_process(monkeypatch).origin == STORED
    assert {path.suffix for path in folder.iterdir()} == {".json", ".o"}


def test_a_process_measures_once_for_each_number_of_threads(
    measurements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 2, 1, 2, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert machine.facts() == FOUND
    assert measurements == [1, 2]


def test_threads_that_ask_at_once_wait_for_one_measurement(measurements: list[int]) -> None:
    asking = [threading.Thread(target=machine.facts) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(measurements) == 1


FORKING = """
    {before}
    def measure(count):
        raise SystemError("a forked child measures nothing")
    child = os.fork()
    if child == 0:
        machine._measure = measure
        torch.set_num_threads(1)
        print(machine.facts().origin, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this system")
@pytest.mark.parametrize(
    ("before", "origin"),
    [
        ("machine._measure = lambda count: machine.DEFAULTS; machine.facts()", "defaults"),
        ("", "defaults (a forked process has one thread to measure with)"),
    ],
    ids=["a parent with facts", "a parent without"],
)
def test_a_forked_child_measures_nothing(before: str, origin: str, folder: Path) -> None:
    assert printed(script(FORKING.format(before=before), folder)) == origin


DAMAGED: list[Any] = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"l2_bytes": ' + b"9" * 10_000 + b"}",
    {"l2_bytes": True},
    {"l2_bytes": 1e6},
    {"l2_bytes": "1M"},
    {"l2_bytes": 0},
    {"l2_bytes": 1 << 40},
    {"cached_bytes": 1 << 10},
    {"cached_bytes": 1 << 62},
    {"cached_bytes": None},
    {"region_seconds": 0},
    {"region_seconds": -1.0},
    {"region_seconds": float("nan")},
    {"region_seconds": float("inf")},
    {"bandwidth": []},
    {"bandwidth": {}},
    {"bandwidth": "abc"},
    {"bandwidth": [[1 << 20, 1e10]]},
    {"bandwidth": [[1 << 20, 1e10, "1e10"]]},
    {"bandwidth": [[1.5, 1e10, 1e10]]},
    {"bandwidth": [[1 << 20, 1e10, float("nan")]]},
    {"bandwidth": [[1 << 20, 1e10, 1e10]] * 10_000},
    {"bandwidth": [[1 << 20, 1e10, 1e10]] * 2},
    {"bandwidth": [[2 << 20, 1e10, 1e10], [1 << 20, 1e10, 1e10]]},
    {"bandwidth": [[{}, 1e10, 1e10]]},
    {"bandwidth": [[True, 1e10, 1e10]]},
    {"read_bandwidth": [[1 << 20, 0.0]]},
    {"read_bandwidth": 5},
    {"utilization": 1.5},
    {"utilization": float("nan")},
    {"measurements": 0},
    {"measurements": 1.0},
]


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: str(damage)[:40])
def test_a_damaged_file_is_measured_again(
    damage: Any, measurements: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.facts()
    (stored,) = folder.glob("machine-*.json")
    whole = stored.read_bytes()
    content = damage if isinstance(damage, bytes) else json.dumps(json.loads(whole) | damage).encode()
    stored.write_bytes(content)
    assert facts_of_a_new_process(monkeypatch) == FOUND
    assert len(measurements) == 2
    assert stored.read_bytes() == whole
    assert facts_of_a_new_process(monkeypatch).origin == STORED


def test_an_absurd_measurement_is_not_believed_and_not_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "cached_bytes", lambda *_: 1 << 50)
    assert machine.facts() == DEFAULTS
    assert facts_of_a_new_process(monkeypatch).origin == STORED


def test_a_disturbed_measurement_is_repeated_twice_and_the_best_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_UTILIZED", 0.75)
    utilizations = [0.4, 0.6, 0.5]
    monkeypatch.setattr(machine, "_measure", lambda _: replace(FOUND, utilization=utilizations.pop(0)))
    found = [facts_of_a_new_process(monkeypatch) for _ in range(5)]
    assert [one.utilization for one in found] == [0.4, 0.6, 0.6, 0.6, 0.6]
    assert [one.measurements for one in found] == [1, 2, 3, 3, 3]
    assert utilizations == []
    assert found[-1].origin == STORED


def test_a_calm_measurement_ends_the_repetition(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_UTILIZED", 0.75)
    utilizations = [0.4, 0.9]
    monkeypatch.setattr(machine, "_measure", lambda _: replace(FOUND, utilization=utilizations.pop(0)))
    found = [facts_of_a_new_process(monkeypatch) for _ in range(4)]
    assert [one.utilization for one in found] == [0.4, 0.9, 0.9, 0.9]


def test_a_repetition_that_fails_counts_and_leaves_the_stored_facts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_UTILIZED", 0.75)
    monkeypatch.setattr(machine, "_measure", lambda _: replace(FOUND, utilization=0.4))
    machine.facts()
    monkeypatch.setattr(machine, "_measure", lambda _: machine._give_up("busy"))
    found = [facts_of_a_new_process(monkeypatch) for _ in range(4)]
    assert [one.measurements for one in found] == [2, 3, 3, 3]
    assert {one.utilization for one in found} == {0.4}


def test_a_forked_child_takes_disturbed_facts_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_UTILIZED", 0.75)
    monkeypatch.setattr(machine, "_measure", lambda _: replace(FOUND, utilization=0.4))
    machine.facts()
    monkeypatch.setattr(machine.threads, "is_forked", lambda: True)
    found = facts_of_a_new_process(monkeypatch)
    assert (found.origin, found.utilization) == (STORED, 0.4)


@pytest.mark.parametrize(
    ("used", "count", "processors", "shared", "utilization"),
    [
        (2.0, 2, 2, True, 1.0),
        (1.0, 2, 2, True, 0.5),
        (2.0, 64, 4, True, 0.5),
        (1.0, 2, 2, False, 1.0),
        (3.0, 2, 2, True, 1.0),  # another thread of this process
        (0.0, 2, 2, True, 0.0),
    ],
)
def test_the_utilization_is_that_of_the_cores_that_the_threads_may_use(
    used: float, count: int, processors: int, shared: bool, utilization: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "processors", lambda: processors)
    monkeypatch.setattr(machine.threads, "can_share", lambda: shared)
    assert machine._utilization(used, 1.0, count) == utilization
    assert machine._utilization(used, 0.0, count) == 0.0, "a clock that stands still"


def no_llvmlite() -> str:
    raise ImportError("No module named 'llvmlite'", name="llvmlite")


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def open_to_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder, patch: patch.setenv("BATCHNORM_CACHE", "/dev/null/cache"), "Not a directory"),
        (open_to_all, "can be written to by others"),
        (lambda folder, patch: patch.setattr(compiler, "processor", no_llvmlite), "No module named 'llvmlite'"),
        (lambda folder, patch: patch.setattr(machine.tempfile, "TemporaryFile", full), "No space left on device"),
    ],
    ids=["no folder", "a folder of others", "no llvmlite", "a full disk"],
)
def test_where_nothing_can_be_stored_the_defaults_hold_and_nothing_is_measured(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    measurements: list[int],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(folder, monkeypatch)
    found = machine.facts()
    assert found == DEFAULTS
    assert found.origin.startswith("defaults (")
    assert reason in found.origin
    assert machine.facts() is found
    assert measurements == []


def test_a_disk_that_fills_up_during_the_measurement_leaves_no_file(
    measurements: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", full)
    assert machine.facts() == DEFAULTS
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("disturbance", "reason"),
    [
        (lambda patch: patch.setattr(machine, "_DISTURBED", 0.0), "other processes use the cores"),
        (lambda patch: patch.setattr(probes, "_COPY_SECONDS", -1.0), "other processes use the cores"),
        (lambda patch: patch.setattr(system, "memory", lambda: 20 << 20), "too little memory is free"),
        (lambda patch: patch.setattr(system, "memory", lambda: 0), "too little memory is free"),
        (lambda patch: patch.setattr(probes.mmap, "mmap", full), "No space left"),
    ],
    ids=["slow regions", "no rate in time", "little memory", "no memory", "memory that cannot be mapped"],
)
def test_what_cannot_be_measured_now_is_not_stored(
    disturbance: Callable[[pytest.MonkeyPatch], None], reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbance(monkeypatch)
    found = machine.facts()
    assert found == DEFAULTS
    assert reason in found.origin
    assert list(folder.glob("machine-*")) == []


def test_a_small_machine_is_measured_with_less_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "memory", lambda: 200 << 20)
    found = machine.facts()
    assert found.origin == MEASURED
    assert found.bandwidth[-1].total <= 25 << 20


def test_facts_are_stored_per_machine(measurements: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {machine.file(1), machine.file(2)}
    with monkeypatch.context() as patch:
        patch.setattr(system, "limits", lambda: ["50000 100000"])
        files.add(machine.file(2))
    with monkeypatch.context() as patch:
        patch.setattr(system, "processors", lambda: 7)
        files.add(machine.file(2))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "processor", lambda: "another")
        files.add(machine.file(2))
    assert len(files) == 5
    assert all(path.parent == folder for path in files)


def test_the_defaults_are_plausible() -> None:
    assert machine._is_plausible(DEFAULTS)


@pytest.mark.parametrize(
    ("text", "l2", "cached", "origin", "measured"),
    [
        ("defaults", DEFAULTS.l2_bytes, DEFAULTS.cached_bytes, "BATCHNORM_MACHINE: defaults", 0),
        ("l2=1M,cached=64M", 1 << 20, 64 << 20, "BATCHNORM_MACHINE: l2, cached", 1),
        (" cached=2G , l2=64K ", 64 << 10, 2 << 30, "BATCHNORM_MACHINE: l2, cached", 1),
        ("l2=768K", 768 << 10, 24 << 20, "BATCHNORM_MACHINE: l2; the rest measured now", 1),
        ("cached=0,defaults", DEFAULTS.l2_bytes, 0, "BATCHNORM_MACHINE: defaults, cached", 0),
        ("", 1 << 20, 24 << 20, MEASURED, 1),
    ],
)
def test_the_variable_overrides_what_is_measured(
    text: str,
    l2: int,
    cached: int,
    origin: str,
    measured: int,
    measurements: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(machine.VARIABLE, text)
    found = machine.facts()
    assert (found.l2_bytes, found.cached_bytes, found.origin) == (l2, cached, origin)
    assert len(measurements) == measured


@pytest.mark.parametrize(
    "text",
    [
        "l2",
        "l2=",
        "l2=1T",
        "l2=-1",
        "l2=1.5M",
        "l2=１M",
        "l3=1M",
        "default",
        "l2=999999999999G",
        "l2=1M cached=2M",
        "l2=63K",
        "cached=1025G",
    ],
)
def test_a_wrong_value_of_the_variable_is_one_line_that_shows_right_ones(
    text: str, measurements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.VARIABLE, text)
    with pytest.raises(ValueError, match="it may have l2=SIZE, cached=SIZE and defaults") as caught:
        machine.facts()
    assert "\n" not in str(caught.value)
    assert text in str(caught.value)
    assert measurements == []
