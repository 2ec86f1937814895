"""A Run: a folder of measurements that any dataframe tool can read.

    RUN/
      run.json                  kind, status, command, versions, machine, times, configuration, facts
      <table>-00001.parquet     a part of a table; a table is the concatenation of its parts
      <table>-r1-00001.parquet  a part that process 1 wrote; names without -r are of process 0
      report.html               the report, if one was rendered

Each file is written to a temporary file and then renamed, so a killed process loses only rows not written yet. This
module imports neither torch nor a plotting library: reports read Runs on machines without them. docs/run-format.md
defines the tables and their columns.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Self
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from batchnorm.importing import load_module
from batchnorm.runs import VIEWS

FORMAT = "batchnorm-run"
VERSION = 3
"""1: studies. 2: also training runs, with parts of several processes. 3: classes and angles in studies, and the last
step in training runs."""
STATUSES = ("running", "complete", "interrupted", "failed")
_NAME = re.compile(r"[a-z_]+")
_PART = re.compile(r"(?P<table>[a-z_]+)(-r(?P<rank>\d+))?-(?P<number>\d{5,})\.parquet")
_UNFINISHED = re.compile(r"run(\.json)?\.tmp|[a-z_]+(-r\d+)?-\d{5,}(\.parquet)?\.tmp")
_LEFTOVER = re.compile(r"run(\.json)?\.tmp|writer(-r\d+)?\.lock")
"""Files of a Run that was not completed, or is about to be created."""

Write = Callable[[Path], object]
"""Writes a file to a path."""


class RunError(Exception):
    """A Run cannot be created, read or written. The message is one line and says what to do."""


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Raise RunError instead of OSError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror or error}") from error


class Run:
    """A folder of measurements: `info` is its run.json, `table(name)` one of its tables.

    `Run(path)` opens the Run in the folder `path`; `Run.create` creates a new one.

    Args:
        path: the folder.
        info: the content of run.json, for code that creates a Run; by default it is read from the folder.

    Raises RunError if the folder has no Run that this version can read.
    """

    def __init__(self, path: str | os.PathLike[str], info: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.info: dict[str, Any] = _read_info(self.path) if info is None else info

    @classmethod
    def create(cls, path: str | os.PathLike[str], kind: str, *, force: bool = False, **info: Any) -> Self:
        """Create a Run in the folder `path`, which is created with its parents if missing.

        run.json gets `info` (JSON values) besides the format, the kind and the start time.

        Raises RunError if the folder has a Run and `force` is False, if it has other files, or if it cannot be written.
        With `force`, only the files of the old Run are removed.
        """
        folder = Path(path)
        cls.check_vacant(folder, force=force)
        head = {"format": FORMAT, "version": VERSION, "id": uuid4().hex, "kind": kind, "status": "running"}
        run = cls(folder, {**head, **info, "started": _now()})
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "run.json").exists():
                cls.open(folder)._remove_files()
            write_atomically(folder / "run.json", _json(run.info))
        return run

    @classmethod
    def check_vacant(cls, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Raise the RunError that `create` would raise for this `path` and `force`, without writing anything."""
        folder = Path(path)
        with writing_to(folder):
            if (folder / "run.json").exists():
                cls.open(folder)
                if not force:
                    raise RunError(f"{folder} already has a Run: choose another folder, or pass force=True")
            elif folder.exists() and not all(_LEFTOVER.fullmatch(entry.name) for entry in folder.iterdir()):
                raise RunError(f"{folder} is not empty and has no Run: choose a new or empty folder")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The same as `Run(path)`."""
        return cls(path)

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.info.get('kind')}, {self.info.get('status')}>"

    def _repr_html_(self) -> str:
        """In a notebook: the answer and a small table. Never raises."""
        html: str = resolve_name(VIEWS["card"])(self)
        return html

    def to_polars(self, table: str | None = None) -> Any:
        """A table as a polars DataFrame; by default `units`, for a watched training with every derived quantity.

        `table` names another table. If several processes wrote it, it has the rows of all and a column `rank`; the
        default table is merged. Raises RunError if the table is missing or damaged.
        """
        return load_module("polars").from_arrow(self._arrow(table))

    def to_pandas(self, table: str | None = None) -> Any:
        """A table as a pandas DataFrame; `table` and RunError as in `to_polars`."""
        load_module("pandas")
        return self._arrow(table).to_pandas()

    def _arrow(self, name: str | None) -> pa.Table:
        if name is None and self.info.get("kind") == "watch":
            frame: pa.Table = resolve_name(VIEWS["frame"])(self)
            return frame
        name = name or "units"
        ranks = self.ranks(name) or [0]
        parts = [self.table(name, rank) for rank in ranks]
        if len(ranks) == 1:
            return parts[0]
        numbers = [pa.array([rank] * len(part), pa.int32()) for rank, part in zip(ranks, parts, strict=True)]
        ranked = [part.append_column("rank", number) for part, number in zip(parts, numbers, strict=True)]
        return pa.concat_tables(ranked, promote_options="default").unify_dictionaries()

    def append(self, table: str, columns: Mapping[str, Any] | pa.Table, rank: int = 0) -> None:
        """Write a new part of `table` for process `rank`; `columns` are arrays of equal length by name.

        Without rows nothing is written. Raises RunError if the part cannot be written, or if the folder was removed or
        has another Run.
        """
        if not _NAME.fullmatch(table):
            raise ValueError(f"table names are lower-case letters and underscores, got {table!r}")
        part = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        if part.num_rows == 0:
            return
        self.check_still_there()
        number = 1 + max((number for *key, number, _ in self._parts() if key == [table, rank]), default=0)
        name = f"{table}{f'-r{rank}' if rank else ''}-{number:05d}.parquet"
        self._write(name, lambda temporary: _write_part(part, temporary))

    def tables(self) -> list[str]:
        """The names of the tables that have at least one part."""
        return sorted({table for table, *_ in self._parts()})

    def ranks(self, table: str) -> list[int]:
        """The processes that wrote parts of a table."""
        return sorted({rank for name, rank, *_ in self._parts() if name == table})

    def table(self, name: str, rank: int = 0, columns: Sequence[str] | None = None) -> pa.Table:
        """A table as pyarrow.Table: all parts that one process wrote, in order.

        Args:
            name: the table, one of `tables()`.
            rank: the number of the process.
            columns: the names of the columns to read; None for all.

        Raises RunError if the process wrote no such table, or if a part is damaged.
        """
        parts = [path for *key, _, path in self._parts() if key == [name, rank]]
        if not parts:
            raise RunError(f"the Run {self.path} has no table {name!r}; it has: {', '.join(self.tables()) or 'none'}")
        tables = []
        for part in parts:
            try:
                tables.append(pq.ParquetFile(part, page_checksum_verification=True).read(columns))
            except (OSError, pa.ArrowException) as error:
                reason = str(error).splitlines()[0]
                raise RunError(f"{part} is damaged ({reason}): remove it to read the rest") from error
        try:
            return pa.concat_tables(tables, promote_options="default")
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"the parts of table {name!r} in {self.path} do not fit together ({reason})") from error

    def note(self, **facts: Any) -> None:
        """Write `facts`, JSON values by name, into run.json at once.

        Raises TypeError or ValueError for values that JSON does not support (NaN included), without changing the Run;
        RunError as `append` does.
        """
        info = {**self.info, **facts}
        self.check_still_there()
        self._write("run.json", _json(info))
        self.info = info

    def finish(self, status: str) -> None:
        """Write the final status and the time into run.json.

        `status` is "complete", "interrupted" or "failed". Raises ValueError for another one, and RunError as `append`
        does.
        """
        if status not in STATUSES[1:]:
            raise ValueError(f"status is one of {', '.join(STATUSES[1:])}, got {status!r}")
        self.note(status=status, ended=_now())

    def _parts(self) -> list[tuple[str, int, int, Path]]:
        """Table, process, number and path of each part, in order."""
        matches = ((_PART.fullmatch(path.name), path) for path in self.path.iterdir())
        return sorted((m["table"], int(m["rank"] or 0), int(m["number"]), path) for m, path in matches if m)

    def check_still_there(self) -> None:
        """Raise RunError if the folder was removed, or has another Run now."""
        if not (self.path / "run.json").is_file():
            raise RunError(f"{self.path} was removed while it was being recorded: choose a folder that stays")
        if _read_info(self.path).get("id") != self.info.get("id"):
            raise RunError(
                f"{self.path} was replaced by another Run while it was being recorded: choose another folder"
            )

    def _write(self, name: str, write: Write) -> None:
        with writing_to(self.path / name):
            write_atomically(self.path / name, write, self.check_still_there)

    def _remove_files(self) -> None:
        """Remove the Run's files, run.json last: until then the folder is a Run that can be replaced."""
        for entry in list(self.path.iterdir()):
            if _PART.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name) or entry.name == "report.html":
                entry.unlink()
        (self.path / "run.json").unlink()


