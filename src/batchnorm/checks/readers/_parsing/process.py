"""Libraries that read files run in a guarded process: a damaged file may crash them, or take any time and memory."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.checks.readers._parsing.files import CheckpointError, File, shown
from batchnorm.checks.readers._parsing.stored import Held, Stored, plausible

CHILD = Path(__file__).parent / "child.py"
TIMEOUT = 30
"""Seconds for one file: a thousand layers take one."""
SLOWEST = 2**25
"""Bytes a second that a disk reads at least."""
MAX_OUTPUT = 2**26
"""Bytes of a directory that are taken from the process."""
MAX_VALUES = 2**24
"""Elements of one tensor: they come through a pipe."""


@dataclass(frozen=True, slots=True)
class Remote(Stored):
    """A tensor that the process reads when it is asked for."""

    job: Job
    name: str | int

    def _read(self) -> npt.NDArray[np.float64]:
        count = math.prod(self.shape)
        if count > MAX_VALUES:
            raise CheckpointError(
                f"a tensor of {count} elements in {self.job.format} is not read: at most {MAX_VALUES}"
            )
        record = next(self.job.run(self.name), {})
        return self.job.array(record.get("values"), self.shape)


@dataclass(frozen=True, slots=True)
class Job:
    """What the process reads: a file, by which package (`extra` installs it), and what else it has to know."""

    format: str
    package: str
    extra: str
    file: File
    order: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def damaged(self) -> CheckpointError:
        """What came back is no answer: the library has written over its memory, or invented something."""
        return CheckpointError(f"the {self.format} file is damaged: what was read of it makes no sense")

    def run(self, want: str | int | None = None) -> Iterator[dict[str, Any]]:
        """The records that it prints.

        Raises:
            CheckpointError: the package is not installed, or the process failed, crashed or took too long.
        """
        if importlib.util.find_spec(self.package) is None:
            raise CheckpointError(
                f"{self.format} files need {self.package}: pip install 'batchnorm[{self.extra}]'", self.file.path
            )
        self.file.read(0, 0)  # still the file that it was
        order = {"format": self.format, "path": str(self.file.path.absolute()), "want": want, **self.order}
        quiet = os.environ | {
            "OPENBLAS_NUM_THREADS": "1",  # its threads reserve addresses, which are bounded
            "HDF5_PLUGIN_PRELOAD": "::",  # no filters from elsewhere
            "HDF5_USE_FILE_LOCKING": "FALSE",
            "PYTHONIOENCODING": "utf-8",
        }
        # Its output goes to a file: a pipe that nobody reads would let it wait for ever.
        with tempfile.TemporaryFile() as output:
            try:
                done = subprocess.run(
                    [sys.executable, "-P", str(CHILD)],  # -P: what lies beside it is not for it to import
                    input=(json.dumps(order) + "\n").encode(),
                    stdout=output,
                    stderr=subprocess.DEVNULL,
                    env=quiet,
                    timeout=TIMEOUT + self.file.size // SLOWEST,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise CheckpointError(f"the {self.format} file takes too long to be read: it is damaged") from None
            except OSError as error:
                raise CheckpointError(f"no process could be started to read the {self.format} file: {error}") from None
            size = os.fstat(output.fileno()).st_size
            if size > MAX_OUTPUT or done.returncode:
                raise CheckpointError(f"the {self.format} file is damaged: the library that reads it crashed on it")
            output.seek(0)
            for line in output:
                record = self._record(line)
                if "end" in record:
                    if record["end"] is not None:
                        raise CheckpointError(
                            f"the {self.format} file cannot be read: {shown(str(record['end']), 200)}"
                        )
                    return
                yield record
            raise self.damaged

    def tensor(self, record: dict[str, Any], name: str | int) -> Stored:
        """The tensor of a record: its values if it has them, else a place to ask for them."""
        shape, dtype = self.shape(record), str(record["dtype"])
        if "values" in record:
            return Held(shape, dtype, self.array(record["values"], shape))
        return Remote(shape, dtype, self, name)

    def shape(self, record: dict[str, Any]) -> tuple[int, ...]:
        """The sizes in a record."""
        shape = tuple(record["shape"])
        if not plausible(shape):
            raise CheckpointError(f"the {self.format} file is damaged: a tensor has an impossible shape")
        return shape

    def array(self, encoded: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        """The numbers in a record."""
        try:
            return np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<f8").reshape(shape)
        except (binascii.Error, TypeError, ValueError):
            raise CheckpointError(f"the {self.format} file is damaged: a tensor in it cannot be read") from None

    def _record(self, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise self.damaged from None
        if not isinstance(record, dict):
            raise self.damaged
        return record
