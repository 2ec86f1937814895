"""Bytes of a file, read where and when they are asked for: never more of them, and never past the end."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

BLOCK = 2**16
"""What is read at once where small pieces follow one another."""
DENSE = 2**24
"""Bytes of a file that are read at once for few elements far apart: cheaper than a read for each."""
MAX_INFLATED = 2**26
"""Of a compressed part no more is unpacked, however far into it a tensor lies: it takes a second."""
MAX_PATH = 4096
"""Characters of a path that messages show: those of every path that Linux opens."""


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


class Bytes(Protocol):
    """A run of bytes with a known length."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def dense(self) -> int:
        """How many are read at once rather than in pieces."""

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`.

        Raises:
            CheckpointError: they are not all there.
        """


@dataclass(frozen=True, slots=True)
class File:
    """A regular file as it was when it was opened first; one that has changed since is not read further."""

    dense: ClassVar[int] = DENSE
    path: Path
    size: int
    modified: int

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`."""
        if start < 0 or length < 0 or start + length > self.size:
            raise CheckpointError("the file is truncated or damaged: it ends before what it refers to", self.path)
        pieces = []
        try:
            descriptor = _descriptor(self.path)
            try:
                now = os.fstat(descriptor)
                if (now.st_size, now.st_mtime_ns) != (self.size, self.modified):
                    raise CheckpointError("the file changed while it was read: read it again", self.path)
                while length:
                    piece = os.pread(descriptor, length, start)
                    if not piece:
                        raise CheckpointError("the file changed while it was read: read it again", self.path)
                    pieces.append(piece)
                    start, length = start + len(piece), length - len(piece)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"the file cannot be read: {error.strerror or error}", self.path) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def opened(path: Path) -> File:
    """The file at a path.

    Raises:
        CheckpointError: there is none, it may not be read, or it is no regular file.
    """
    try:
        # Looked at before it is opened: opening a device can do something, opening a FIFO can wait for ever.
        _regular(path, os.stat(path))
        descriptor = _descriptor(path)
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise CheckpointError("there is no such file", path) from None
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror or error}", path) from None
    except ValueError:  # a zero byte in the name
        raise CheckpointError("this is no file name", path) from None
    _regular(path, found)
    return File(path, found.st_size, found.st_mtime_ns)


def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def _regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("this is no regular file", path)


@dataclass(frozen=True, slots=True)
class Region:
    """A run of bytes inside another."""

    whole: Bytes
    start: int
    size: int

    @property
    def dense(self) -> int:
        """As of what it lies in."""
        return self.whole.dense

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start` of the region."""
        if start < 0 or length < 0 or start + length > self.size:
            raise CheckpointError("the file is truncated or damaged: a part ends before what refers to it")
        return self.whole.read(self.start + start, length)


@dataclass(frozen=True, slots=True)
class Deflated:
    """The `size` bytes that a deflated run unpacks to. A read unpacks from the start, and keeps what it wants."""

    dense: ClassVar[int] = MAX_INFLATED
    packed: Bytes
    size: int

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` unpacked bytes from `start`."""
        if start < 0 or length < 0 or start + length > self.size:
            raise CheckpointError("the file is truncated or damaged: a part ends before what refers to it")
        if start + length > MAX_INFLATED:
            raise CheckpointError(f"a compressed part is larger than {MAX_INFLATED >> 20} MiB: store it uncompressed")
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        kept = bytearray()
        at = taken = 0
        try:
            while len(kept) < length:
                if unpacker.unconsumed_tail:
                    packed = unpacker.unconsumed_tail
                else:
                    packed = self.packed.read(taken, min(BLOCK, self.packed.size - taken))
                    taken += len(packed)
                piece = unpacker.decompress(packed, BLOCK)
                if not piece and (unpacker.eof or not packed):
                    raise CheckpointError("the file is truncated or damaged: a compressed part is too short")
                kept += piece[max(0, start - at) : max(0, start + length - at)]
                at += len(piece)
        except zlib.error:
            raise CheckpointError("the file is damaged: a compressed part cannot be unpacked") from None
        return bytes(kept)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at hand."""

    dense: ClassVar[int] = MAX_INFLATED
    held: bytes

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.held)

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`."""
        if start < 0 or length < 0 or start + length > len(self.held):
            raise CheckpointError("the file is truncated or damaged: a part ends before what refers to it")
        return self.held[start : start + length]


class Window:
    """Bytes in order, a block at a time, from a position that the reader moves."""

    def __init__(self, source: Bytes, at: int = 0, end: int | None = None) -> None:
        self.source = source
        self.at = at
        self.end = source.size if end is None else min(end, source.size)
        self._block = b""
        self._start = 0

    def take(self, length: int) -> bytes:
        """The next `length` bytes.

        Raises:
            CheckpointError: fewer are left.
        """
        begin = self.at - self._start
        if begin >= 0 and begin + length <= len(self._block):
            self.at += length
            return self._block[begin : begin + length]
        if length < 0 or self.at + length > self.end:
            raise CheckpointError("the file is truncated or damaged: it ends before what it refers to")
        if length > BLOCK // 2:
            found = self.source.read(self.at, length)
        else:
            self._start, self._block = self.at, self.source.read(self.at, min(BLOCK, self.end - self.at))
            found = self._block[:length]
        self.at += length
        return found

    def line(self, limit: int) -> bytes:
        """What stands before the next line feed, which is passed, of at most `limit` bytes."""
        begin = self.at
        found = self.take(min(limit + 1, self.end - self.at))
        line, feed, _ = found.partition(b"\n")
        if not feed:
            raise CheckpointError("the file is damaged: a line in it does not end")
        self.at = begin + len(line) + 1
        return line


def well_formed(name: str) -> str:
    """A name from a file as Unicode that can be written: half a surrogate pair becomes a question mark."""
    return name if name.isascii() else name.encode("utf-8", "replace").decode()
