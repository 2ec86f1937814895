"""What the child found in a file: its tensors, with the numbers of the small ones, and its batch norm layers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from batchnorm.importing import with_install_hint

INDEX = ".index.json"
MAX_TENSORS = 2**16
"""No network has more."""
MAX_NAMES = 2**23
"""Characters of all names."""
LARGEST, IN_ALL = 2**20, 2**22
"""Elements of one vector, and of all vectors, whose numbers are read: those of a norm and of a bias are vectors."""
LARGEST_OTHER, IN_ALL_OTHERS = 2**12, 2**18
"""Likewise of tensors with several dimensions, which `check` needs only where a norm is damaged."""


class RefusedError(Exception):
    """A file that is damaged, hostile, or of a kind that is not read, in words for the user."""


class UnreadError(Exception):
    """Why the numbers of a tensor are not read."""


class Directory:
    """Collects the tensors and layers of a file, and writes them as JSON and raw numbers."""

    def __init__(self, scratch: IO[bytes]) -> None:
        self.scratch = scratch  # a file for what must be unpacked
        self.found: dict[str, Any] = {"format": "", "size": 0, "tensors": [], "norms": [], "modules": []}
        self.numbers = bytearray()
        self.names = 0
        self.left = {True: IN_ALL, False: IN_ALL_OTHERS}

    def tensor(
        self,
        path: tuple[str, ...],
        shape: Sequence[int],
        dtype: str,
        values: Callable[[], Any],
        stored: Sequence[int] | None = None,
        key: Hashable = None,
    ) -> int:
        """Add a tensor, and return its position.

        Args:
            path: keys of containers, then the name; empty for one that a model computes.
            shape: its sizes.
            dtype: the type of its elements.
            values: returns its numbers, as an array of NumPy or torch; called only where they are few.
            stored: its sizes without those along which it is expanded, if they differ.
            key: equal for tensors that share their memory.
        """
        path = tuple(well_formed(part) for part in path)
        self.names += sum(map(len, path)) + len(dtype)
        if len(self.found["tensors"]) >= MAX_TENSORS or self.names > MAX_NAMES:
            raise RefusedError(f"the file holds more than {MAX_TENSORS} tensors")
        sizes, stored = [*map(int, shape)], [*map(int, shape if stored is None else stored)]
        record: dict[str, Any] = {
            "path": path,
            "shape": sizes,
            "dtype": dtype,
            "key": None if key is None else str(key),
        }
        is_vector, count = sum(size > 1 for size in stored) < 2, math.prod(stored)
        if 0 <= count <= min(LARGEST if is_vector else LARGEST_OTHER, self.left[is_vector]):
            self.left[is_vector] -= count
            try:
                array = _as_float64(values()).reshape(stored)
                record |= {"at": len(self.numbers), "stored": stored}
                self.numbers += array.tobytes()
            except ModuleNotFoundError as error:
                record["why"] = str(with_install_hint(error))
            except Exception as error:
                record["why"] = str(error) if isinstance(error, UnreadError) else f"{dtype} cannot be read: {error}"
        else:
            record["why"] = f"a tensor of shape {sizes} is not read: only vectors of at most {LARGEST} elements are"
        self.found["tensors"].append(record)
        return len(self.found["tensors"]) - 1

    def norm(self, name: str, positions: dict[str, int], framework: str, settings: dict[str, Any]) -> None:
        """Add a batch norm layer: the positions of its tensors by role, and what the file says of it."""
        self.found["norms"].append((well_formed(name), positions, framework, settings))

    def module(self, container: tuple[str, ...], name: str, settings: dict[str, Any]) -> None:
        """Add what a pickled model says of one of its modules."""
        self.found["modules"].append((tuple(map(well_formed, container)), well_formed(name), settings))

    def write(self, output: IO[bytes]) -> None:
        """Write one line of JSON, and behind it the numbers."""
        output.write(json.dumps(self.found).encode() + b"\n" + self.numbers)


def _as_float64(values: Any) -> np.ndarray:
    if hasattr(values, "is_complex"):  # a tensor of torch, which knows types that NumPy does not
        values = values.detach() if values.is_complex() else values.detach().double().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiubV":  # V: bfloat16 and float8 of ml_dtypes
        raise UnreadError(f"tensors of type {array.dtype} are not read")
    with np.errstate(all="ignore"):  # signalling NaN
        return np.ascontiguousarray(array.astype("<f8"))


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files beside an index of shards: limits grow with them."""
    files = path.parent.iterdir() if path.name.endswith(INDEX) else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def well_formed(name: str) -> str:
    """A name that can be printed: halves of surrogate pairs become question marks."""
    return name.encode("utf-8", "replace").decode()
