"""The guarded process that reads a file: a format's library may crash on it, or take any time and memory.

The process prints one line of JSON, then raw numbers as little-endian float64. It is killed above a limit of resident
memory or of time, and has no network where the system allows that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from batchnorm.checks.layers import Place
from batchnorm.checks.readers.directory import size_of

PROGRAM = """
import sys, types
sys.modules["batchnorm"] = types.ModuleType("batchnorm")
sys.modules["batchnorm"].__path__ = [{folder!r}]
from batchnorm.checks.readers.child import main
main()
"""
"""Imports from this package's folder without changing sys.path."""
TIMEOUT, SLOWEST = 60, 2**25
"""Seconds for a small file on a busy machine, and bytes per second of a slow disk. The child's limit is far lower."""
MAX_MEMORY, COPIES = 3 * 2**28, 3
"""Resident bytes, 768 MiB, and copies of the file: ONNX as bytes, as messages, one tensor more. Libraries take 250."""
MAX_OUTPUT = 2**26
"""The most bytes that are read of the process's output; the child may write twice as many."""
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
QUIET |= {"HDF5_PLUGIN_PRELOAD": "::", "HDF5_USE_FILE_LOCKING": "FALSE"}  # no filters from elsewhere
DAMAGED = "it is damaged or hostile"


class CheckpointError(Exception):
    """A file that cannot be read as a checkpoint: one line with the file, what is wrong with it and what to do."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path

    def __str__(self) -> str:
        return str(self.args[0]) if self.path is None else f"{shown(str(self.path), 4096)}: {self.args[0]}"


def shown(name: str, limit: int = 80) -> str:
    """A name from a file, fit for one line of a terminal: no control characters, not longer than `limit`."""
    readable = "".join(letter if letter.isprintable() else "?" for letter in name[: limit + 1])
    return readable if len(readable) <= limit else readable[: limit - 1] + "…"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str  # of its elements, as "float32" or "bfloat16"
    array: npt.NDArray[np.float64] | None
    why: str  # the numbers were not read, where `array` is None
    key: Hashable  # equal for two tensors that are the same elements of the same bytes

    def values(self) -> npt.NDArray[np.float64]:
        """Its elements as float64, integers too.

        Raises:
            CheckpointError: they were not read: too many, no numbers, or not in the file.
        """
        if self.array is None:
            raise CheckpointError(self.why)
        return np.broadcast_to(self.array, self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. The path of a tensor is the keys of its containers, then its name."""

    path: Path  # of the file, or of the folder of shards
    # "PyTorch", "PyTorch (legacy)", "pickle", "NumPy", "safetensors", "torch.export", "ONNX", "HDF5" or "Keras"
    format: str
    tensors: Mapping[tuple[str, ...], Stored]
    norms: tuple[Place, ...]  # of ONNX and Keras, whose files say which layers are batch norm
    size: int  # bytes of its files
    settings: Mapping[tuple[tuple[str, ...], str], Mapping[str, Any]]  # of modules, by container and name


def load(file: Path, path: Path) -> Checkpoint:
    """The checkpoint in a file, under the path that the user gave.

    Raises:
        CheckpointError: the child refused the file, crashed, or was stopped.
    """
    with tempfile.TemporaryFile() as output:  # not a pipe, which would block the child when nobody reads
        _run(file, output)
        output.seek(0)
        line, _, numbers = output.read(min(MAX_OUTPUT, os.fstat(output.fileno()).st_size)).partition(b"\n")
    try:
        found = json.loads(line)
        if "error" in found:
            raise CheckpointError(shown(found["error"], 250), file)
        stored = [_stored(record, at, numbers) for at, record in enumerate(found["tensors"])]
        places = [tuple(record["path"]) for record in found["tensors"]]
        tensors = {place: one for place, one in zip(places, stored, strict=True) if place}
        norms = [
            Place(name, "", {role: stored[at] for role, at in positions.items()}, framework, settings)
            for name, positions, framework, settings in found["norms"]
        ]
        modules = {(tuple(container), name): settings for container, name, settings in found["modules"]}
        return Checkpoint(path, found["format"], tensors, tuple(norms), found["size"], modules)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise CheckpointError("the file is damaged: what was read of it makes no sense", file) from None


def _stored(record: dict[str, Any], position: int, numbers: bytes) -> Stored:
    shape, array = tuple(record["shape"]), None
    if len(shape) > 32 or not all(0 <= size < 2**62 for size in shape) or math.prod(shape) >= 2**62:
        raise ValueError(f"an impossible shape: {shape}")
    if "at" in record:
        array = np.frombuffer(numbers, "<f8", math.prod(record["stored"]), record["at"]).reshape(record["stored"])
    return Stored(shape, str(record["dtype"]), array, shown(record.get("why", ""), 200), record["key"] or position)


def _run(file: Path, output: IO[bytes]) -> None:
    """Let the child read the file and print to `output`; stop it at its limits."""
    size, status = size_of(file), None
    program = PROGRAM.format(folder=str(Path(__file__).parents[2]))
    command = [sys.executable, "-P", "-W", "ignore", "-c", program, str(file.absolute())]
    try:
        child = Popen(command, stdin=DEVNULL, stdout=output, stderr=DEVNULL, env=os.environ | QUIET)
    except OSError as error:
        raise CheckpointError(f"no process could be started to read the file: {error}", file) from None
    until = time.monotonic() + TIMEOUT + size // SLOWEST
    try:
        while status is None and time.monotonic() < until:
            if _resident(child.pid) > MAX_MEMORY + COPIES * size:
                raise CheckpointError(f"the file takes too much memory to be read: {DAMAGED}", file)
            with contextlib.suppress(TimeoutExpired):
                status = child.wait(0.02)
    finally:
        child.kill()
        child.wait()
    if status in (None, -24):  # SIGXCPU
        raise CheckpointError(f"the file takes too long to be read: {DAMAGED}", file)
    if status:
        raise CheckpointError("the file is damaged: the library that reads it crashed on it", file)


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds, without the pages of files; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/status") as status:
            return sum(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
    except (OSError, ValueError, IndexError):
        return 0
