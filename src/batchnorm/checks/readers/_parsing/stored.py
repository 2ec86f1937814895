"""What every reader returns: tensors that still lie in their file, and their numbers as float64."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchnorm.checks.layers import Place
from batchnorm.checks.readers._parsing.files import Bytes, CheckpointError

MAX_TENSORS = 2**16
"""No network has more; a directory of so many fits into some tens of megabytes."""
MAX_ELEMENTS = 2**27
"""What `values` reads of one tensor: 1 GiB as float64. A norm's tensors are a thousand times smaller."""


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
class Checkpoint:
    """The directory of a checkpoint.

    Args:
        path: the file, or the folder of shards.
        format: "PyTorch", "PyTorch (legacy)", "safetensors", "ONNX", "HDF5" or "Keras".
        tensors: by path: the keys of the containers, then the name, as ("state_dict", "module.bn1.weight").
        norms: the batch norm layers, for formats that themselves say which layers are: ONNX nodes, and layers in a
            Keras configuration. What the file does not say is absent from a layer's settings.
        size: bytes of its files.
    """

    path: Path
    format: str
    tensors: Mapping[tuple[str, ...], Stored]
    norms: tuple[Place[Stored], ...] = ()
    size: int = 0


Raw = npt.NDArray[np.generic]

NATIVE = (
    {"float64": "f8", "float32": "f4", "float16": "f2"}
    | {"int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1"}
    | {"uint64": "u8", "uint32": "u4", "uint16": "u2", "uint8": "u1", "bool": "u1"}
)


FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
"""Types of one byte that the package ml_dtypes knows."""
CODES = NATIVE | {"bfloat16": "u2"} | dict.fromkeys(FLOAT8, "u1")
SIZES = {name: int(code[1]) for name, code in CODES.items()}
"""Bytes an element, of every type whose numbers are read."""
WIDTHS = (
    SIZES
    | {"complex32": 4, "complex64": 8, "complex128": 16}
    | {"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
)
"""Bytes an element, of every type that has storages of its own."""


def float64(raw: Raw, dtype: str) -> npt.NDArray[np.float64]:
    """Numbers of elements as they lie in a file (an array of `raw_type(dtype)`)."""
    if dtype == "bfloat16":
        raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif dtype in FLOAT8:
        try:
            import ml_dtypes
        except ImportError:
            raise CheckpointError(f"{dtype} needs ml_dtypes: pip install 'batchnorm[formats]'") from None
        raw = raw.astype(np.uint8).view(getattr(ml_dtypes, dtype))
    with np.errstate(all="ignore"):  # signalling NaN
        return raw.astype(np.float64)


def raw_type(dtype: str, order: str = "<") -> np.dtype[np.generic]:
    """What NumPy reads them as; `order` is "<" or ">"."""
    return np.dtype(order + CODES[dtype])


MAX_READS = 2**16
"""Reads for one tensor: a second's worth. Only a view across a much larger tensor needs more."""
MAX_SIZE = 2**62
"""No count of elements or bytes in a file is larger; products stay in 64 bits."""


@dataclass(frozen=True, slots=True)
class Strided(Stored):
    """Element (i, j, ...) lies at element `offset + i·strides[0] + j·strides[1] + ...` of the bytes.

    Without strides the last dimension runs fastest. `order` is "<" for little-endian, ">" for big-endian.
    """

    source: Bytes
    offset: int = 0
    strides: tuple[int, ...] | None = None
    order: str = "<"

    def memory(self) -> Hashable:
        return self.source, self.offset, self.strides, self.shape, self.dtype

    def _read(self) -> npt.NDArray[np.float64]:
        if 0 in self.shape:
            return np.empty(self.shape)
        strides = contiguous(self.shape) if self.strides is None else self.strides
        size = SIZES[self.dtype]
        # The outer dimensions are walked while what lies inside one step is spread too thin to be read as a whole.
        order = sorted(range(len(self.shape)), key=lambda axis: -strides[axis])
        outer: list[int] = []
        while _span(self.shape, strides, order) * size > max(self.source.dense, 4 * size * _count(self.shape, order)):
            outer.append(order.pop(0))
        if math.prod(self.shape[axis] for axis in outer) > MAX_READS:
            raise CheckpointError("a tensor whose elements lie scattered over a much larger one is not read")
        inner = sorted(order)
        shape = tuple(self.shape[axis] for axis in inner)
        span = _span(self.shape, strides, inner)
        steps = tuple(strides[axis] * size for axis in inner)
        result = np.empty(self.shape)
        for at in itertools.product(*(range(self.shape[axis]) for axis in outer)):
            begin = self.offset + sum(index * strides[axis] for index, axis in zip(at, outer, strict=True))
            raw = np.frombuffer(self.source.read(begin * size, span * size), dtype=raw_type(self.dtype, self.order))
            where: list[int | slice] = [slice(None)] * len(self.shape)
            for index, axis in zip(at, outer, strict=True):
                where[axis] = index
            view = np.lib.stride_tricks.as_strided(raw, shape, steps, writeable=False)
            result[tuple(where)] = float64(view, self.dtype)
        return result


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor whose last dimension runs fastest."""
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements lie from its first to its last, both included; 0 for an empty tensor."""
    return 0 if 0 in shape else _span(shape, strides, range(len(shape)))


def plausible(shape: tuple[int, ...]) -> bool:
    """Whether sizes can be those of a tensor."""
    return len(shape) <= 32 and all(0 <= length < MAX_SIZE for length in shape) and math.prod(shape) < MAX_SIZE


def _span(shape: tuple[int, ...], strides: tuple[int, ...], axes: list[int] | range) -> int:
    return 1 + sum((shape[axis] - 1) * strides[axis] for axis in axes)


def _count(shape: tuple[int, ...], axes: list[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
