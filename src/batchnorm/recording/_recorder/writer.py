"""Write recorded rows to the disk from time to time; errors there never stop the training.

One process creates the Run's folder and locks it against other writers.

A killed process loses the rows that are not written yet: at most those of the last `AGE` seconds, or of the last
`SHARE` of the run's time if that is longer (a long run then has few parts), or `SIZE` bytes. Rows that cannot be
written stay in memory, up to `HELD` bytes, and are tried again after a pause. It doubles from `PAUSE` to
`LONGEST_PAUSE` seconds with each failure, and is longer if failing would take more than `SHARE` of the time.
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
    """Buffers rows and writes them as parts of tables. Several threads may add rows."""

    def __init__(self, run: Run, rank: int, layers: Sequence[tuple[str, int]]) -> None:
        self.errors: list[str] = []
        """Distinct error messages, at most `_MOST_ERRORS`."""
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
        """Add a recorded step of all units."""
        arrays = {name: columns[name] if name in _WIDE else _narrow(columns[name]) for name in MEASURED}
        with self._lock:
            self._snapshots.append((step, arrays))
            self._rows["steps"].append((step, time.monotonic() - self.started))
            self._drop_oldest()

    def log(self, step: int, name: str, value: Any) -> None:
        """Add a number, or a tensor of one value that is read when the row is written."""
        with self._lock:
            self._rows["log"].append((step, name, value))
            self._drop_oldest()

    def table(self, name: str, step: int, layers: Sequence[str], columns: Mapping[str, Any]) -> None:
        """Add rows to another table; `layers` has the layer's name of each row."""
        key = {"step": np.full(len(layers), step, np.int64), "layer": _texts(layers).dictionary_encode()}
        with self._lock:
            self._tables.setdefault(name, []).append(pa.table(key | dict(columns)))
            self._drop_oldest()

    def flush_if_due(self) -> None:
        """Write if the rows are old or large enough, and the last failure is long enough ago."""
        now = time.monotonic()
        due = now - self._written > max(AGE, SHARE * (now - self.started)) or self._bytes() > SIZE
        if due and now >= self._retry:
            self.flush()

    def flush(self) -> None:
        """Write all rows; at the first failure of the run, warn."""
        with self._lock:
            start = self._written = time.monotonic()
            try:
                self._write()
            except Exception as error:
                now = time.monotonic()
                self._pause = max(PAUSE, min(2 * self._pause, LONGEST_PAUSE), (now - start) / SHARE)
                self._retry = now + self._pause
                self.failed(error)
            else:
                self._pause, self._retry = 0.0, self._written

    def failed(self, error: BaseException) -> None:
        """Note an error in run.json if that can be written; warn the first time."""
        if self._process != os.getpid():  # a forked child cannot write: the Run is its parent's
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
                self._run.append(name, self._columns(name, rows), self._rank)
                rows.clear()
        for name, blocks in self._tables.items():
            if blocks:
                table = pa.concat_tables(blocks, promote_options="default").unify_dictionaries()
                self._run.append(name, table, self._rank)
                blocks.clear()

    def _columns(self, table: str, rows: list[tuple[Any, ...]]) -> dict[str, pa.Array]:
        if table == "log":  # tensors are read once, even if the disk is full
            rows[:] = [(step, name, self._number(name, value)) for step, name, value in rows]
        steps, *names, values = zip(*rows, strict=True)
        columns = {"step": pa.array(steps, pa.int64())}
        columns |= {"name": _texts(names[0]).dictionary_encode()} if names else {}
        return columns | {"value" if names else "seconds": pa.array(values, pa.float64())}

    def _number(self, name: str, value: Any) -> float:
        """NaN if the device of a logged tensor has failed, so that other rows are not lost."""
        try:
            return float(value)
        except Exception as error:
            self.failed(RunError(f"{name} could not be read from its device: {type(error).__name__}: {error}"))
            return math.nan

    def _units(self) -> pa.Table:
        repeats = len(self._snapshots)
        codes = pa.array(np.tile(self._layer_codes, repeats))
        columns: dict[str, Any] = {
            "step": np.repeat(np.array([step for step, _ in self._snapshots], np.int64), len(self._unit)),
            "layer": pa.DictionaryArray.from_arrays(codes, self._layer_names),
            "unit": np.tile(self._unit, repeats),
        }
        for name in MEASURED:
            columns[name] = np.concatenate([arrays[name] for _, arrays in self._snapshots])
        return pa.table(columns)

    def _bytes(self) -> int:
        snapshots = len(self._snapshots) * len(self._unit) * 4 * (len(MEASURED) + len(_WIDE))
        return snapshots + sum(int(block.nbytes) for blocks in self._tables.values() for block in blocks)

    def _drop_oldest(self) -> None:
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
    """Validate a logged value: a float, or a copy of a one-value tensor on a device that log must not wait for."""
    try:
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.is_complex() or value.is_meta:
                raise TypeError(f"its shape is {tuple(value.shape)} and is {value.dtype} on {value.device}")
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
    """Validate a step: an integer that fits in 64 bits."""
    try:
        return int(np.int64(int(step)))
    except Exception as error:
        raise TypeError(f"run.log takes a 64-bit integer for step, got {type(step).__name__}: {error}") from error


