"""What is recorded, onto the disk now and then; whatever happens there, the training goes on.

What was recorded and not yet written is lost when the process is killed: at most the last `AGE` seconds, or the last
`SHARE` of the run's time where that is more (so that the parts of a long run stay few), or `SIZE` bytes. What cannot be
written is kept and tried again with the next part, as far as `HELD` bytes go.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchnorm.record.history import MEASURED, UNITS
from batchnorm.record.run import Run, RunError

AGE = 20.0
SHARE = 0.01
SIZE = 32 * 2**20
HELD = 128 * 2**20

_WIDE = frozenset({"count", "energy", "diverted"})
_FAILURES = (RunError, OSError, pa.ArrowException, MemoryError)


class Writer:
    """Buffers of rows, and the parts that they become. Several threads may hand rows over."""

    def __init__(self, run: Run, rank: int, layers: Sequence[tuple[str, int]]) -> None:
        self.errors: list[str] = []
        self._run, self._rank = run, rank
        self._lock = threading.RLock()
        self._snapshots: list[tuple[int, dict[str, NDArray[Any]]]] = []
        self._rows: dict[str, list[tuple[Any, ...]]] = {"log": [], "steps": []}
        self._tables: dict[str, list[pa.Table]] = {}
        self._started = self._written = time.monotonic()
        self._dropped = 0
        names = [name.encode("utf-8", "replace").decode() for name, _ in layers]
        codes = np.repeat(np.arange(len(layers), dtype=np.int32), [units for _, units in layers])
        self._layer_codes, self._layer_names = codes, pa.array(names, pa.string())
        self._unit = np.concatenate([np.arange(units, dtype=np.int32) for _, units in layers])

    def snapshot(self, step: int, columns: Mapping[str, NDArray[np.float64]]) -> None:
        """One recorded step of all units."""
        kept = {name: columns[name] if name in _WIDE else _narrow(columns[name]) for name in MEASURED}
        with self._lock:
            self._snapshots.append((step, kept))
            self._rows["steps"].append((step, time.monotonic() - self._started))

    def log(self, step: int, name: str, value: Any) -> None:
        """A number, or a tensor of one that is read when it is written."""
        with self._lock:
            self._rows["log"].append((step, name, value))

    def table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Rows of a table of their own."""
        with self._lock:
            self._tables.setdefault(name, []).append(pa.table(dict(columns)))

    def layer_column(self, names: Sequence[str]) -> pa.Array:
        """Names of layers, a row each, as every table has them."""
        return pa.array([name.encode("utf-8", "replace").decode() for name in names], pa.string()).dictionary_encode()

    def flush_now_and_then(self) -> None:
        """Write if what has gathered is old enough, or large."""
        now = time.monotonic()
        if now - self._written > max(AGE, SHARE * (now - self._started)) or self._bytes() > SIZE:
            self.flush()

    def flush(self) -> bool:
        """Write all that has gathered. False, with one warning ever, where it cannot be written."""
        with self._lock:
            self._written = time.monotonic()
            try:
                self._write()
            except _FAILURES as error:
                self.failed(error)
                self._forget_the_oldest()
                return False
            return True

    def failed(self, error: BaseException) -> None:
        """Something went wrong in recording: told once, and noted in the Run where that can still be written."""
        text = (str(error) or type(error).__name__).splitlines()[0]
        if text in self.errors:
            return
        if not self.errors:
            warnings.warn(
                f"batchnorm.watch cannot record, the training goes on without: {text}", RuntimeWarning, stacklevel=2
            )
        self.errors.append(text)
        if self._rank == 0:
            with suppress(*_FAILURES):
                self._run.note(errors=self.errors)

    def _write(self) -> None:
        if not (self._run.path / "run.json").is_file():
            raise RunError(f"{self._run.path} was removed while it was being recorded: choose a folder that stays")
        if self._snapshots:
            self._run.append(UNITS, self._units(), self._rank)
            self._snapshots.clear()
        for name, rows in self._rows.items():
            if rows:
                self._run.append(name, _steps(rows) if name == "steps" else _log(rows), self._rank)
                rows.clear()
        for name, blocks in self._tables.items():
            if blocks:
                whole = pa.concat_tables(blocks, promote_options="default").unify_dictionaries()
                self._run.append(name, whole, self._rank)
                blocks.clear()

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
        return len(self._snapshots) * len(self._unit) * 4 * (len(MEASURED) + len(_WIDE))

    def _forget_the_oldest(self) -> None:
        while self._snapshots and self._bytes() > HELD:
            self._snapshots.pop(0)
        for rows in self._rows.values():
            del rows[: max(0, len(rows) - 1_000_000)]


@np.errstate(over="ignore")
def _narrow(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def _steps(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    steps, seconds = zip(*rows, strict=True)
    return pa.table({"step": pa.array(steps, pa.int64()), "seconds": pa.array(seconds, pa.float64())})


def _log(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    steps, names, values = zip(*rows, strict=True)
    texts = [name.encode("utf-8", "replace").decode() for name in names]
    return pa.table(
        {
            "step": pa.array(steps, pa.int64()),
            "name": pa.array(texts, pa.string()).dictionary_encode(),
            "value": pa.array([float(value) for value in values], pa.float64()),
        }
    )
