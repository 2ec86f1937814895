"""The wire format of protobuf: numbered fields, of which long ones are passed over where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batchnorm.checks.readers._parsing.files import Bytes, Window
from batchnorm.checks.readers._parsing.stored import CheckpointError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 2**20
"""Fields read of one file: some fifty thousand nodes, and a few seconds of work."""
MAX_TEXT = 2**25
"""Bytes of names kept of one file, by what they take in memory."""
DAMAGED = "the file is truncated or damaged: it is not a valid ONNX model"


@dataclass(frozen=True, slots=True)
class Field:
    """A field: its number, its wire type, and its number or, for bytes, where they start and end."""

    number: int
    wire: int
    value: int
    end: int = 0


class Message:
    """Reads fields of messages inside one file, at a common cost."""

    def __init__(self, source: Bytes) -> None:
        self.source = source
        self.window = Window(source)
        self.count = 0
        self.text_size = 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message between two places. Others may be read between two of them."""
        at = start
        while at < end:
            self.count += 1
            if self.count > MAX_FIELDS:
                raise CheckpointError("the model has too many nodes to be read")
            self.window.at = at
            tag = self._varint()
            number, wire = tag >> 3, tag & 7
            if wire == VARINT:
                field = Field(number, wire, self._varint())
                at = self.window.at
            elif wire in (FIXED32, FIXED64):
                width = 4 if wire == FIXED32 else 8
                field = Field(number, wire, int.from_bytes(self.window.take(width), "little"))
                at = self.window.at
            elif wire == BYTES:
                length = self._varint()
                field = Field(number, wire, self.window.at, self.window.at + length)
                at = field.end
            else:
                raise CheckpointError(DAMAGED)
            if number == 0 or at > end:
                raise CheckpointError(DAMAGED)
            yield field

    def text(self, field: Field) -> str:
        """The text of a field."""
        if field.wire != BYTES:
            raise CheckpointError(DAMAGED)
        length = field.end - field.value
        self.text_size += 4 * length + 64
        if self.text_size > MAX_TEXT:
            raise CheckpointError("the model has too many long names to be read")
        return self.source.read(field.value, length).decode("utf-8", "replace") if length > 64 else self._short(field)

    def numbers(self, field: Field) -> Iterator[int]:
        """The integers of a repeated field, of which each may stand alone or all together."""
        if field.wire == VARINT:
            yield field.value
            return
        if field.wire != BYTES:
            raise CheckpointError(DAMAGED)
        self.window.at = field.value
        while self.window.at < field.end:
            yield self._varint()

    def _short(self, field: Field) -> str:
        self.window.at = field.value
        return self.window.take(field.end - field.value).decode("utf-8", "replace")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.window.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (2**64 - 1)
        raise CheckpointError(DAMAGED)


def signed(value: int) -> int:
    """An int64 or int32, which are written as 64 bits."""
    return value - 2**64 if value >= 2**63 else value
