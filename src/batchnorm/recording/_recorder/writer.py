"""Writes what is recorded to the disk now and then; whatever happens there, the training goes on.

The Run's folder is made once, by one process, and locked against every other writer.

What was recorded and not yet written is lost when the process is killed: at most the last `AGE` seconds, or the last
`SHARE` of the run's time where that is more (so that the parts of a long run stay few), or `SIZE` bytes. What cannot be
written is kept, as far as `HELD` bytes go, and tried again after a pause. It doubles from `PAUSE` seconds to
`LONGEST_PAUSE` with each failure, and is longer where failing would take more than `SHARE` of the time.
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.runs.history import KIND, MEASURED, UNITS
from batchnorm.runs.run import Run, RunError, numbered, provenance, writing_to

AGE = 20.0
SHARE = 0.01
SIZE = 32 * 2**20
HELD = 128 * 2**20
PAUSE = 1.0
LONGEST_PAUSE = 60.0
_MOST_ROWS = 1_000_000
_MOST_ERRORS = 20

_WIDE = frozenset({"count", "energy", "diverted"})


class Writer:
    """Buffers of rows, and the parts that they become. Several threads may add rows."""

    def __init__(self, run: Run, rank: int, layers: Sequence[tuple[str, int]]) -> None:
        self.errors: list[str] = []
        """What went wrong, each once and at most `_MOST_ERRORS`."""
        self._run, self._rank = run, rank
        self._lock, self._process = threading.RLock(), os.getpid()
        self.started = self._written = time.monotonic()
        self._snapshots: list[tuple[int, dict[str, NDArray[Any]]]] = []
        self._rows: dict[str, list[tuple[Any, ...]]] = {"log": [], "steps": []}
        self._tables: dict[str, list[pa.Table]] = {}
        self._pause, self._retry = 0.0, self.started
        self._layer_codes = np.repeat(np.arange(len(layers), dtype=np.int32), [units for _, units in layers])
        self._layer_names = _texts([name for name, _ in layers])
        self._unit = np.concatenate([np.arange(units, dtype=np.int32) for _, units in layers])

    def snapshot(self, step: int, columns: Mapping[str, NDArray[np.float64]]) -> None:
        """One recorded step of all units."""
        kept = {name: columns[name] if name in _WIDE else _narrow(columns[name]) for name in MEASURED}
        with self._lock:
            self._snapshots.append((step, kept))
            self._rows["steps"].append((step, time.monotonic() - self.started))
            self._forget_the_oldest()

    def log(self, step: int, name: str, value: Any) -> None:
        """A number, or a tensor of one that is read when it is written."""
        with self._lock:
            self._rows["log"].append((step, name, value))
            self._forget_the_oldest()

    def table(self, name: str, step: int, layers: Sequence[str], columns: Mapping[str, Any]) -> None:
        """Rows of another table: a layer's name and a value of each column in each row."""
        key = {"step": np.full(len(layers), step, np.int64), "layer": _texts(layers).dictionary_encode()}
        with self._lock:
            self._tables.setdefault(name, []).append(pa.table(key | dict(columns)))
            self._forget_the_oldest()

    def flush_now_and_then(self) -> None:
        """Write if what has gathered is old enough, or large, and the last failure long enough ago."""
        now = time.monotonic()
        due = now - self._written > max(AGE, SHARE * (now - self.started)) or self._bytes() > SIZE
        if due and now >= self._retry:
            self.flush()

    def flush(self) -> None:
        """Write all that has gathered; where it cannot be written, warn once ever."""
        with self._lock:
            began = self._written = time.monotonic()
            try:
                self._write()
            except Exception as error:
                now = time.monotonic()
                self._pause = max(PAUSE, min(2 * self._pause, LONGEST_PAUSE), (now - began) / SHARE)
                self._retry = now + self._pause
                self.failed(error)
            else:
                self._pause, self._retry = 0.0, self._written

    def failed(self, error: BaseException) -> None:
        """Recording failed: warn the first time, and note it in run.json where that can still be written."""
        if self._process != os.getpid():  # a forked child fails to write because the Run is its parent's
            return
        text = ((str(error) or type(error).__name__).splitlines() or [""])[0]
        if text in self.errors or len(self.errors) >= _MOST_ERRORS:
            return
        self.errors.append(text)
        if self._rank == 0:
            with suppress(Exception):
                self._run.note(errors=self.errors)
        if len(self.errors) == 1:
            warnings.warn(
                f"batchnorm.watch cannot record, the training goes on without: {text}", RuntimeWarning, stacklevel=2
            )

    def _write(self) -> None:
        self._run.check_still_there()
        if self._snapshots:
            self._run.append(UNITS, self._units(), self._rank)
            self._snapshots.clear()
        for name, rows in self._rows.items():
            if rows:
                self._run.append(name, self._steps(rows) if name == "steps" else self._log(rows), self._rank)
                rows.clear()
        for name, blocks in self._tables.items():
            if blocks:
                whole = pa.concat_tables(blocks, promote_options="default").unify_dictionaries()
                self._run.append(name, whole, self._rank)
                blocks.clear()

    def _log(self, rows: list[tuple[Any, ...]]) -> pa.Table:
        # Tensors are read once, even if the disk is full.
        rows[:] = [(step, name, self._number(name, value)) for step, name, value in rows]
        steps, names, values = zip(*rows, strict=True)
        columns = {"step": pa.array(steps, pa.int64()), "name": _texts(names).dictionary_encode()}
        return pa.table(columns | {"value": pa.array(values, pa.float64())})

    def _steps(self, rows: list[tuple[Any, ...]]) -> pa.Table:
        steps, seconds = zip(*rows, strict=True)
        return pa.table({"step": pa.array(steps, pa.int64()), "seconds": pa.array(seconds, pa.float64())})

    def _number(self, name: str, value: Any) -> float:
        """A device may fail after a tensor on it was logged: the other rows must not be lost with this one."""
        try:
            return float(value)
        except Exception as error:
            self.failed(RunError(f"{name} could not be read from its device: {type(error).__name__}: {error}"))
            return math.nan

    def _units(self) -> pa.Table:
        times = len(self._snapshots)
        codes = pa.array(np.tile(self._layer_codes, times))
        columns: dict[str, Any] = {
            "step": np.repeat(np.array([step for step, _ in self._snapshots], np.int64), len(self._unit)),
            "layer": pa.DictionaryArray.from_arrays(codes, self._layer_names),
            "unit": np.tile(self._unit, times),
        }
        for name in MEASURED:
            columns[name] = np.concatenate([kept[name] for _, kept in self._snapshots])
        return pa.table(columns)

    def _bytes(self) -> int:
        snapshots = len(self._snapshots) * len(self._unit) * 4 * (len(MEASURED) + len(_WIDE))
        return snapshots + sum(int(block.nbytes) for blocks in self._tables.values() for block in blocks)

    def _forget_the_oldest(self) -> None:
        while self._bytes() > HELD:
            oldest: list[Any] = self._snapshots or max(self._tables.values(), key=len)
            del oldest[0]
        for rows in self._rows.values():
            if len(rows) > _MOST_ROWS:
                del rows[: _MOST_ROWS // 8]


@np.errstate(over="ignore")
def _narrow(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def _texts(names: Sequence[str]) -> pa.Array:
    return pa.array([name.encode("utf-8", "replace").decode() for name in names], pa.string())


def number(name: str, value: Any) -> float | Tensor:
    """A number, or a copy of a tensor of one value on a device that must not be waited for."""
    try:
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.is_complex() or value.is_meta:
                raise TypeError(f"it has the shape {tuple(value.shape)} and is {value.dtype} on {value.device}")
            return float(value.detach()) if value.device.type == "cpu" else value.detach().clone()
        if isinstance(value, np.ndarray):
            value = value.item()
        if isinstance(value, str | complex | np.complexfloating) or not hasattr(type(value), "__float__"):
            raise TypeError("it is not real")
        return float(value)
    except Exception as error:
        kind = type(value).__name__
        raise TypeError(
            f"run.log takes numbers and tensors of one value, got {name} of type {kind}: {error}"
        ) from error


def step_number(step: Any) -> int:
    """The step, where it fits in 64 bits."""
    try:
        return int(np.int64(int(step)))
    except Exception as error:
        raise TypeError(f"run.log takes an integer of 64 bits for step, got {type(step).__name__}: {error}") from error


def place() -> tuple[int, int]:
    """The number of this process, and how many record together: by torch.distributed, where it is used."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def default_path() -> Path:
    """A folder in runs/, named after the time."""
    return Path("runs") / f"watch-{datetime.now():%Y%m%d-%H%M%S}"


class Lock(FileLock):
    """The lock of a Run's folder against other writers, once `_locked` has taken it."""

    process: int | None = None
    file: tuple[int, int] | None = None

    def identity(self) -> tuple[int, int] | None:
        """Which file is at the lock's path now: while a lock is held, no other file can get the number of its own."""
        try:
            found = os.stat(self.lock_file)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def release(self, force: bool = False) -> None:
        """Unlock the folder, and leave no lock file of this recording in it.

        The folder may have been removed and be locked by another recording by now, whose file must stay. In a forked
        child the lock is the parent's, also where it is deleted.
        """
        if self.process not in (None, os.getpid()):
            return
        if self.is_locked and self.identity() == self.file:
            with suppress(OSError):
                Path(self.lock_file).unlink(missing_ok=True)
        super().release(force)


def claim(path: Path, rank: int, *, processes: int, force: bool, new: bool, **about: Any) -> tuple[Run, Lock]:
    """Make the Run, by process 0 while the others wait, and lock the folder; if `new`, in a folder that is not there.

    If `new` and there is such a folder, a number is added to its name.

    Raises RunError in every process where the folder holds a Run, is being recorded, or cannot be written.
    """
    answer: list[Any] = [None, None]
    made = None
    if rank == 0:
        try:
            made = _made(_numbered(path) if new else path, force=force, processes=processes, **about)
            answer = [None, made[0].path]
        except RunError as error:
            answer = [str(error), None]
    if processes > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    problem, path = answer
    if problem is not None:
        raise RunError(problem)
    return made or (Run.open(path), _locked(path, rank))


def _numbered(path: Path) -> Path:
    """Make the folder `path`, or `path`-2, ...: the first that is not there, even if others look for one now."""
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for made in numbered(path):
            with suppress(FileExistsError):
                made.mkdir()
                return made
    raise AssertionError("the numbers do not end")


def _made(path: Path, *, force: bool, **about: Any) -> tuple[Run, Lock]:
    Run.check_vacant(path, force=force)
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = _locked(path, 0)
    try:
        origin = {key: value for key, value in provenance([]).items() if key != "command"}
        return Run.create(path, KIND, force=force, **about, **origin), lock
    except BaseException:
        lock.release()
        raise


def _locked(path: Path, rank: int) -> Lock:
    lock = Lock(path / (f"writer-r{rank}.lock" if rank else "writer.lock"), thread_local=False)
    lock.process = os.getpid()
    with writing_to(path):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RunError(f"{path} is being recorded by another process: choose another folder") from None
    lock.file = lock.identity()
    return lock
