"""Run the tiles of a job on PyTorch's own threads, or on this thread alone.

PyTorch's CPU build includes an OpenMP runtime with a team of threads. Jobs use the same team, so that no two pools
compete for the cores. Several Python threads may run jobs at once; each gets a team. A team does not survive fork():
in a forked child this thread works alone, with the same result.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

_WORK = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_forked = False


def run(work: int, job: int, threads: int) -> None:
    """Call the machine code at `work` with the job's address, on up to this number of threads."""
    if threads > 1 and not _forked:
        parallel = parallel_function()
        if parallel is not None:
            parallel(work, job, threads, 0)
            return
    _alone(work)(job)


def can_share() -> bool:
    """Whether a job can run on more than this thread."""
    return parallel_function() is not None


def is_forked() -> bool:
    """Whether this process was forked, so that this thread works alone."""
    return _forked


@cache
def yield_address() -> int:
    """The address of sched_yield(), with which a waiting thread gives up the processor; 0 without one."""
    try:
        function = ctypes.CDLL(None).sched_yield
    except (OSError, AttributeError, TypeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def number_address() -> int:
    """The address of omp_get_thread_num() of the OpenMP runtime; 0 without one."""
    library = _runtime()
    return 0 if library is None else ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value or 0


@cache
def _alone(work: int) -> Any:
    return _WORK(work)


@cache
def parallel_function() -> Any:
    """GOMP_parallel(work, data, threads, flags) of the OpenMP runtime in PyTorch's folder, or None."""
    library = _runtime()
    if library is None:
        return None
    parallel = library.GOMP_parallel
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


@cache
def _runtime() -> ctypes.CDLL | None:
    """The OpenMP runtime in PyTorch's folder, if it has GNU's entry points."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        try:
            library = ctypes.CDLL(str(path))
            library.GOMP_parallel, library.omp_get_thread_num  # noqa: B018 - raises where it is missing
        except (OSError, AttributeError):
            continue
        return library
    return None


def _in_forked_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