def _read_info(folder: Path) -> dict[str, Any]:
    """The content of run.json. Raises RunError if this version cannot read it."""
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"no Run in {folder}: it has no run.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {folder / 'run.json'}: {error}") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise RunError(f'{folder / "run.json"} does not describe a Run: no "format": "{FORMAT}" in it')
    number = info.get("version")
    if type(number) is not int or not 1 <= number <= VERSION:
        raise RunError(f"{folder} is a Run of version {number}; this batchnorm reads up to {VERSION}: upgrade it")
    return info


def _json(info: Mapping[str, Any]) -> Write:
    text = json.dumps(info, indent=2, allow_nan=False) + "\n"
    return lambda temporary: temporary.write_text(text, encoding="utf-8")


def _write_part(part: pa.Table, path: Path) -> None:
    """Write Parquet; measured numbers without a dictionary, which would take three times as long and save nothing.

    Their bytes are split into streams (exponents beside exponents), which compresses them better.
    """
    numbers = [field.name for field in part.schema if pa.types.is_floating(field.type)]
    others = [name for name in part.column_names if name not in numbers]
    pq.write_table(
        part,
        path,
        compression="lz4",
        use_dictionary=others,
        write_statistics=others,
        use_byte_stream_split=numbers,
        write_page_checksum=True,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- atomic files -----------------------------------------------------------------------------------------------------


def write_atomically(target: Path, write: Write, check: Callable[[], None] | None = None) -> None:
    """Write to a temporary file, then rename it to `target`: readers never see a partial file.

    `check` may raise before the rename if the file no longer belongs there. On failure the temporary file is removed,
    except in a child process forked meanwhile. Raises OSError and the exceptions of `write` and `check`.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    process = os.getpid()
    try:
        write(temporary)
        if os.getpid() != process:
            raise OSError("the process was forked while it wrote")
        if check is not None:
            check()
        os.replace(temporary, target)
    finally:
        if os.getpid() == process:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text_atomically(target: Path, text: str) -> None:
    """`write_atomically` a text in UTF-8; characters that cannot be encoded become question marks."""
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then with -2, -3 and so on before its suffix."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


# --- provenance, without the names of user and host -------------------------------------------------------------------


def provenance(
    arguments: Sequence[str], packages: Sequence[str] = ("batchnorm", "torch", "numpy", "pyarrow")
) -> dict[str, Any]:
    """The command, the versions of Python and the packages, and the machine."""
    return {
        "command": shlex.join(["batchnorm", *arguments]),
        "versions": {
            "python": platform.python_version(),
            **{name: number for name in packages if (number := _version(name))},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            # In a container, a process may use fewer than the machine has.
            "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
