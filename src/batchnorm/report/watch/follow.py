"""A page that is written again while its training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from batchnorm.files import write_text_atomically
from batchnorm.runs.run import Run, RunError

Signature = tuple[tuple[str, int, int], ...]


def follow(
    folders: Sequence[Path],
    write: Callable[[list[Run], int | None], Path],
    seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """`write(runs, refresh)` the page, and again whenever a Run has new files, until none is running.

    Looks every `seconds`; an open page loads itself again as often (`refresh`, in whole seconds), until it is written
    for the last time. Ctrl-C (KeyboardInterrupt) leaves a page that does not load itself again.
    """
    seen: Signature | None = None
    written = None
    try:
        while True:
            now = signature(folders)
            runs = [Run.open(folder) for folder in folders]
            if now != seen:
                running = any(run.info.get("status") == "running" for run in runs)
                written, seen = write(runs, max(1, round(seconds)) if running else None), now
                if not running:
                    return
            sleep(seconds)
    except (KeyboardInterrupt, RunError):
        if written is not None:
            still(written)
        raise


def signature(folders: Sequence[Path]) -> Signature:
    """Which files the Runs consist of, how large and how old: cheap to ask, and another when anything was added."""
    found = []
    for folder in folders:
        try:
            entries = [*sorted(folder.glob("*.parquet")), folder / "run.json"]
            for entry in entries:
                status = entry.stat()
                found.append((str(entry), status.st_size, status.st_mtime_ns))
        except OSError:  # removed in between: Run.open raises
            continue
    return tuple(found)


def still(page: Path) -> None:
    """The same page without its loading itself again."""
    lines = page.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if not line.startswith('<meta name="reload"')]
    write_text_atomically(page, "\n".join(kept))
