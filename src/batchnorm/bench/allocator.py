"""One allocation policy for both sides. glibc gives large blocks back to the system at once and maps them anew.

Each call of a large operator then pays for fresh pages, which can cost more than the operator, and whoever allocates
less wins by that alone. `tuned` keeps freed memory in the process, as a training run's caching allocator or an
LD_PRELOADed jemalloc would; `default` leaves everything as the system has it. glibc reads its settings when a process
starts, so `tuned` starts the program anew.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping

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
