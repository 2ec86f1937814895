"""The stored result: one JSON file with every number and its provenance. Names no user and no host.

    format, schema        "batchnorm-bench", 2
    status                running, complete, interrupted or failed
    date, command         UTC, to the second; as typed, without the place of the file
    machine               processor, cores, caches, the L2 as measured, memory, system, huge pages; the GPU where one is
                          measured
    versions, git         of the packages; the checkout's commit and whether it had changes, or null
    allocator             the policy (see `active_policy`); `environment` has the variables that bear on speed
    settings, notes       the options; what is missing and why
    results               one entry per case: case, gate, floor, contenders, ratios; `rotated`, the number of copies of
                          its tensors; in `warm` the times with one copy, where the caches may keep it
    models                one entry per network and layout (see `models.measure`)
    memory                one entry per network (see `memory.measure`)

Times are seconds, sizes bytes. A case that failed its checks has errors instead of times. In schema 1 all times on a
CPU are warm.
"""

from __future__ import annotations

import json
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
from batchnorm.kernels.cpu import system
from batchnorm.kernels.cpu.machine import facts
from batchnorm.report.terminal import json_text
from batchnorm.runs.run import numbered, provenance, write_text_atomically

# glibc returns large blocks to the system at once and maps them again. Each call of a large operator then pays for new
# pages, which can cost more than the operator, and the side that allocates less wins by that alone. `tuned` keeps freed
# memory in the process, as a caching allocator or an LD_PRELOADed jemalloc would; `default` changes nothing. glibc
# reads its settings when a process starts, so `tuned` restarts the program.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
POLICIES = ("tuned", "default")


def active_policy(environment: Mapping[str, str] = os.environ) -> str:
    """The policy that this process runs under: 'tuned', 'default', or 'set' where MALLOC_ variables say otherwise."""
    if not has_glibc():
        return "default"
    if all(environment.get(name) == value for name, value in TUNED.items()):
        return "tuned"
    return "set" if any(name.startswith("MALLOC_") for name in environment) else "default"


def has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def restart_command(
    policy: str, environment: Mapping[str, str] = os.environ
) -> tuple[list[str], dict[str, str]] | None:
    """The arguments and environment that restart this program under `policy`; None if it already runs under it."""
    if policy != "tuned" or not has_glibc() or active_policy(environment) == "tuned":
        return None
    return [sys.executable, *sys.orig_argv[1:]], {**environment, **TUNED}


def restart_with_policy(policy: str) -> None:
    """Restart this program under `policy`; returns only if it already runs under it."""
    command = restart_command(policy)
    if command is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0][0], *command)  # the same process, so signals, exit status and terminal keep working


FORMAT = "batchnorm-bench"
SCHEMA = 2
_ALSO = ("torch", "numpy", "llvmlite", "jax", "jaxlib", "transformers", "triton")
_BEARS_ON_SPEED = re.compile(r"(MALLOC|OMP|GOMP|KMP|MKL|TBB|XLA|DNNL|ONEDNN|TORCH|ATEN|BATCHNORM)_.*")
_ALSO_BEARS = ("GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class BenchError(Exception):
    """Something cannot be measured, read or stored. The message is one line and says what to do."""


def begin(arguments: Sequence[str], settings: dict[str, Any], gpu: dict[str, Any] | None = None) -> dict[str, Any]:
    """A record without results; `gpu` describes the GPU that is measured."""
    origin = provenance(without_output_options(arguments), ("batchnorm", *_ALSO))
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "status": "running",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": origin["command"],
        "machine": {**origin["machine"], **machine(), **({} if gpu is None else {"gpu": gpu})},
        "versions": origin["versions"] | {"batchnorm": batchnorm.__version__},
        "git": git(),
        "allocator": active_policy(),
        "environment": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if _BEARS_ON_SPEED.fullmatch(name) or name in _ALSO_BEARS
        },
        "settings": settings,
        "notes": [],
        "results": [],
        "models": [],
        "memory": [],
    }


def without_output_options(arguments: Sequence[str]) -> list[str]:
    """The arguments without --out, --html and --force: the first two would name the user's folders."""
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument in ("--out", "--html"):
            next(remaining, None)
        elif argument != "--force" and not argument.startswith(("--out=", "--html=")):
            others.append(argument)
    return others


