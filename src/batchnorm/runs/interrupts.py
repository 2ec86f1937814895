"""Ctrl-C between two steps, where nothing can swallow it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is only noted, for whoever asks the yielded function between two steps; a second one interrupts at once.

    Raised wherever Python happens to be, KeyboardInterrupt can fall into code that swallows it (a finalizer, a
    callback), and the work would go on. Threads other than the main one, and programs with a handler of their own, are
    left alone.
    """
    pressed = threading.Event()
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed.is_set
        return

    def note(number: int, frame: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
