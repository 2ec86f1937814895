"""The guarded process that reads a file: a format's library may crash on it, or take any time and memory.

The process prints one line of JSON, then raw numbers as little-endian float64. It is killed above a limit of resident
memory or of time, and has no network where the system allows that.
"""

from __future__ import annotations

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
from batchnorm.checks.readers.directory import MAX_OUTPUT, size_of

PROGRAM = """
import sys, types
sys.modules["batchnorm"] = types.ModuleType("batchnorm")
sys.modules["batchnorm"].__path__ = [{folder!r}]
from batchnorm.checks.readers.child import main
main()
"""
"""Imports from this package's folder without changing sys.path."""
TIMEOUT = 60
"""Seconds for a small file on a busy machine. The child limits its processor time to much less."""
SLOWEST = 2**25
"""Bytes per second of a slow disk."""
MAX_MEMORY = 3 * 2**28
"""Resident bytes that are not pages of a file: 768 MiB. The libraries take up to 250 of them."""
COPIES = 3
"""How many copies of a file the libraries have in memory: ONNX as bytes, as messages, and one tensor more."""
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
    """A tensor in a file: its sizes, the type of its elements, as "float32" or "bfloat16", and its numbers.

    `array` is None where the numbers were not read, and `why` says why. `key` is equal for two tensors that are the
    same elements of the same bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    array: npt.NDArray[np.float64] | None
    why: str
    key: Hashable

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
    """The directory of a checkpoint.

    Args:
        path: the file, or the folder of shards.
        format: "PyTorch", "PyTorch (legacy)", "pickle", "NumPy", "safetensors", "ONNX", "HDF5" or "Keras".
        tensors: by path: the keys of the containers, then the name, as ("state_dict", "module.bn1.weight").
        norms: the batch norm layers of ONNX and Keras, which say themselves which layers are.
        size: bytes of its files.
        settings: of the modules in a pickled model, by container and name: eps, momentum, training and class.
    """

    path: Path
    format: str
    tensors: Mapping[tuple[str, ...], Stored]
    norms: tuple[Place, ...]
    size: int
    settings: Mapping[tuple[tuple[str, ...], str], Mapping[str, Any]]


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
        paths = (tuple(record["path"]) for record in found["tensors"])
        tensors = {path: one for path, one in zip(paths, stored, strict=True) if path}
        norms = (
            Place(name, "", {role: stored[at] for role, at in positions.items()}, framework, settings)
            for name, positions, framework, settings in found["norms"]
        )
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
    size, package, status = size_of(file), Path(__file__).parents[2], None
    command = [sys.executable, "-P", "-W", "ignore", "-c", PROGRAM.format(folder=str(package)), str(file.absolute())]
    try:
        child = Popen(command, stdin=DEVNULL, stdout=output, stderr=DEVNULL, env=os.environ | QUIET)
    except OSError as error:
        raise CheckpointError(f"no process could be started to read the file: {error}", file) from None
    until = time.monotonic() + TIMEOUT + size // SLOWEST
    try:
        while status is None and time.monotonic() < until:
            if _resident(child.pid) > MAX_MEMORY + COPIES * size:
                raise CheckpointError(f"the file takes too much memory to be read: {DAMAGED}", file)
            try:
                status = child.wait(0.02)
            except TimeoutExpired:
                continue
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
