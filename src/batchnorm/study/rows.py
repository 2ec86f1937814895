"""Rows on their way into a Run's tables: gathered in memory, written as Parquet parts now and then."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from batchnorm.runs.run import Run

SECONDS_BETWEEN_PARTS = 20.0
_TYPES = {"seed": pa.int32(), "step": pa.int64(), "unit": pa.int32(), "batch": pa.int32()}


class Rows:
    """Collects blocks of rows; a killed process loses at most the last SECONDS_BETWEEN_PARTS of them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._blocks: dict[str, list[pa.Table]] = defaultdict(list)
        self._written = time.monotonic()

    def add(self, table: str, key: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        """A block of rows: single values of `key` and `columns` stand for all rows, arrays give one value a row."""
        values = {**key, **columns}
        length = max(np.size(value) for value in values.values())
        arrays = {name: _column(name, value, length, name in columns) for name, value in values.items()}
        self._blocks[table].append(pa.table(arrays))

    def flush_now_and_then(self) -> None:
        """Write what has gathered if the last part is old enough."""
        if time.monotonic() - self._written > SECONDS_BETWEEN_PARTS:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered, one part a table."""
        for table, blocks in self._blocks.items():
            self.run.append(table, pa.concat_tables(blocks, promote_options="default").combine_chunks())
        self._blocks.clear()
        self._written = time.monotonic()


def _column(name: str, value: Any, length: int, measured: bool) -> pa.Array:
    if isinstance(value, str):
        return pa.array([value] * length).dictionary_encode()
    if isinstance(value, np.ndarray) and value.dtype.kind == "U":
        return pa.array(value.tolist()).dictionary_encode()
    kind = pa.float64() if measured else _TYPES[name]
    return pa.array(np.broadcast_to(np.asarray(value), (length,)), kind)
