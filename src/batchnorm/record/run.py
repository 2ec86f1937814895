"""A Run: what was measured, on disk, in a folder that any dataframe tool can read.

    RUN/
      run.json               what ran: kind, status, command, versions, machine, times, configuration, facts
      <table>-00001.parquet  a part of a table; a table is its parts in order
      report.html            the page made from it, if one was made

Each file is written whole under another name and then renamed, so a killed process loses at most what it had not yet
handed over. This module imports neither torch nor a plotting library: reports read a Run on a machine without them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = "batchnorm-run"
VERSION = 1
STATUSES = ("running", "complete", "interrupted", "failed")
_PART = re.compile(r"(?P<table>[a-z_]+)-\d{5}\.parquet")


class RunError(Exception):
    """A Run that cannot be made, read or written. The message is one line and says what to do."""


class Run:
    """A folder of measurements: `info` is its run.json, `table(name)` one of its tables.

    Made by `Run.create` or `Run.open`, never directly.
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info

    @classmethod
    def create(cls, path: str | os.PathLike[str], kind: str, *, force: bool = False, **info: Any) -> Self:
        """Start a Run in the folder `path`, made with its parents where missing.

        `info` (JSON values) joins the format, the kind and the start time in run.json.

        Raises RunError where the folder holds a Run and `force` is False, where it holds anything but a Run, or where
        it cannot be written. With `force`, only the files a Run consists of are removed.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "run.json").exists():
                old = cls.open(folder)
                if not force:
                    raise RunError(f"{folder} already holds a Run: choose another folder, or replace it with --force")
                old._remove_files()
            elif any(folder.iterdir()):
                raise RunError(f"{folder} is not empty and holds no Run: choose a new or empty folder")
            run = cls(folder, {"format": FORMAT, "version": VERSION, "kind": kind, "status": "running", **info})
            run.info["started"] = _now()
            run._write_info()
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {error.strerror or error}") from error
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read the Run in the folder `path`. Raises RunError where there is none that this version can read."""
        folder = Path(path)
        try:
            info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"no Run in {folder}: it has no run.json") from error
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"cannot read {folder / 'run.json'}: {error}") from error
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise RunError(f'{folder / "run.json"} does not describe a Run: no "format": "{FORMAT}" in it')
        version = info.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise RunError(f"{folder} is a Run of version {version}; this batchnorm reads up to {VERSION}: upgrade it")
        return cls(folder, info)

    def append(self, table: str, columns: Mapping[str, Any] | pa.Table) -> None:
        """Write one more part of `table`; `columns` are arrays of equal length by name. No rows, no part."""
        part = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        if part.num_rows == 0:
            return
        parts = self._parts(table)
        number = int(parts[-1].stem.rpartition("-")[2]) + 1 if parts else 1
        target = self.path / f"{table}-{number:05d}.parquet"
        if not _PART.fullmatch(target.name):
            raise ValueError(f"table names are lower-case letters and underscores, got {table!r}")
        temporary = target.with_suffix(".tmp")
        try:
            pq.write_table(part, temporary, compression="zstd")
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"cannot write {target}: {error.strerror or error}") from error

    def tables(self) -> list[str]:
        """The names of the tables that have at least one part."""
        return sorted({match["table"] for entry in self.path.iterdir() if (match := _PART.fullmatch(entry.name))})

    def table(self, name: str) -> pa.Table:
        """The parts of a table as one. Raises RunError where it has none or one of them is damaged."""
        parts = self._parts(name)
        if not parts:
            raise RunError(f"the Run {self.path} has no table {name!r}; it has: {', '.join(self.tables()) or 'none'}")
        read = []
        for part in parts:
            try:
                read.append(pq.ParquetFile(part).read())
            except (OSError, pa.ArrowException) as error:
                reason = str(error).splitlines()[0]
                raise RunError(
                    f"{part} is damaged and cannot be read ({reason}): remove it to go on without"
                ) from error
        return pa.concat_tables(read, promote_options="default")

    def note(self, **facts: Any) -> None:
        """Add to run.json, at once."""
        self.info.update(facts)
        self._write_info()

    def finish(self, status: str) -> None:
        """Say how it ended ('complete', 'interrupted' or 'failed') and when."""
        if status not in STATUSES[1:]:
            raise ValueError(f"status is one of {', '.join(STATUSES[1:])}, got {status!r}")
        self.note(status=status, ended=_now())

    def _parts(self, table: str) -> list[Path]:
        return sorted(self.path.glob(f"{table}-[0-9][0-9][0-9][0-9][0-9].parquet"))

    def _write_info(self) -> None:
        target = self.path / "run.json"
        temporary = target.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self.info, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(temporary, target)
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror or error}") from error

    def _remove_files(self) -> None:
        for entry in list(self.path.iterdir()):
            if _PART.fullmatch(entry.name) or entry.name in ("run.json", "report.html"):
                entry.unlink()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
