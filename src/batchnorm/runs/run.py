"""A Run: what was measured, on disk, in a folder that any dataframe tool can read.

    RUN/
      run.json                  what ran: kind, status, command, versions, machine, times, configuration, facts
      <table>-00001.parquet     a part of a table; a table is its parts in order
      <table>-r1-00001.parquet  the same of process 1 of several, process 0 being the one above
      report.html               the page made from it, if one was made

Each file is written under another name and then renamed, so a killed process loses at most what it had not yet
written. This module imports neither torch nor a plotting library: reports read a Run on a machine without them.
docs/run-format.md has the tables and their columns.
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
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Self
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from batchnorm.runs import VIEWS

FORMAT = "batchnorm-run"
VERSION = 3
"""1: studies. 2: also training runs, with parts of several processes. 3: classes and angles in studies, and in training
runs a row of the last step."""
STATUSES = ("running", "complete", "interrupted", "failed")
_NAME = re.compile(r"[a-z_]+")
_PART = re.compile(r"(?P<table>[a-z_]+)(-r(?P<rank>\d+))?-(?P<number>\d{5,})\.parquet")
_UNFINISHED = re.compile(r"run(\.json)?\.tmp|[a-z_]+(-r\d+)?-\d{5,}(\.parquet)?\.tmp")
_LOCK = re.compile(r"writer(-r\d+)?\.lock")

Write = Callable[[Path], object]
"""Writes a file under the path that it is given."""


class RunError(Exception):
    """A Run that cannot be made, read or written. The message is one line and says what to do."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise RunError for what the system refuses in here."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}") from error


class Run:
    """A folder of measurements: `info` is its run.json, `table(name)` one of its tables.

    `Run(path)` opens the Run in the folder `path`; `Run.create` makes a new one.

    Args:
        path: the folder.
        info: what run.json will hold, for code that makes a Run; by default it is read from the folder.

    Raises RunError where the folder holds no Run that this version can read.
    """

    def __init__(self, path: str | os.PathLike[str], info: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.info: dict[str, Any] = _read_info(self.path) if info is None else info

    @classmethod
    def create(cls, path: str | os.PathLike[str], kind: str, *, force: bool = False, **info: Any) -> Self:
        """Start a Run in the folder `path`, made with its parents where missing.

        `info` (JSON values) joins the format, the kind and the start time in run.json.

        Raises RunError where the folder holds a Run and `force` is False, where it holds anything but a Run, or where
        it cannot be written. With `force`, only the files a Run consists of are removed.
        """
        folder = Path(path)
        cls.check_vacant(folder, force=force)
        head = {"format": FORMAT, "version": VERSION, "id": uuid4().hex, "kind": kind, "status": "running"}
        run = cls(folder, {**head, **info, "started": _now()})
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "run.json").exists():
                cls.open(folder)._remove_files()
            _write_whole(folder / "run.json", _json(run.info))
        return run

    @classmethod
    def check_vacant(cls, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Raise the RunError that `create` would raise now with this `path` and `force`, and write nothing."""
        folder = Path(path)
        with writing_to(folder):
            if (folder / "run.json").exists():
                cls.open(folder)
                if not force:
                    raise RunError(f"{folder} already holds a Run: choose another, or replace it with force=True")
            elif folder.exists() and any(
                not (entry.name in ("run.json.tmp", "run.tmp") or _LOCK.fullmatch(entry.name))
                for entry in folder.iterdir()
            ):
                raise RunError(f"{folder} is not empty and holds no Run: choose a new or empty folder")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read the Run in the folder `path`, as `Run(path)` does, and raise RunError as that does."""
        return cls(path)

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.info.get('kind')}, {self.info.get('status')}>"

    def _repr_html_(self) -> str:
        """In a notebook: the answer and a small table. Never raises."""
        shown: str = resolve_name(VIEWS["card"])(self)
        return shown

    def to_polars(self, table: str | None = None) -> Any:
        """A table as a polars DataFrame; by default `units`, of a watched training with every derived quantity.

        `table` names another one. Of several processes, a raw table holds the rows of all, with their number in the
        column `rank`; the default table has them merged. Raises RunError where the table is missing or damaged.
        """
        polars = _library("polars")
        return polars.from_arrow(self._arrow(table))

    def to_pandas(self, table: str | None = None) -> Any:
        """A table as a pandas DataFrame, which `table` names as in `to_polars`; raises RunError as that does."""
        _library("pandas")
        return self._arrow(table).to_pandas()

    def _arrow(self, name: str | None) -> pa.Table:
        if name is None and self.info.get("kind") == "watch":
            whole: pa.Table = resolve_name(VIEWS["frame"])(self)
            return whole
        name = name or "units"
        ranks = self.ranks(name) or [0]
        parts = [self.table(name, rank) for rank in ranks]
        if len(ranks) == 1:
            return parts[0]
        numbers = [pa.array([rank] * len(part), pa.int32()) for rank, part in zip(ranks, parts, strict=True)]
        ranked = [part.append_column("rank", number) for part, number in zip(parts, numbers, strict=True)]
        return pa.concat_tables(ranked, promote_options="default").unify_dictionaries()

    def append(self, table: str, columns: Mapping[str, Any] | pa.Table, rank: int = 0) -> None:
        """Write one more part of `table` for process `rank`; `columns` are arrays of equal length by name.

        Without rows no part is written. Raises RunError where it cannot be written, and where the folder was removed or
        holds another Run by now.
        """
        if not _NAME.fullmatch(table):
            raise ValueError(f"table names are lower-case letters and underscores, got {table!r}")
        part = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        if part.num_rows == 0:
            return
        self.check_still_there()
        number = 1 + max((number for *of, number, _ in self._parts() if of == [table, rank]), default=0)
        name = f"{table}{f'-r{rank}' if rank else ''}-{number:05d}.parquet"
        self._write(name, lambda temporary: _write_part(part, temporary))

    def tables(self) -> list[str]:
        """The names of the tables that have at least one part."""
        return sorted({table for table, *_ in self._parts()})

    def ranks(self, table: str) -> list[int]:
        """The processes that wrote parts of a table."""
        return sorted({rank for name, rank, *_ in self._parts() if name == table})

    def table(self, name: str, rank: int = 0, columns: Sequence[str] | None = None) -> pa.Table:
        """A table as pyarrow.Table: all the parts that one process wrote, in order.

        Args:
            name: the table, one of `tables()`.
            rank: the number of the process.
            columns: the names of the columns to read; None for all.

        Raises RunError where the process wrote no such table, or a part of it is damaged.
        """
        parts = [path for *of, _, path in self._parts() if of == [name, rank]]
        if not parts:
            raise RunError(f"the Run {self.path} has no table {name!r}; it has: {', '.join(self.tables()) or 'none'}")
        read = []
        for part in parts:
            try:
                read.append(pq.ParquetFile(part, page_checksum_verification=True).read(columns))
            except (OSError, pa.ArrowException) as error:
                reason = str(error).splitlines()[0]
                raise RunError(
                    f"{part} is damaged and cannot be read ({reason}): remove it to go on without"
                ) from error
        try:
            return pa.concat_tables(read, promote_options="default")
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"the parts of table {name!r} in {self.path} do not fit together ({reason})") from error

    def note(self, **facts: Any) -> None:
        """Add `facts` to run.json at once: values that JSON can hold, by their names.

        Raises TypeError or ValueError for what JSON cannot hold (NaN included), and leaves the Run as it was; RunError
        as `append` does.
        """
        info = {**self.info, **facts}
        self.check_still_there()
        self._write("run.json", _json(info))
        self.info = info

    def finish(self, status: str) -> None:
        """Write into run.json how the Run ended, and when.

        `status` is "complete", "interrupted" or "failed". Raises ValueError for another one, and RunError as `append`
        does.
        """
        if status not in STATUSES[1:]:
            raise ValueError(f"status is one of {', '.join(STATUSES[1:])}, got {status!r}")
        self.note(status=status, ended=_now())

    def _parts(self) -> list[tuple[str, int, int, Path]]:
        """The table, the process, the number and the path of each part, in order."""
        found = ((_PART.fullmatch(entry.name), entry) for entry in self.path.iterdir())
        return sorted(
            (name["table"], int(name["rank"] or 0), int(name["number"]), path) for name, path in found if name
        )

    def check_still_there(self) -> None:
        """Raise RunError where the folder was removed, or where another Run has been started in it."""
        if not (self.path / "run.json").is_file():
            raise RunError(f"{self.path} was removed while it was being recorded: choose a folder that stays")
        if _read_info(self.path).get("id") != self.info.get("id"):
            raise RunError(
                f"{self.path} was replaced by another Run while it was being recorded: choose another folder"
            )

    def _write(self, name: str, write: Write) -> None:
        _write_whole(self.path / name, write, self.check_still_there)

    def _remove_files(self) -> None:
        """What the Run consists of, run.json last: until then the folder is a Run, which can be replaced again."""
        entries = list(self.path.iterdir())
        for entry in entries:
            if _PART.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name) or entry.name == "report.html":
                entry.unlink()
        (self.path / "run.json").unlink()