def machine() -> dict[str, Any]:
    """Caches in bytes by name, memory in bytes, the system, and the kernel's policy on huge pages where it has one.

    "l2_bytes" is the L2 of one core as measured: on a virtual machine the system may report a different one.
    """
    memory = None
    with suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chosen = re.search(r"\[(\w+)\]", system.read_text(_HUGE_PAGES))
    return {
        "caches": system.caches(),
        "l2_bytes": _measured_l2(),
        "memory": memory,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "huge_pages": chosen[1] if chosen else None,
    }


def _measured_l2() -> int:
    try:
        return facts().l2_bytes
    except ValueError as error:  # a variable that cannot be parsed
        raise BenchError(str(error)) from error


def second_level(machine: dict[str, Any]) -> int:
    """Bytes of the L2: of one core as measured, or of the GPU."""
    return int(machine["gpu"]["L2"] if "gpu" in machine else machine["l2_bytes"])


def last_level(machine: dict[str, Any]) -> int:
    """Bytes of the last-level cache; of the L2 on a GPU."""
    return int(machine["gpu"]["L2"]) if "gpu" in machine else system.last_level(machine["caches"])


def git() -> dict[str, Any] | None:
    """The commit of the checkout that holds this package, and whether its files differ from it; None outside one."""
    home = Path(batchnorm.__file__)
    if _git(home.parent, "ls-files", "--error-unmatch", home.name) is None:
        return None
    commit = _git(home.parent, "rev-parse", "--short=12", "HEAD")
    changes = _git(home.parent, "status", "--porcelain")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def default_path(record: dict[str, Any], folder: Path | None = None) -> Path:
    """The default file: in benchmarks/ of the checkout if the current folder is in it, else in the current folder."""
    here = Path.cwd() if folder is None else folder
    date = record["date"][:10]
    top = _git(here, "rev-parse", "--show-toplevel")
    ours = top is not None and Path(batchnorm.__file__).is_relative_to(top)
    if record["git"] and ours and top is not None and (Path(top) / "benchmarks").is_dir():
        machine = record["machine"]
        name = machine["gpu"]["name"] if "gpu" in machine else f"{machine['processor']} {machine['cores']}"
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        commit = record["git"]["commit"] + ("-dirty" if record["git"]["dirty"] else "")
        first = Path(top) / "benchmarks" / f"{date}-{stem}-{commit}.json"
    else:
        first = here / f"batchnorm-bench-{date}.json"
    return next(path for path in numbered(first) if not path.exists())


def check_vacant(path: Path, *, force: bool) -> None:
    """Raise BenchError if the file exists. With `force`, only if it is not a file of results."""
    if not path.exists():
        return
    if not force:
        raise BenchError(f"{path} exists: choose another file, or replace it with force=True")
    load(path)


def store(record: dict[str, Any], path: Path) -> None:
    """Write the record, or raise BenchError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json_text(record, indent=1) + "\n")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a record. Raises BenchError if this version cannot read the file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BenchError(f"cannot read {path}: {reason}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BenchError(f"{path} is not a result of batchnorm bench")
    if type(record.get("schema")) is not int or not 1 <= record["schema"] <= SCHEMA:
        raise BenchError(f"{path} has schema {record.get('schema')}; this batchnorm reads up to {SCHEMA}: upgrade it")
    if "threads" not in record.get("settings", {}) or "machine" not in record:
        raise BenchError(f"{path} holds no times: it is the result of another tool")
    record["models"] = [_with_contenders(model) for model in record["models"]]
    record.setdefault("memory", [])
    return record


def _with_contenders(model: dict[str, Any]) -> dict[str, Any]:
    """A network's entry in the present form. Up to batchnorm 0.2 its batches were images and its contender was ours."""
    if "ratios" in model:
        return model
    loss = model["loss"]
    why = {} if loss["agree"] else {"ours": "its losses differ"}
    return model | {
        "shape": [model["batch"], 3, model["side"], model["side"]],
        "dtype": model.get("dtype", "float32"),
        "ratios": {} if why else {"ours": model["ratio"]},
        "excluded": why,
        "gain_share": None,
        "loss": loss | {"difference": {"ours": loss["difference"]}, "agree": {"ours": loss["agree"]}},
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git; None if it fails or is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
