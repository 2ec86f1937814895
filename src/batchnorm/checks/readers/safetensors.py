"""safetensors: eight bytes for the length of a header, the header in JSON, then the numbers of every tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from batchnorm.checks.readers._parsing.elements import SIZES, Strided, plausible
from batchnorm.checks.readers._parsing.files import File, Region, opened, well_formed
from batchnorm.checks.readers._parsing.stored import (
    MAX_TENSORS,
    Checkpoint,
    CheckpointError,
    Stored,
    Unreadable,
    shown,
)

MAX_DEPTH = 6
"""Brackets inside brackets in one value; the headers read here have two."""


def _nested() -> bytes:
    """A value in brackets: these are counted to MAX_DEPTH, and not held against each other."""
    piece = rb'[^"{}\[\]]++|' + _STRING.pattern
    inside = piece
    for _ in range(MAX_DEPTH - 1):
        inside = piece + rb"|[{\[](?:" + inside + rb")*+[}\]]"
    return rb"[{\[](?:" + inside + rb")*+[}\]]"


# Possessive, so that no match takes more time or memory than the text is long.
_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"')
_VALUE = re.compile(_STRING.pattern + rb"|[-+.0-9A-Za-z]++|" + _nested())
DAMAGED_HEADER = "the file is damaged: its header is not the JSON of a checkpoint"


class Text:
    """A JSON text, and where we are in it."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.at = 0

    def pairs(self) -> Iterator[str]:
        """The keys of the object that begins here, in order. After each, the caller takes its value."""
        self._expect(b"{")
        if self._next() == b"}":
            self.at += 1
            return
        while True:
            yield self.string()
            after = self._next()
            self.at += 1
            if after == b"}":
                return
            if after != b",":
                raise CheckpointError(DAMAGED_HEADER)

    def string(self) -> str:
        """The string that begins here; as a key of `pairs`, with the colon behind it passed."""
        self._next()
        found = _STRING.match(self.text, self.at)
        if found is None:
            raise CheckpointError(DAMAGED_HEADER)
        self.at = found.end()
        value = _parsed(memoryview(found[0]))
        if self._next() == b":":
            self.at += 1
        return well_formed(str(value))

    def value(self, limit: int) -> Any:
        """The value that begins here, of at most `limit` bytes, parsed; keys that stand twice are refused."""
        text = self._passed()
        if len(text) > limit:
            raise CheckpointError("the file is damaged: an entry of its header is far too long")
        return _parsed(text)

    def skip(self) -> None:
        """Past the value that begins here, whatever it is."""
        self._passed()

    def end(self) -> None:
        """Nothing but space is left."""
        if self._next():
            raise CheckpointError(DAMAGED_HEADER)

    def _passed(self) -> memoryview:
        self._next()
        found = _VALUE.match(self.text, self.at)
        if found is None:
            raise CheckpointError(DAMAGED_HEADER)
        self.at = found.end()
        return memoryview(self.text)[found.start() : found.end()]

    def _next(self) -> bytes:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at
        return self.text[self.at : self.at + 1]

    def _expect(self, mark: bytes) -> None:
        if self._next() != mark:
            raise CheckpointError(DAMAGED_HEADER)
        self.at += 1


def _parsed(text: memoryview) -> Any:
    try:
        return json.loads(str(text, "utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise CheckpointError(DAMAGED_HEADER) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError(DAMAGED_HEADER)
    return found


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
                raise CheckpointError(DAMAGED_HEADER)
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
        raise CheckpointError(DAMAGED_HEADER)
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(place) or len(place) != 2:
        raise CheckpointError(DAMAGED_HEADER)
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


INDEX = ".index.json"
MODELS = ("model.safetensors" + INDEX, "pytorch_model.bin" + INDEX, "model.safetensors", "pytorch_model.bin")
"""What the model in a folder is called, by agreement, beside files of its optimizer and settings; the first counts."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx", ".h5", ".hdf5", ".keras", ".th", ".pkl")
MAX_INDEX = 2**24
"""Bytes of an index: 256 for each of the most tensors."""
MAX_SHARDS = 1024
MAX_LISTED = 10_000
"""Entries of a folder that are looked at."""

Read = Callable[[Path], Checkpoint]


def chosen(folder: Path) -> Path:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: none, or several and none of them called as `MODELS`.
    """
    try:
        names = sorted(entry.name for entry, _ in zip(folder.iterdir(), range(MAX_LISTED), strict=False))
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error.strerror or error}", folder) from None
    for name in MODELS:
        if name in names:
            return folder / name
    found = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not found:
        raise CheckpointError("there is no checkpoint in the folder", folder)
    if len(found) > 1:
        listed = ", ".join(shown(name, 40) for name in found[:8]) + (", …" if len(found) > 8 else "")
        raise CheckpointError(f"there are {len(found)} checkpoints in the folder, name one: {listed}", folder)
    return folder / found[0]


def read_index(path: Path, read: Read) -> Checkpoint:
    """The tensors of every shard that an index names: {"weight_map": {tensor: file}}. `read` reads one shard."""
    names = _weight_map(path)
    shards = sorted(set(names.values()))
    if not shards or len(shards) > MAX_SHARDS:
        raise CheckpointError(f"the index names {len(shards)} files: a checkpoint has 1 to {MAX_SHARDS}")
    tensors: dict[tuple[str, ...], Stored] = {}
    parts = []
    for shard in shards:
        if Path(shard).name != shard or shard in (".", "..") or "\\" in shard:
            raise CheckpointError(f"the index names the file {shown(shard)}, which is not beside it")
        part = read(path.parent / shard)
        parts.append(part)
        tensors |= part.tensors
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"the files hold more than {MAX_TENSORS} tensors")
    tensors = {(name,): tensors[name,] for name in names if (name,) in tensors} | tensors  # the index has the order
    missing = next((name for name in names if (name,) not in tensors), None)
    if missing is not None:
        raise CheckpointError(f"the index names the tensor {shown(missing)}, which its file does not hold")
    size = opened(path).size + sum(part.size for part in parts)
    return replace(parts[0], path=path.parent, tensors=tensors, size=size)


def _weight_map(path: Path) -> dict[str, str]:
    file = opened(path)
    if file.size > MAX_INDEX:
        raise CheckpointError(f"the index has {file.size} bytes: no checkpoint needs more than {MAX_INDEX}")
    text = Text(file.read(0, file.size))
    names: dict[str, str] = {}
    for key in text.pairs():
        if key != "weight_map":
            text.skip()
            continue
        for name in text.pairs():
            names[name] = text.string()
            if len(names) > MAX_TENSORS:
                raise CheckpointError(f"the index names more than {MAX_TENSORS} tensors")
    text.end()
    if not names:
        raise CheckpointError(DAMAGED_HEADER)
    return names
