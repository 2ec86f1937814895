"""Let glibc keep freed memory, in the running process: CPU training then pays no page faults for every large tensor.

glibc returns freed blocks above a threshold to the system at once, and maps new pages for the next tensor, which the
kernel fills with zeros. `mallopt` changes the thresholds of the process (man page mallopt(3)). docs/explanation has
measurements.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from dataclasses import dataclass

from batchnorm.records import Record

__all__ = ["FreedMemory", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP = 1 << 30  # bytes; mallopt takes an int of 32 bits
_STATIC = 128 << 10  # bytes, both of glibc's static defaults


@dataclass(frozen=True, slots=True, repr=False)
class FreedMemory(Record):
    """What `keep_freed_memory` did.

    Attributes:
        kept: whether the process keeps freed memory from now on.
        done: whether the thresholds were set.
        what: what was done, or why nothing was, in words.
    """

    kept: bool
    done: bool
    what: str

    def __str__(self) -> str:
        return self.what


def keep_freed_memory(keep: bool = True) -> FreedMemory:
    """Let this process keep the memory of freed tensors for the next ones.

    CPU training under glibc gains by it. Blocks of up to 1 GiB then come from the heap, whose top is returned to the
    system only when 1 GiB of it is free. Tensors that exist are not affected. The process keeps its largest size, which
    other processes cannot use. Environment variables, set before the start, do the same
    (docs/explanation/allocator.md). Off by default.

    Args:
        keep: True sets both thresholds to 1 GiB. False sets them to glibc's static defaults, 128 KiB; glibc's own
            adjustment of them, which a process begins with, stays off.

    Returns:
        What was done. Where there is no glibc, nothing is, and the record says so.

    Raises TypeError if `keep` is not a bool.
    """
    if not isinstance(keep, bool):
        raise TypeError(f"keep must be True or False, got {type(keep).__name__}")
    function = _mallopt()
    if function is None:
        return FreedMemory(False, False, "nothing changed: mallopt is glibc's, and this process runs without glibc")
    size = _KEEP if keep else _STATIC
    if not (function(_M_MMAP_THRESHOLD, size) and function(_M_TRIM_THRESHOLD, size)):
        return FreedMemory(False, False, "nothing changed: glibc refused the thresholds")
    if keep:
        what = "glibc keeps freed memory: blocks up to 1 GiB come from the heap, which returns only more than 1 GiB"
    else:
        what = "glibc returns freed blocks above 128 KiB at once: its static defaults, which it no longer adjusts"
    return FreedMemory(keep, True, what)


def _mallopt() -> ctypes._NamedFuncPointer | None:
    """mallopt(parameter, value) of glibc; None elsewhere."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return None
