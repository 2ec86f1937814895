"""An interpreter of the pickles that torch.save writes, which only describes what is in them.

It knows the opcodes that torch.save writes, in any protocol of pickle, and no other; which names it knows, and what
they make, is in `described`. What a pickle may cost is counted as it is read: each opcode by the memory that it takes
at most.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any

from batchnorm.checks.readers._parsing.described import (
    ALLOWED,
    DAMAGED,
    OTHER,
    PYTHON_2,
    Items,
    Name,
    Tensor,
    called,
)
from batchnorm.checks.readers._parsing.files import CheckpointError, Window, shown

MAX_COST = 2**26
"""Bytes that the objects of one file may take, by the costs below: twenty thousand tensors, some seconds of work."""
STEP, CONTAINER, ENTRY, TENSOR, STRAY = 16, 112, 8, 320, 128
"""Bytes: an opcode (a place on the stack or in the memo), a container, an entry of a tuple, a tensor with its storage,
a place in the memo out of order."""
MAX_STRING = 2**24
"""Bytes of one string. Names are short; some checkpoints carry a configuration or a vocabulary."""
MAX_NAME = 1024
"""Bytes of one line of a GLOBAL: a module or a name in it."""

Persistent = Callable[[tuple[Any, ...]], Any]


class Interpreter:
    """Reads pickles one after another from a window, at a common cost.

    Args:
        window: where the next pickle begins; it is left behind the last one.
        persistent: makes the storage that a persistent id names.
    """

    def __init__(self, window: Window, persistent: Persistent | None = None) -> None:
        self.window = window
        self.persistent = persistent
        self.cost = 0

    def load(self) -> Any:
        """What the next pickle describes: dicts as Items, lists, tuples, scalars, tensors as Tensor, the rest OTHER.

        Raises:
            CheckpointError: it is damaged, refers to what would run code, or costs too much.
        """
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.strays: dict[int, Any] = {}
        try:
            while True:
                self._pay(STEP)
                code = self.window.take(1)
                if code == b".":
                    return self.stack.pop()
                step = STEPS.get(code)
                if step is None:
                    raise CheckpointError(
                        f"the pickle in the file has opcode {code!r}, which torch.save does not write"
                    )
                step(self)
        except (IndexError, KeyError, struct.error, UnicodeDecodeError):
            raise CheckpointError(DAMAGED) from None

    def _pay(self, cost: int) -> None:
        self.cost += cost
        if self.cost > MAX_COST:
            raise CheckpointError("the checkpoint holds too many objects besides tensors: save the state_dict alone")

    def _push(self, value: Any, cost: int = 0) -> None:
        self._pay(cost)
        self.stack.append(value)

    def _skip(self, length: int) -> None:
        self.window.take(length)

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack(form, self.window.take(struct.calcsize(form)))
        return number

    def _scalar(self, form: str) -> None:
        self._push(self._number(form), 32)

    def _taken(self, form: str) -> bytes:
        length = self._number(form)
        if length > MAX_STRING:
            raise CheckpointError("the pickle in the file holds a string too long for a checkpoint")
        self._pay(length)
        return self.window.take(length)

    def _bytes(self, form: str) -> None:
        self._taken(form)
        self._push(OTHER)

    def _text(self, form: str) -> None:
        text = self._taken(form).decode("utf-8", "strict" if form == "<B" else "surrogatepass")
        self._push(text, sys.getsizeof(text))

    def _long(self) -> None:
        self._push(int.from_bytes(self.window.take(self._number("<B")), "little", signed=True), 300)

    def _mark(self) -> None:
        self._pay(CONTAINER)
        self.marks.append(self.stack)
        self.stack = []

    def _marked(self) -> list[Any]:
        found = self.stack
        self.stack = self.marks.pop()
        return found

    def _tuple(self, count: int | None) -> None:
        if count is None:
            entries = self._marked()
        else:
            if len(self.stack) < count:
                raise IndexError
            entries = self.stack[-count:]
            del self.stack[-count:]
        self._push(tuple(entries), CONTAINER + ENTRY * len(entries))

    def _append(self, entries: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise CheckpointError(DAMAGED)
        self._pay(ENTRY * len(entries))
        target += entries

    def _set(self, entries: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not Items or len(entries) % 2:
            raise CheckpointError(DAMAGED)
        self._pay(ENTRY * len(entries))
        target.flat += entries

    def _add(self) -> None:
        self._marked()
        if self.stack[-1] is not OTHER:
            raise CheckpointError(DAMAGED)

    def _frozen_set(self) -> None:
        self._marked()
        self._push(OTHER)

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _put(self, index: int) -> None:
        value = self.stack[-1]
        if index < len(self.memo):
            self.memo[index] = value
        elif index == len(self.memo) and index not in self.strays:
            self.memo.append(value)
        else:
            self._pay(STRAY)
            self.strays[index] = value

    def _get(self, form: str) -> None:
        index = self._number(form)
        self._push(self.memo[index] if index < len(self.memo) else self.strays[index])

    def _global(self) -> None:
        self._name(*(self.window.line(MAX_NAME).decode("utf-8") for _ in range(2)))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise CheckpointError(DAMAGED)
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        full = f"{PYTHON_2.get(module, module)}.{name}"
        if full not in ALLOWED:
            raise CheckpointError(
                f"it holds {shown(full)}, and loading that runs code: a whole model or other objects, no state dict. "
                "If you trust the file, load it and save model.state_dict() instead"
            )
        self._push(ALLOWED[full])

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self._make(function, arguments)

    def _new(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or function.kind.startswith("_rebuild"):
            raise CheckpointError(DAMAGED)
        self._make(function, arguments)

    def _make(self, function: Any, arguments: Any) -> None:
        made = called(function, arguments)
        entries = made.flat if isinstance(made, Items) else made if isinstance(made, tuple) else ()
        self._push(made, TENSOR + ENTRY * len(entries))

    def _build(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], Items | Tensor) and self.stack[-1] is not OTHER:
            raise CheckpointError(DAMAGED)

    def _persist(self) -> None:
        named = self.stack.pop()
        if self.persistent is None or not isinstance(named, tuple):
            raise CheckpointError(DAMAGED)
        self._push(self.persistent(named), TENSOR)


STEPS: dict[bytes, Callable[[Interpreter], None]] = {
    b"\x80": lambda self: self._skip(1),  # the protocol: any, if it uses these opcodes alone
    b"N": lambda self: self._push(None),
    b"\x88": lambda self: self._push(True),
    b"\x89": lambda self: self._push(False),
    b"J": lambda self: self._scalar("<i"),
    b"K": lambda self: self._scalar("<B"),
    b"M": lambda self: self._scalar("<H"),
    b"G": lambda self: self._scalar(">d"),
    b"\x8a": Interpreter._long,
    b"X": lambda self: self._text("<I"),
    b"U": lambda self: self._text("<B"),
    b"(": Interpreter._mark,
    b")": lambda self: self._push(()),
    b"t": lambda self: self._tuple(None),
    b"\x85": lambda self: self._tuple(1),
    b"\x86": lambda self: self._tuple(2),
    b"\x87": lambda self: self._tuple(3),
    b"]": lambda self: self._push([], CONTAINER),
    b"a": lambda self: self._append([self.stack.pop()]),
    b"e": lambda self: self._append(self._marked()),
    b"}": lambda self: self._push(Items(), CONTAINER),
    b"s": Interpreter._set_one,
    b"u": lambda self: self._set(self._marked()),
    b"\x8f": lambda self: self._push(OTHER),  # a set, empty: its entries come as a list to builtins.set
    b"h": lambda self: self._get("<B"),
    b"j": lambda self: self._get("<I"),
    b"q": lambda self: self._put(self._number("<B")),
    b"r": lambda self: self._put(self._number("<I")),
    b"c": Interpreter._global,
    b"R": Interpreter._reduce,
    b"\x81": Interpreter._new,
    b"b": Interpreter._build,
    b"Q": Interpreter._persist,
    # Of protocols 3 to 5, which torch.save writes on demand.
    b"\x95": lambda self: self._skip(8),  # a frame: its length
    b"\x94": lambda self: self._put(len(self.memo) + len(self.strays)),
    b"\x8c": lambda self: self._text("<B"),
    b"\x8d": lambda self: self._text("<Q"),
    b"\x93": Interpreter._stack_global,
    b"\x90": Interpreter._add,
    b"\x91": Interpreter._frozen_set,
    b"C": lambda self: self._bytes("<B"),
    b"B": lambda self: self._bytes("<I"),
    b"\x8e": lambda self: self._bytes("<Q"),
    b"\x96": lambda self: self._bytes("<Q"),
}
