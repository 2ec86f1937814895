"""What every reader of checkpoints hands over: tensors that still lie in their file, and the error of a bad file."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_TENSORS = 2**16
"""No network has more; a directory of so many fits into some tens of megabytes."""
MAX_PATH = 4096
"""Characters of a path that messages show: those of every path that Linux opens."""
MAX_ELEMENTS = 2**27
"""What `values` reads of one tensor: 1 GiB as float64. A norm's tensors are a thousand times smaller."""


class CheckpointError(Exception):
    """A file that cannot be read as a checkpoint: one line, the file, what is wrong with it and what to do."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path

    def __str__(self) -> str:
        message = str(self.args[0])
        return message if self.path is None else f"{shown(str(self.path), MAX_PATH)}: {message}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors raised inside name this file, unless they already name one."""
    try:
        yield
    except CheckpointError as error:
        error.path = error.path or path
        raise


def shown(name: str, limit: int = 80) -> str:
    """A name from a file, fit for one line of a terminal: no control characters, not longer than `limit`."""
    readable = "".join(letter if letter.isprintable() else "?" for letter in name[: limit + 1])
    return readable if len(readable) <= limit else readable[: limit - 1] + "…"


@dataclass(frozen=True, slots=True)
class Stored(ABC):
    """A tensor that lies in a file. Nothing of it is read before `values`.

    Args:
        shape: its sizes.
        dtype: the type of its elements in the file, as "float32", "bfloat16", "int64" or "float8_e4m3fn".
    """

    shape: tuple[int, ...]
    dtype: str

    def values(self) -> npt.NDArray[np.float64]:
        """Its elements as float64, integers too, read now.

        Raises:
            CheckpointError: more than MAX_ELEMENTS of them, no numbers, or a file that has changed since.
        """
        count = math.prod(self.shape)
        if count > MAX_ELEMENTS:
            raise CheckpointError(f"a tensor of {count} elements is not read: at most {MAX_ELEMENTS} are")
        try:
            return self._read()
        except (MemoryError, ValueError):  # NumPy's words for a shape that is too large for it
            raise CheckpointError(f"a tensor of shape {self.shape} is too large to be read") from None

    def memory(self) -> Hashable:
        """Equal for tensors that are one: the same elements of the same bytes."""
        return id(self)

    @abstractmethod
    def _read(self) -> npt.NDArray[np.float64]: ...


@dataclass(frozen=True, slots=True)
class Held(Stored):
    """A tensor small enough to be at hand already."""

    array: npt.NDArray[np.float64]

    def _read(self) -> npt.NDArray[np.float64]:
        return self.array.copy()


@dataclass(frozen=True, slots=True)
class Unreadable(Stored):
    """A tensor whose numbers the file does not hold, or not in a form that is read here."""

    why: str

    def _read(self) -> npt.NDArray[np.float64]:
        raise CheckpointError(self.why)


@dataclass(frozen=True)
class NormPlaces:
    """A batch norm layer that the file itself names: an ONNX node, or a layer in a Keras configuration.

    `settings`: eps; momentum, as PyTorch's weight of the new value (ONNX's and Keras' 0.9 is 0.1 here); framework; for
    ONNX training_mode, a bool. What the file does not tell is absent.
    """

    name: str
    gamma: Stored | None = None
    beta: Stored | None = None
    mean: Stored | None = None
    var: Stored | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The directory of a checkpoint.

    Args:
        path: the file, or the folder of shards.
        format: "PyTorch", "PyTorch (legacy)", "safetensors", "ONNX", "HDF5" or "Keras".
        tensors: by path: the keys of the containers, then the name, as ("state_dict", "module.bn1.weight").
        norms: the batch norm layers, for formats that themselves say which layers are.
        size: bytes of its files.
    """

    path: Path
    format: str
    tensors: Mapping[tuple[str, ...], Stored]
    norms: tuple[NormPlaces, ...] = ()
    size: int = 0
