"""JSON read piece by piece: a header of many megabytes never becomes objects as a whole.

json.loads makes thirty times their size of some texts, and recurses into nested ones. Here a reader steps through an
object's keys and asks for values one at a time, each of a bounded length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from batchnorm.checks.readers._parsing.files import well_formed
from batchnorm.checks.readers._parsing.stored import CheckpointError

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
DAMAGED = "the file is damaged: its header is not the JSON of a checkpoint"


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
                raise CheckpointError(DAMAGED)

    def string(self) -> str:
        """The string that begins here; as a key of `pairs`, with the colon behind it passed."""
        self._next()
        found = _STRING.match(self.text, self.at)
        if found is None:
            raise CheckpointError(DAMAGED)
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
            raise CheckpointError(DAMAGED)

    def _passed(self) -> memoryview:
        self._next()
        found = _VALUE.match(self.text, self.at)
        if found is None:
            raise CheckpointError(DAMAGED)
        self.at = found.end()
        return memoryview(self.text)[found.start() : found.end()]

    def _next(self) -> bytes:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at
        return self.text[self.at : self.at + 1]

    def _expect(self, mark: bytes) -> None:
        if self._next() != mark:
            raise CheckpointError(DAMAGED)
        self.at += 1


def _parsed(text: memoryview) -> Any:
    try:
        return json.loads(str(text, "utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise CheckpointError(DAMAGED) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError(DAMAGED)
    return found
