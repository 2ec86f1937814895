"""TensorProto: a tensor of ONNX, whose numbers lie in the model, in one of several fields, or in a file beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np
import numpy.typing as npt

from batchnorm.checks.readers._parsing.elements import SIZES, Strided, float64, plausible, raw_type
from batchnorm.checks.readers._parsing.files import (
    Bytes,
    File,
    Region,
    opened,
)
from batchnorm.checks.readers._parsing.protobuf import (
    BYTES,
    DAMAGED,
    Field,
    Message,
    signed,
)
from batchnorm.checks.readers._parsing.stored import (
    CheckpointError,
    Stored,
    Unreadable,
    shown,
)

DTYPES = (
    {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool"}
    | {10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16"}
    | {17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz"}
    | {21: "uint4", 22: "int4", 23: "float4_e2m1", 24: "float8_e8m0fnu", 25: "uint2", 26: "int2"}
)
RAW, FLOATS, INT32S, INT64S, DOUBLES, UINT64S = 9, 4, 5, 7, 10, 11
FIXED = {FLOATS: ("float32",), DOUBLES: ("float64",)}
MAX_VARINTS = 2**22
"""Elements that are unpacked from seven bits a byte: none so written is large."""


@dataclass(frozen=True, slots=True)
class Varints(Stored):
    """Elements written as varints; of floating types the varint is the bits."""

    source: Bytes

    def _read(self) -> npt.NDArray[np.float64]:
        count = math.prod(self.shape)
        if count > MAX_VARINTS or self.source.size > 10 * count:
            raise CheckpointError(DAMAGED)
        codes = np.frombuffer(self.source.read(0, self.source.size), dtype=np.uint8)
        ends = np.flatnonzero(codes < 0x80)
        if len(ends) != count or (count and ends[-1] != len(codes) - 1):
            raise CheckpointError(DAMAGED)
        if not count:
            return np.empty(self.shape)
        starts = np.concatenate(([0], ends[:-1] + 1))
        shifts = 7 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
        parts = (codes & 0x7F).astype(np.uint64) << np.minimum(shifts, 63).astype(np.uint64)
        bits = np.add.reduceat(parts, starts)
        raw = bits.astype(f"<u{SIZES[self.dtype]}").view(raw_type(self.dtype))
        return float64(raw, self.dtype).reshape(self.shape)


@dataclass
class Tensors:
    """Reads TensorProtos of a model that lies in `folder`; `beside` are the files beside it that they refer to."""

    message: Message
    model: Path
    beside: dict[str, File | None] = field(default_factory=dict)

    def read(self, start: int, end: int) -> tuple[str, Stored]:
        """Name and place of the tensor between two places."""
        name, shape, code, external = "", [], 0, False
        data: dict[int, list[Field]] = {}
        place: dict[str, str] = {}
        for part in self.message.fields(start, end):
            if part.number == 1:
                for size in self.message.numbers(part):
                    shape.append(signed(size))
                    if len(shape) > 32:
                        raise CheckpointError(DAMAGED)
            elif part.number == 2:
                code = part.value
            elif part.number == 8:
                name = self.message.text(part)
            elif part.number == 13 and part.wire == BYTES:
                place |= self._entry(part)
            elif part.number == 14:
                external = part.value == 1
            elif part.number in (RAW, FLOATS, INT32S, INT64S, DOUBLES, UINT64S):
                data[part.number] = [*data.get(part.number, [])[:1], part]
        sizes = tuple(shape)
        if not plausible(sizes):
            raise CheckpointError(DAMAGED)
        dtype = DTYPES.get(code, "unknown")
        if dtype not in SIZES:
            return name, Unreadable(sizes, dtype, f"tensors of type {dtype} are not read")
        return name, self._external(sizes, dtype, place) if external else self._inside(sizes, dtype, data)

    def floats(self, part: Field) -> Stored:
        """The packed floats of a field."""
        if part.wire != BYTES or (part.end - part.value) % 4:
            raise CheckpointError(DAMAGED)
        return self._whole(((part.end - part.value) // 4,), "float32", self._region(part))

    def _entry(self, part: Field) -> dict[str, str]:
        found = {1: "", 2: ""}
        for side in self.message.fields(part.value, part.end):
            if side.number in found:
                found[side.number] = self.message.text(side)
        return {found[1]: found[2]}

    def _inside(self, shape: tuple[int, ...], dtype: str, data: dict[int, list[Field]]) -> Stored:
        if not data:
            return Unreadable(shape, dtype, "the model does not hold the numbers of this tensor")
        number, parts = next(iter(data.items()))
        if len(data) > 1 or len(parts) > 1 or parts[0].wire != BYTES:
            return Unreadable(shape, dtype, "the numbers of this tensor are in pieces: save the model again")
        region = self._region(parts[0])
        if number == RAW or dtype in FIXED.get(number, ()):
            return self._whole(shape, dtype, region)
        return Unreadable(shape, dtype, DAMAGED) if number in FIXED else Varints(shape, dtype, region)

    def _region(self, part: Field) -> Region:
        return Region(self.message.source, part.value, part.end - part.value)

    def _whole(self, shape: tuple[int, ...], dtype: str, region: Region) -> Stored:
        if math.prod(shape) * SIZES[dtype] != region.size:
            raise CheckpointError("the model is damaged: a tensor has not as many bytes as its shape says")
        return Strided(shape, dtype, region)

    def _external(self, shape: tuple[int, ...], dtype: str, place: dict[str, str]) -> Stored:
        location = place.get("location", "")
        if location not in self.beside:
            self.beside[location] = self._beside(location)
        file = self.beside[location]
        if file is None:
            return Unreadable(shape, dtype, f"the numbers lie in {shown(location)}, which is missing beside the model")
        needed = math.prod(shape) * SIZES[dtype]
        offset, length = (_decimal(place.get(key), least) for key, least in (("offset", 0), ("length", needed)))
        if length < needed or offset + needed > file.size:
            raise CheckpointError(f"{shown(location)} beside the model is truncated or belongs to another model")
        return Strided(shape, dtype, Region(file, offset, needed))

    def _beside(self, location: str) -> File | None:
        """The file, which must lie in the model's folder, or where links to both lead to one folder."""
        named = PureWindowsPath(location)  # knows both separators and drives
        if not location or "\0" in location or named.drive or named.root or ".." in named.parts:
            raise CheckpointError(f"the model refers to the file {shown(location)}, which is not in its folder")
        path = self.model.parent / location
        try:
            found = path.resolve()
            homes = {self.model.parent.resolve(), self.model.resolve().parent}
            exists = found.exists()
        except (OSError, RuntimeError):
            return None
        if not any(found.is_relative_to(home) for home in homes):
            raise CheckpointError(f"the model refers to the file {shown(location)}, which is not in its folder")
        return opened(found) if exists else None


def _decimal(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise CheckpointError(DAMAGED)
    return int(text)
