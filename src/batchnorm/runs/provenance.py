"""Where a Run comes from: the command, the versions and the machine, as run.json keeps them. Names no user, no host."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(
    arguments: Sequence[str], packages: Sequence[str] = ("batchnorm", "torch", "numpy", "pyarrow")
) -> dict[str, Any]:
    """command (as typed after the program's name), versions of Python and the packages, and the machine."""
    return {
        "command": shlex.join(["batchnorm", *arguments]),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in packages if (found := _version(name))},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": _cores(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    """The cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
