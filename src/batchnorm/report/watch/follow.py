"""A page that is written again while its training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from batchnorm.report.html import write_text
from batchnorm.report.watch.html import render, target
from batchnorm.report.watch.page import WatchPage, build
from batchnorm.runs.run import Run, RunError

Signature = tuple[tuple[str, int, int], ...]


def follow(
    folders: Sequence[Path],
    path: Path | None,
    seconds: float,
    tell: Callable[[WatchPage, Path], None],
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[WatchPage, Path]:
    """Write the page, and again whenever a Run has new files, until none is running; `tell` of each time.

    Looks every `seconds`; an open page loads itself again as often, until it is written for the last time. Ctrl-C
    (KeyboardInterrupt) leaves a page that does not load itself again.
    """
    seen: Signature | None = None
    written = None
    try:
        while True:
            now = signature(folders)
            runs = [Run.open(folder) for folder in folders]
            if now != seen:
                running = any(run.info.get("status") == "running" for run in runs)
                place = target(runs, path)
                page = build(runs)
                write_text(render(page, max(1, round(seconds)) if running else None), place)
                written, seen = place, now
                tell(page, place)
                if not running:
                    return page, place
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
        except OSError:  # removed in between: Run.open tells
            continue
    return tuple(found)


def still(page: Path) -> None:
    """The same page without its loading itself again."""
    lines = page.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if not line.startswith('<meta name="reload"')]
    write_text("\n".join(kept), page)
