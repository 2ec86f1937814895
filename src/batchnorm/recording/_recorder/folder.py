"""The folder of a Run that is being recorded: made once, by one process, and locked against every other writer."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from batchnorm.runs.history import KIND
from batchnorm.runs.provenance import provenance
from batchnorm.runs.run import Run, RunError


class Place(NamedTuple):
    """Which process this is, of how many that record together."""

    rank: int
    processes: int


def place() -> Place:
    """By torch.distributed, where it is used."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Place(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return Place(0, 1)


def default_path() -> Path:
    """A folder in runs/, named after the time."""
    return Path("runs") / f"watch-{datetime.now():%Y%m%d-%H%M%S}"


class _Lock(FileLock):
    """Only the process that made it releases it: older versions of filelock do that whenever a lock is deleted."""

    process: int | None = None

    def release(self, force: bool = False) -> None:
        if self.process in (None, os.getpid()):
            super().release(force)


class Claim:
    """A folder that this process may write to: its path, what run.json says, and the lock."""

    def __init__(self, path: Path, info: dict[str, Any], lock: FileLock) -> None:
        self.path, self.info = path, info
        self._lock, self._process = lock, os.getpid()
        self._file = _identity(lock)

    def release(self) -> None:
        """Unlock the folder, and leave no lock file of this recording in it.

        The folder may have been removed and be locked by another recording by now, whose file must stay. In a forked
        child the lock is the parent's.
        """
        if self._process != os.getpid():
            return
        if _identity(self._lock) == self._file:
            with suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def claim(path: Path, here: Place, *, force: bool, new: bool, **about: Any) -> Claim:
    """Make the Run, by process 0 while the others wait, and lock the folder; if `new`, in a folder that is not there.

    If `new` and there is such a folder, a number is added to its name.

    Raises RunError in every process where the folder holds a Run, is being recorded, or cannot be written.
    """
    answer: list[Any] = [None, None]
    claimed = None
    if here.rank == 0:
        try:
            claimed = _made(_numbered(path) if new else path, force=force, processes=here.processes, **about)
            answer = [None, claimed.path]
        except RunError as error:
            answer = [str(error), None]
    if here.processes > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    problem, path = answer
    if problem is not None:
        raise RunError(problem)
    return Claim(path, Run.open(path).info, _locked(path, here.rank)) if claimed is None else claimed


def _numbered(path: Path) -> Path:
    """Make the folder `path`, or `path`-2, ...: the first that is not there, even if others look for one now."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            made = path if number == 1 else path.with_name(f"{path.name}-{number}")
            with suppress(FileExistsError):
                made.mkdir()
                return made
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror or error}") from error
    raise AssertionError("count ends")


def _made(path: Path, *, force: bool, **about: Any) -> Claim:
    Run.check_vacant(path, force=force)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror or error}") from error
    lock = _locked(path, 0)
    try:
        origin = {key: value for key, value in provenance([]).items() if key != "command"}
        return Claim(path, Run.create(path, KIND, force=force, **about, **origin).info, lock)
    except BaseException:
        lock.release()
        raise


def _identity(lock: FileLock) -> tuple[int, int] | None:
    """Which file is at the lock's path now: while a lock is held, no other file can get the number of its own."""
    try:
        found = os.stat(lock.lock_file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _locked(path: Path, rank: int) -> FileLock:
    lock = _Lock(path / (f"writer-r{rank}.lock" if rank else "writer.lock"), thread_local=False)
    lock.process = os.getpid()
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunError(f"{path} is being recorded by another process: choose another folder") from None
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror or error}") from error
    return lock