def _read_info(folder: Path) -> dict[str, Any]:
    """What run.json holds. Raises RunError where this version cannot read it."""
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"no Run in {folder}: it has no run.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {folder / 'run.json'}: {error}") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise RunError(f'{folder / "run.json"} does not describe a Run: no "format": "{FORMAT}" in it')
    of = info.get("version")
    if type(of) is not int or not 1 <= of <= VERSION:
        raise RunError(f"{folder} is a Run of version {of}; this batchnorm reads up to {VERSION}: upgrade it")
    return info


def _json(info: Mapping[str, Any]) -> Write:
    text = json.dumps(info, indent=2, allow_nan=False) + "\n"
    return lambda temporary: temporary.write_text(text, encoding="utf-8")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"to_{name}() needs {name}: pip install {name}") from error


def _write_part(part: pa.Table, path: Path) -> None:
    """Measured numbers differ from row to row: to look for repetitions in them takes three times as long, and saves
    nothing; with their bytes apart (exponents beside exponents) they pack better."""
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


def _write_whole(target: Path, write: Write, check: Callable[[], None] | None = None) -> None:
    """`write_atomically`, with a RunError where it fails."""
    try:
        write_atomically(target, write, check)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- files that no reader ever sees a part of ------------------------------------------------------------------------


def write_atomically(target: Path, write: Write, check: Callable[[], None] | None = None) -> None:
    """`write` a temporary file beside `target`, then rename it; where that fails, nothing is left of it.

    `check` may raise before the rename, when what was written does not belong there any more. A child process that was
    forked in between leaves the file to its parent. Raises OSError, and what `write` and `check` raise.
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
    """The same of a text in UTF-8; what UTF-8 cannot hold becomes a question mark."""
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then `path`-2, `path`-3 and so on, before its suffix."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


# --- where a Run comes from: names no user and no host ---------------------------------------------------------------


def provenance(
    arguments: Sequence[str], packages: Sequence[str] = ("batchnorm", "torch", "numpy", "pyarrow")
) -> dict[str, Any]:
    """command (as typed after the program's name), versions of Python and the packages, and the machine."""
    return {
        "command": shlex.join(["batchnorm", *arguments]),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in packages if (found := _version(name))},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": _cores(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    """The cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
