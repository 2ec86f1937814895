"""safetensors: the package of that name reads the header, and the numbers are read where they lie."""

from __future__ import annotations

import math
from pathlib import Path

from batchnorm.checks.readers._parsing.files import CheckpointError, File, Region, shown
from batchnorm.checks.readers._parsing.stored import (
    MAX_TENSORS,
    SIZES,
    Checkpoint,
    Stored,
    Strided,
    Unreadable,
    plausible,
)

MAX_HEADER = 25_000_000
"""Bytes of the header; the format allows 100 million. An entry takes about a hundred."""
DTYPES = (
    {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    | {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"}
    | {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"}
    | {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    | {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
)
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
"""Of types whose numbers are not read here."""


def looks_like(head: bytes, size: int) -> bool:
    """Whether a file that begins so is one: a length that fits the file, then a JSON object."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_file(path: Path, file: File) -> Checkpoint:
    """The tensors of one file, in the order in which they lie there.

    Raises:
        CheckpointError: the package is not installed; or a header that is too long, is damaged, or names places that
            overlap, leave gaps or lie outside the file.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise CheckpointError("the file is truncated or damaged: its header is longer than the file")
    if length > MAX_HEADER:
        raise CheckpointError(f"the header of the file has {length} bytes: no checkpoint needs more than {MAX_HEADER}")
    tensors: dict[tuple[str, ...], Stored] = {}
    at = 8 + length
    for name, dtype, shape in _header(path):
        if len(tensors) == MAX_TENSORS:
            raise CheckpointError(f"the file holds more than {MAX_TENSORS} tensors")
        if not plausible(shape):
            raise CheckpointError(f"the file is damaged: tensor {shown(name)} has an impossible shape")
        known = DTYPES.get(dtype)
        if known is None and dtype not in BITS:
            raise CheckpointError(f"tensors of type {shown(dtype, 20)} are not read")
        size = math.prod(shape) * (BITS[dtype] if known is None else 8 * SIZES[known]) // 8
        if known is None:
            tensors[name,] = Unreadable(shape, dtype.lower(), f"tensors of type {dtype} are not read")
        else:
            tensors[name,] = Strided(shape, known, Region(file, at, size))
        at += size
    if at != file.size:
        raise CheckpointError("the file is damaged: its tensors do not fill it")
    file.read(0, 0)  # still the file that it was
    return Checkpoint(path, "safetensors", tensors, size=file.size)


def _header(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each tensor. The package checks that they follow one another and fill the file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError("safetensors files need safetensors: pip install 'batchnorm[formats]'") from None
    try:
        with safe_open(path, framework="numpy") as opened:
            parts = ((name, opened.get_slice(name)) for name in opened.offset_keys())
            return [(name, str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts]
    except (SafetensorError, OSError) as error:
        message = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"the file is truncated or damaged: its header is wrong: {shown(message, 160)}") from None
