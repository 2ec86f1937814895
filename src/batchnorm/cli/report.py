"""`batchnorm report` and `batchnorm show`: what Runs say, as a page and in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.terminal import in_one_line, print_json, tell, usage_error
from batchnorm.report import KINDS, Report
from batchnorm.runs.run import Run, RunError, write_text_atomically


def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN", help="The Run's folder; of trainings, several.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page; by default report.html in the Run, if it is one.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="Also write a study's main charts as PNG into here.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Write it again while the training goes on.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="With --follow: how often to look.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Render the report of a study, or of one or several watched trainings, and print the answer. Needs no torch."""
    if not every > 0:
        raise usage_error(f"--every must be a positive number of seconds, got {every:g}")
    if follow:
        _wait_for(run, every)
    found = _open(run)
    what = found.kind.what
    if follow and not found.kind.several:
        raise usage_error(f"--follow is for trainings that are being watched, this is a {what}")
    if pictures is not None and found.kind is not KINDS["study"]:
        raise usage_error(f"--pictures is for studies, this is a {what}")
    with in_one_line((), usage=ValueError):
        path = found.target(out)
    if follow:
        try:
            for found in followed(run, path, every):
                steps = ((each.label, each.reading.last_step) for each in found.summary)
                reached = (f"{name} {'has no step yet' if step is None else f'at step {step}'}" for name, step in steps)
                tell(f"{path}: {', '.join(reached)}")
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    else:
        found.write(path)
    if pictures is not None:
        from batchnorm.report.study.charts import write_pictures

        write_pictures(found.page.sections, pictures)
    print_report(found, path, as_json)


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The Run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show a Run in the terminal: its layers over time, the answer and the findings. Writes nothing, needs no torch."""
    print_report(_open([run]), None, as_json)


def print_report(found: Report, page: Path | None, as_json: bool) -> None:
    """The answer, and where the page is if one was written."""
    if as_json:
        print_json(found.describe(page))
        return
    found.show()
    if page is not None:
        run = f"run     {found.subjects[0].path}\n" if found.kind is KINDS["study"] else ""
        print(f"\n{run}report  {page}")


def _open(folders: Sequence[Path]) -> Report:
    with in_one_line((), usage=ValueError):
        return Report.of(folders)


def _wait_for(folders: Sequence[Path], seconds: float) -> None:
    """Until every folder holds a Run: the page may be asked for before the training starts."""
    waiting = [folder for folder in folders if not (folder / "run.json").exists()]
    if waiting:
        tell(f"waiting for a Run in {', '.join(str(folder) for folder in waiting)} (Ctrl-C to stop)")
    try:
        while not all((folder / "run.json").exists() for folder in folders):
            time.sleep(seconds)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def followed(
    folders: Sequence[Path], path: Path, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Report]:
    """Write the page, and again whenever a Run has new files, until none is running; each report, once it is written.

    Looks every `seconds`; an open page loads itself again as often, until it is written for the last time. Ctrl-C
    (KeyboardInterrupt) leaves a page that does not load itself again.
    """
    seen = None
    try:
        while True:
            now = _files(folders)
            runs = [Run.open(folder) for folder in folders]
            if now != seen:
                running = any(run.info.get("status") == "running" for run in runs)
                found = Report.of(runs)
                found.write(path, max(1, round(seconds)) if running else None)
                seen = now
                yield found
                if not running:
                    return
            sleep(seconds)
    except (KeyboardInterrupt, RunError, GeneratorExit):
        if seen is not None:
            lines = path.read_text(encoding="utf-8").split("\n")
            write_text_atomically(path, "\n".join(line for line in lines if not line.startswith('<meta name="reload"')))
        raise


def _files(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Which files the Runs consist of, how large and how old: cheap to ask, and another when anything was added."""
    found = []
    for folder in folders:
        with suppress(OSError):  # removed in between: Run.open raises
            for entry in (*sorted(folder.glob("*.parquet")), folder / "run.json"):
                status = entry.stat()
                found.append((str(entry), status.st_size, status.st_mtime_ns))
    return found
