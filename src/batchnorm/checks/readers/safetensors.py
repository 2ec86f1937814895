"""safetensors: eight bytes for the length of a header, the header in JSON, then the numbers of every tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeGuard

from batchnorm.checks.readers._parsing.elements import SIZES
from batchnorm.checks.readers._parsing.files import File, Region
from batchnorm.checks.readers._parsing.json_text import DAMAGED, Text
from batchnorm.checks.readers._parsing.stored import (
    MAX_TENSORS,
    Checkpoint,
    CheckpointError,
    Stored,
    Unreadable,
    shown,
)
from batchnorm.checks.readers._parsing.strided import Strided, plausible

MAX_HEADER = 25_000_000
"""Bytes of the header; the format allows 100 million. An entry takes about a hundred."""
MAX_ENTRY = 4096
"""Bytes of one tensor's entry: type, shape and place."""
DTYPES = (
    {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    | {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"}
    | {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"}
    | {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    | {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
)


def looks_like(head: bytes, size: int) -> bool:
    """Whether a file that begins so is one: a length that fits the file, then a JSON object."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_file(path: Path, file: File) -> Checkpoint:
    """The tensors of one file.

    Raises:
        CheckpointError: a header that is damaged, too long, or names places that overlap or lie outside the file.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise CheckpointError("the file is truncated or damaged: its header is longer than the file")
    if length > MAX_HEADER:
        raise CheckpointError(f"the header of the file has {length} bytes: no checkpoint needs more than {MAX_HEADER}")
    data = Region(file, 8 + length, file.size - 8 - length)
    header = Text(file.read(8, length))
    tensors: dict[tuple[str, ...], Stored] = {}
    places = []
    metadata = False
    for name in header.pairs():
        if name == "__metadata__":
            if metadata:
                raise CheckpointError(DAMAGED)
            metadata = True
            header.skip()
            continue
        if (name,) in tensors:
            raise CheckpointError(f"the file has two tensors {shown(name)}: it was tampered with")
        if len(tensors) == MAX_TENSORS:
            raise CheckpointError(f"the file holds more than {MAX_TENSORS} tensors")
        begin, end, tensors[name,] = _tensor(header.value(MAX_ENTRY), data)
        places.append((begin, end))
    header.end()
    if any(end > begin for (_, end), (begin, _) in zip(sorted(places), sorted(places)[1:], strict=False)):
        raise CheckpointError("the file is damaged: its tensors overlap")
    return Checkpoint(path, "safetensors", tensors, size=file.size)


def _tensor(entry: Any, data: Region) -> tuple[int, int, Stored]:
    if not isinstance(entry, dict):
        raise CheckpointError(DAMAGED)
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(place) or len(place) != 2:
        raise CheckpointError(DAMAGED)
    sizes, (begin, end) = tuple(shape), place
    if not plausible(sizes) or not begin <= end <= data.size:
        raise CheckpointError("the file is truncated or damaged: a tensor lies outside it")
    known = DTYPES.get(dtype)
    if known is None:
        return (
            begin,
            end,
            Unreadable(sizes, shown(dtype, 20).lower(), f"tensors of type {shown(dtype, 20)} are not read"),
        )
    if math.prod(sizes) * SIZES[known] != end - begin:
        raise CheckpointError("the file is damaged: a tensor has not as many bytes as its shape says")
    return begin, end, Strided(sizes, known, Region(data, begin, end - begin))


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(entry) is int and entry >= 0 for entry in value)
