"""The directory of a zip archive: names, places and sizes of its entries, each held against the file.

Python's zipfile trusts the sizes that an archive declares, and reads its directory whole. This one is bounded, and
refuses what a writer of checkpoints never does: names twice, encryption, methods other than stored and deflated.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from batchnorm.checks.readers._parsing.files import Bytes, CheckpointError, Deflated, Memory, Region, Window, shown
from batchnorm.checks.readers._parsing.stored import MAX_TENSORS

END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
MAX_ENTRIES = 2 * MAX_TENSORS
"""A storage for each tensor, and room for what else is saved."""
MAX_NAMES = 2**24
"""Bytes of all names together: 128 for each of the most entries."""
MAX_HELD = 2**24
"""A compressed entry that is read from end to end is unpacked into memory, up to this."""
MAX_RATIO = 1032
"""What deflate can reach: an entry that claims more is a lie."""
STORED, DEFLATED = 0, 8
UNKNOWN = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in an archive: where its local header lies, its bytes packed and unpacked, and the method."""

    header: int
    packed: int
    size: int
    method: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The entries of a zip file by name, in the order of its directory."""

    source: Bytes
    entries: Mapping[str, Entry]

    def open(self, name: str) -> Bytes:
        """The bytes of an entry, in place; a deflated one is unpacked as it is read.

        Raises:
            CheckpointError: no such entry, or its bytes are not all there.
        """
        entry = self.entry(name)
        packed = Region(self.source, self.start(name), entry.packed)
        return packed if entry.method == STORED else Deflated(packed, entry.size)

    def entry(self, name: str) -> Entry:
        """What the directory says of a name."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"the archive is damaged: it has no entry {shown(name)}")
        return entry

    def start(self, name: str) -> int:
        """Where the bytes of an entry begin."""
        entry = self.entry(name)
        header = LOCAL.unpack(self.source.read(entry.header, LOCAL.size))
        if header[0] != b"PK\x03\x04":
            raise CheckpointError(f"the archive is damaged: entry {shown(name)} is not where its directory says")
        start = entry.header + LOCAL.size + header[9] + header[10]
        if start + entry.packed > self.source.size:
            raise CheckpointError("the archive is truncated or damaged: an entry ends after the file")
        return int(start)

    def through(self, name: str) -> Bytes:
        """The bytes of an entry that is read from end to end, by a Window."""
        found = self.open(name)
        if isinstance(found, Region):
            return found
        if found.size > MAX_HELD:
            raise CheckpointError(f"the compressed entry {shown(name)} is too large: store it uncompressed")
        return Memory(found.read(0, found.size))


def directory(source: Bytes) -> Archive:
    """The archive that a file is.

    Raises:
        CheckpointError: its directory is damaged, too large or not that of a checkpoint.
    """
    count, length, start = _end(source)
    if count > MAX_ENTRIES:
        raise CheckpointError(f"the archive has {count} entries: no checkpoint has more than {MAX_ENTRIES}")
    entries: dict[str, Entry] = {}
    window = Window(source, start, start + length)
    names = 0
    for _ in range(count):
        fields = ENTRY.unpack(window.take(ENTRY.size))
        if fields[0] != b"PK\x01\x02":
            raise CheckpointError("the archive is damaged: its directory cannot be read")
        names += fields[10]
        if names > MAX_NAMES:
            raise CheckpointError("the archive has too many long names to be a checkpoint")
        name = window.take(fields[10]).decode("utf-8", "replace")
        extra = window.take(fields[11])
        window.at += fields[12]  # a comment
        if name in entries:
            raise CheckpointError(f"the archive has two entries {shown(name)}: it was tampered with")
        entries[name] = _entry(fields, extra, name, source.size)
    return Archive(source, entries)


def _end(source: Bytes) -> tuple[int, int, int]:
    """How many entries there are, and the length and the start of their directory."""
    tail = min(source.size, END.size + 2**16)
    found = source.read(source.size - tail, tail)
    at = found.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(found):
        raise CheckpointError("the archive is truncated: it has no directory; copy or save it again")
    _, _, _, _, count, length, start, _ = END.unpack_from(found, at)
    locator = source.size - tail + at - END64_LOCATOR.size
    if locator >= 0 and (mark := source.read(locator, END64_LOCATOR.size)).startswith(b"PK\x06\x07"):
        end64 = END64.unpack(source.read(END64_LOCATOR.unpack(mark)[2], END64.size))
        if end64[0] != b"PK\x06\x06":
            raise CheckpointError("the archive is damaged: its directory is not where it says")
        count, length, start = end64[7], end64[8], end64[9]
    if start + length > source.size:
        raise CheckpointError("the archive is truncated or damaged: its directory lies outside the file")
    return count, length, start


def _entry(fields: tuple[int, ...], extra: bytes, name: str, size: int) -> Entry:
    flags, method, packed, unpacked, header = fields[3], fields[4], fields[8], fields[9], fields[16]
    wide = _wide(extra)
    for at, value in enumerate((unpacked, packed, header)):
        if value == UNKNOWN:
            if not wide:
                break
            number, wide = wide[0], wide[1:]
            unpacked, packed, header = ((number if i == at else v) for i, v in enumerate((unpacked, packed, header)))
    if flags & 1:
        raise CheckpointError(f"entry {shown(name)} of the archive is encrypted")
    if method not in (STORED, DEFLATED):
        raise CheckpointError(
            f"entry {shown(name)} of the archive is compressed in an unknown way: store it uncompressed"
        )
    honest = packed == unpacked if method == STORED else unpacked <= MAX_RATIO * packed
    if header + packed > size or not honest:
        raise CheckpointError(
            f"the archive is truncated or damaged: entry {shown(name)} cannot have the size it claims"
        )
    return Entry(header, packed, unpacked, method)


def _wide(extra: bytes) -> list[int]:
    """The 64-bit numbers of the field that stands for those which do not fit 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            whole = extra[at + 4 : at + 4 + length]
            return [number for (number,) in struct.iter_unpack("<Q", whole[: len(whole) // 8 * 8])]
        at += 4 + length
    return []
