"""What the system reports: the caches, the processors and the memory of this process, and what limits them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PROCESS = Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
_CPU_LIMITS = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")


def caches(folder: Path | None = None) -> dict[str, int]:
    """Bytes of each cache that one core reaches, by level: "L1d", "L2", "L3". Empty where Linux does not say.

    sysconf() would add up the caches of the whole processor.
    """
    sizes = {}
    for entry in sorted((folder or _CACHES).glob("index*")):
        kind, size = read_text(entry / "type"), re.fullmatch(r"(\d+)([KM]?)", read_text(entry / "size"))
        if size and kind != "Instruction":
            name = f"L{read_text(entry / 'level')}" + ("d" if kind == "Data" else "")
            sizes[name] = int(size[1]) << {"": 0, "K": 10, "M": 20}[size[2]]
    return sizes


def processors() -> int:
    """The number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limits() -> list[str]:
    """The limits of a container or a job on processor time and memory, as Linux writes them."""
    return [
        text for folder in _groups() for name in (*_CPU_LIMITS, *_MEMORY_LIMITS) if (text := read_text(folder / name))
    ]


def memory() -> int | None:
    """Bytes that this process can still allocate, by what is free and what it may use at most; None if unknown."""
    free = re.search(r"^MemAvailable:\s*(\d+) kB", read_text(_MEMORY), re.MULTILINE)
    sizes = [int(free[1]) << 10] if free else []
    texts = [read_text(folder / name) for folder in _groups() for name in _MEMORY_LIMITS]
    return min((*sizes, *(int(text) for text in texts if text.isdecimal())), default=None)


def _groups() -> Iterator[Path]:
    """The folders of this process's control groups and of the groups around them, in both versions of Linux's tree."""
    for line in read_text(_PROCESS).splitlines():
        _, _, group = line.partition(":")
        controllers, _, inside = group.partition(":")
        if controllers and not {"cpu", "memory"} & set(controllers.split(",")):
            continue
        root = _GROUPS / controllers if controllers else _GROUPS
        folder = root / inside.strip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent.is_relative_to(root))


def read_text(path: Path) -> str:
    """The stripped content of a small system file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def last_level(sizes: Mapping[str, int]) -> int:
    """Bytes of the last-level cache; 8 MiB where it is unknown."""
    return max(sizes.values(), default=0) or 8 << 20
