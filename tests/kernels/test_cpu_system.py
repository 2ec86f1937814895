"""What Linux reports, from files as it writes them; nothing fails where it reports nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchnorm.kernels.cpu import system


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(system, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(system, "_PROCESS", tmp_path / "process")
    monkeypatch.setattr(system, "_MEMORY", tmp_path / "memory")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def test_limits_of_the_second_version_are_those_of_the_group_and_of_the_groups_around_it(linux: Path) -> None:
    write(linux / "process", "0::/jobs/one")
    write(linux / "groups" / "jobs" / "one" / "cpu.max", "50000 100000")
    write(linux / "groups" / "jobs" / "memory.max", str(1 << 30))
    write(linux / "groups" / "cpu.max", "max 100000")
    write(linux / "groups" / "others" / "cpu.max", "1 100000")
    assert system.limits() == ["50000 100000", str(1 << 30), "max 100000"]
    write(linux / "memory", "MemTotal: 9000000 kB\nMemAvailable:    8000000 kB")
    assert system.memory() == 1 << 30
    write(linux / "memory", "MemAvailable: 1000 kB")
    assert system.memory() == 1000 << 10


def test_limits_of_the_first_version_are_those_of_two_controllers(linux: Path) -> None:
    write(linux / "process", "9:name=systemd:/x\n5:memory:/job:1\n3:cpu,cpuacct:/\n2:cpuset:/x\nnonsense\n0::/")
    write(linux / "groups" / "memory" / "job:1" / "memory.limit_in_bytes", "9223372036854771712")
    write(linux / "groups" / "cpu,cpuacct" / "cpu.cfs_quota_us", "-1")
    write(linux / "groups" / "cpuset" / "x" / "cpu.max", "1 1")
    assert sorted(system.limits()) == ["-1", "9223372036854771712"]


def test_two_jobs_of_the_same_limits_are_alike(linux: Path) -> None:
    found = []
    for job in ("one", "two"):
        write(linux / "process", f"0::/{job}")
        write(linux / "groups" / job / "cpu.max", "50000 100000")
        found.append(system.limits())
    assert found[0] == found[1] == ["50000 100000"]


@pytest.mark.parametrize("process", [None, "", ":::", "0::/../../../etc", "0:memory"])
def test_without_reports_there_are_no_limits(process: str | None, linux: Path) -> None:
    if process is not None:
        write(linux / "process", process)
    assert system.limits() == []
    assert system.memory() is None


def test_this_process_has_a_processor() -> None:
    assert system.processors() >= 1
