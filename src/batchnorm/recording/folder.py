"""The folder of a Run in the making: made once, by one process, and held against every other writer."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from batchnorm.record.history import KIND
from batchnorm.record.provenance import provenance
from batchnorm.record.run import Run, RunError


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
    """A new folder in runs/, named after the time."""
    stem = f"watch-{datetime.now():%Y%m%d-%H%M%S}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(path for name in names if not (path := Path("runs") / name).exists())


def claim(path: Path, here: Place, *, force: bool, **about: Any) -> tuple[FileLock, dict[str, Any]]:
    """Make the Run, by process 0 while the others wait, and hold the folder; the lock and what run.json says.

    Raises RunError in every process where the folder holds a Run, is being recorded, or cannot be written.
    """
    problem: list[Any] = [None]
    claimed = None
    if here.rank == 0:
        try:
            claimed = _made(path, force=force, processes=here.processes, **about)
        except RunError as error:
            problem = [str(error)]
    if here.processes > 1:
        torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise RunError(problem[0])
    return (_locked(path, here.rank), Run.open(path).info) if claimed is None else claimed


def release(lock: FileLock) -> None:
    """Let go of the folder, and leave no lock in it."""
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _made(path: Path, *, force: bool, **about: Any) -> tuple[FileLock, dict[str, Any]]:
    Run.check_vacant(path, force=force)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror or error}") from error
    lock = _locked(path, 0)
    try:
        origin = {key: value for key, value in provenance([]).items() if key != "command"}
        return lock, Run.create(path, KIND, force=force, **about, **origin).info
    except BaseException:
        lock.release()
        raise


def _locked(path: Path, rank: int) -> FileLock:
    lock = FileLock(path / (f"writer-r{rank}.lock" if rank else "writer.lock"), blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{path} is being recorded by another process: choose another folder") from None
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror or error}") from error
    return lock
