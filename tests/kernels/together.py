"""Programs of Triton's interpreter that wait for each other, as those of a cooperative launch do on a GPU.

The interpreter runs a program to its end before it begins the next one: one that waits for a later one would wait for
ever. Here each program is a thread. One of them runs at a time, until it ends or has asked an atomic counter in vain.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ROUNDS = 100
"""How often a program may ask in vain before nobody will ever come."""


class _Program(threading.Thread):
    """One program, at a standstill unless `go` lets it run on."""

    def __init__(self, builder: Any, run: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.builder, self.index, self.run_it = builder, builder.grid_idx, run
        self.turn, self.over, self.ended, self.error = threading.Semaphore(0), threading.Semaphore(0), False, None
        self.asked = False

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.run_it()
        except BaseException as error:
            self.error = error
        self.ended = True
        self.over.release()

    def go(self) -> None:
        """Let it run until it ends or waits."""
        self.builder.grid_idx = self.index
        self.turn.release()
        self.over.acquire()
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Called in the thread: let others run."""
        self.over.release()
        self.turn.acquire()


class _Together:
    """Stands in for a kernel's function: begins a program at each call, and with the last one ends them all."""

    def __init__(self, fn: Callable[..., None], builder: Any) -> None:
        self.fn, self.builder, self.programs = fn, builder, []
        self.__signature__, self.__globals__ = inspect.signature(fn), fn.__globals__
        self.__annotations__, self.__name__ = fn.__annotations__, fn.__name__

    def __call__(self, **arguments: object) -> None:
        self.programs.append(_Program(self.builder, lambda: self.fn(**arguments)))
        self.programs[-1].start()
        self.programs[-1].go()
        if len(self.programs) < self.builder.grid_dim[0]:
            return
        for _ in range(ROUNDS):
            for program in self.programs:
                if not program.ended:
                    program.go()
        waiting = sum(not program.ended for program in self.programs)
        assert waiting == 0, f"{waiting} of {len(self.programs)} programs wait for ever"


@contextmanager
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """All programs of a launch run at once. Yields how often one of them waited, a number for each wait."""
    from triton.runtime import interpreter

    waits: list[int] = []
    builder, begin = interpreter.interpreter_builder, interpreter.GridExecutor.__init__
    count = builder.create_atomic_rmw

    def init(self: Any, fn: Callable[..., None], *how: object, **rest: object) -> None:
        begin(self, fn, *how, **rest)
        self.fn = _Together(fn, builder)

    def rmw(operator: object, pointer: object, value: Any, *rest: object) -> object:
        thread = threading.current_thread()
        if isinstance(thread, _Program):
            asks = not value.data.any()  # since it adds nothing
            if asks and thread.asked:
                waits.append(1)
                thread.wait()
            thread.asked = asks
        return count(operator, pointer, value, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "__init__", init)
    monkeypatch.setattr(builder, "create_atomic_rmw", rmw, raising=False)
    yield waits
