"""The stored result: one JSON file with every figure, and where it comes from. Names no user and no host.

    format, schema        "batchnorm-bench", 1
    status                running, complete, interrupted or failed
    date, command         UTC, to the second; as typed, without the place of the file
    machine               processor, cores, caches, memory, system, huge pages; the GPU where one is measured
    versions, git         of what computed; the checkout's commit and whether it had changes, or null
    allocator             the policy (see `in_force`); `environment` has the variables that bear on speed
    settings, notes       what was asked for; what is missing and why
    results               one entry a case: case, gate, floor, contenders, ratios
    models                one entry a model and layout

Times are seconds, sizes bytes. A case whose gate is red has its errors in place of times.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import batchnorm
from batchnorm.runs.run import numbered, provenance, write_text_atomically

# glibc gives large blocks back to the system at once and maps them anew. Each call of a large operator then pays for
# fresh pages, which can cost more than the operator, and the side that allocates less wins by that alone. `tuned` keeps
# freed memory in the process, as a training run's caching allocator or an LD_PRELOADed jemalloc would; `default` leaves
# everything as the system has it. glibc reads its settings when a process starts: `tuned` starts the program anew.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
POLICIES = ("tuned", "default")


def in_force(environment: Mapping[str, str] = os.environ) -> str:
    """The policy that this process runs under: 'tuned', 'default', or 'set' where MALLOC_ variables say otherwise."""
    if not has_glibc():
        return "default"
    if all(environment.get(name) == value for name, value in TUNED.items()):
        return "tuned"
    return "set" if any(name.startswith("MALLOC_") for name in environment) else "default"


def has_glibc() -> bool:
    """Whether the settings mean anything to this system."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def anew(policy: str, environment: Mapping[str, str] = os.environ) -> tuple[list[str], dict[str, str]] | None:
    """The arguments and the environment to start this program with under `policy`; None where it already runs so."""
    if policy != "tuned" or not has_glibc() or in_force(environment) == "tuned":
        return None
    return [sys.executable, *sys.orig_argv[1:]], {**environment, **TUNED}


def start_anew(policy: str) -> None:
    """Become this program under `policy`: returns only where it already runs so."""
    how = anew(policy)
    if how is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(
            how[0][0], *how
        )  # the same process: its parent's signals, exit status and terminal stay what they are


FORMAT = "batchnorm-bench"
SCHEMA = 1
_ALSO = ("torch", "numpy", "numba", "llvmlite", "jax", "jaxlib", "transformers", "triton")
_BEARS_ON_SPEED = re.compile(r"(MALLOC|OMP|GOMP|KMP|MKL|NUMBA|TBB|XLA|DNNL|ONEDNN|TORCH|ATEN|BATCHNORM)_.*")
_ALSO_BEARS = ("GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_UNKNOWN_CACHE = 8 << 20


class BenchError(Exception):
    """What cannot be measured, read or stored. The message is one line and says what to do."""


def begin(arguments: Sequence[str], settings: dict[str, Any], gpu: dict[str, Any] | None = None) -> dict[str, Any]:
    """A record without results yet; `gpu` is what is known of the GPU that is measured."""
    origin = provenance(without_place(arguments), ("batchnorm", *_ALSO))
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "status": "running",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": origin["command"],
        "machine": {**origin["machine"], **machine(), **({} if gpu is None else {"gpu": gpu})},
        "versions": origin["versions"] | {"batchnorm": batchnorm.__version__},
        "git": git(),
        "allocator": in_force(),
        "environment": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if _BEARS_ON_SPEED.fullmatch(name) or name in _ALSO_BEARS
        },
        "settings": settings,
        "notes": [],
        "results": [],
        "models": [],
    }


def without_place(arguments: Sequence[str]) -> list[str]:
    """The arguments but --out and --force: where the file lies is nothing to readers, and names the user's folders."""
    kept: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument == "--out":
            next(given, None)
        elif argument != "--force" and not argument.startswith("--out="):
            kept.append(argument)
    return kept