def rank_and_size() -> tuple[int, int]:
    """Those of torch.distributed if it is initialized, else 0 and 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def default_path() -> Path:
    """A folder in runs/ with the time in its name."""
    return Path("runs") / f"watch-{datetime.now():%Y%m%d-%H%M%S}"


class Lock(FileLock):
    """The lock of a Run's folder against other writers; `_lock_folder` acquires it."""

    process: int | None = None
    file: tuple[int, int] | None = None

    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the file at the lock's path. While a lock is open, no other file can get its inode."""
        try:
            status = os.stat(self.lock_file)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def release(self, force: bool = False) -> None:
        """Unlock the folder and remove the lock file of this recording.

        If the folder was removed and another recording has locked it since, the other's file stays. In a forked child
        this does nothing: the lock is the parent's.
        """
        if self.process not in (None, os.getpid()):
            return
        if self.is_locked and self.identity() == self.file:
            with suppress(OSError):
                Path(self.lock_file).unlink(missing_ok=True)
        super().release(force)


def claim(path: Path, rank: int, *, processes: int, force: bool, new: bool, **info: Any) -> tuple[Run, Lock]:
    """Create the Run in process 0 while the others wait, and lock its folder.

    If `new`, the folder must be a new one: if `path` exists, a number is added to its name.

    Raises RunError in every process if the folder has a Run, is being recorded, or cannot be written.
    """
    message: list[Any] = [None, None]
    created = None
    if rank == 0:
        try:
            created = _create(_new_folder(path) if new else path, force=force, processes=processes, **info)
            message = [None, created[0].path]
        except RunError as error:
            message = [str(error), None]
    if processes > 1:
        torch.distributed.broadcast_object_list(message, src=0)
    problem, path = message
    if problem is not None:
        raise RunError(problem)
    return created or (Run.open(path), _lock_folder(path, rank))


def _new_folder(path: Path) -> Path:
    """Create `path`, or `path`-2 and so on if it exists; safe when other processes do the same."""
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in numbered(path):
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    raise AssertionError("numbered() never ends")


def _create(path: Path, *, force: bool, **info: Any) -> tuple[Run, Lock]:
    Run.check_vacant(path, force=force)
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = _lock_folder(path, 0)
    try:
        origin = {key: value for key, value in provenance([]).items() if key != "command"}
        return Run.create(path, KIND, force=force, **info, **origin), lock
    except BaseException:
        lock.release()
        raise


def _lock_folder(path: Path, rank: int) -> Lock:
    lock = Lock(path / (f"writer-r{rank}.lock" if rank else "writer.lock"), thread_local=False)
    lock.process = os.getpid()
    with writing_to(path):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RunError(f"{path} is being recorded by another process: choose another folder") from None
    lock.file = lock.identity()
    return lock