def machine() -> dict[str, Any]:
    """Caches in bytes by name, memory in bytes, the system, and the kernel's policy on huge pages where it has one."""
    memory = None
    with suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chosen = re.search(r"\[(\w+)\]", _read(_HUGE_PAGES))
    return {
        "caches": caches(),
        "memory": memory,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "huge_pages": chosen[1] if chosen else None,
    }


def caches(folder: Path = _CACHES) -> dict[str, int]:
    """Bytes of each cache of one core, by level: "L1d", "L2", "L3". Empty where the system does not tell.

    Read from what the kernel says, which is what this core reaches; sysconf() adds up what a processor has in all.
    """
    found = {}
    for entry in sorted(folder.glob("index*")):
        kind, size = _read(entry / "type"), re.fullmatch(r"(\d+)([KM]?)", _read(entry / "size"))
        if size and kind != "Instruction":
            name = f"L{_read(entry / 'level')}" + ("d" if kind == "Data" else "")
            found[name] = int(size[1]) << {"": 0, "K": 10, "M": 20}[size[2]]
    return found


def last_level(machine: dict[str, Any]) -> int:
    """Bytes of the last-level cache, on a GPU of its L2; 8 MiB where it is unknown."""
    if "gpu" in machine:
        return int(machine["gpu"]["L2"])
    return max(machine["caches"].values(), default=_UNKNOWN_CACHE)


def git() -> dict[str, Any] | None:
    """The commit of the checkout that holds this package, and whether its files differ from it; None outside one."""
    home = Path(batchnorm.__file__)
    if _git(home.parent, "ls-files", "--error-unmatch", home.name) is None:
        return None
    commit = _git(home.parent, "rev-parse", "--short=12", "HEAD")
    changes = _git(home.parent, "status", "--porcelain")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def default_path(record: dict[str, Any], folder: Path | None = None) -> Path:
    """Where to store a record: in the checkout's benchmarks/, if one runs inside it, or in the folder one runs in."""
    here = Path.cwd() if folder is None else folder
    date = record["date"][:10]
    top = _git(here, "rev-parse", "--show-toplevel")
    ours = top is not None and Path(batchnorm.__file__).is_relative_to(top)
    if record["git"] and ours and top is not None and (Path(top) / "benchmarks").is_dir():
        told = record["machine"]
        name = told["gpu"]["name"] if "gpu" in told else f"{told['processor']} {told['cores']}"
        machine = re.sub(r"[^a-z0-9]+", "-", name.lower())
        commit = record["git"]["commit"] + ("-dirty" if record["git"]["dirty"] else "")
        first = Path(top) / "benchmarks" / f"{date}-{machine.strip('-')}-{commit}.json"
    else:
        first = here / f"batchnorm-bench-{date}.json"
    return next(path for path in numbered(first) if not path.exists())


def check_vacant(path: Path, *, force: bool) -> None:
    """Raise BenchError where a file is in the way. With `force`, only a file of results is no longer."""
    if not path.exists():
        return
    if not force:
        raise BenchError(f"{path} exists: choose another file, or replace it with force=True")
    load(path)


def store(record: dict[str, Any], path: Path) -> None:
    """Write the record. Raises BenchError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, as_json(record) + "\n")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}") from error


def as_json(record: dict[str, Any]) -> str:
    """The record as JSON, which has no NaN and no infinity: what is not a number is null."""

    def told(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: told(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [told(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(told(record), indent=1, allow_nan=False)


def load(path: Path) -> dict[str, Any]:
    """Read a record. Raises BenchError where the file is none that this version can read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BenchError(f"cannot read {path}: {reason}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BenchError(f"{path} is no result of batchnorm bench")
    if type(record.get("schema")) is not int or not 1 <= record["schema"] <= SCHEMA:
        raise BenchError(f"{path} has schema {record.get('schema')}; this batchnorm reads up to {SCHEMA}: upgrade it")
    return record


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
