"""`batchnorm report` and `batchnorm show`: what Runs say, as a page and in the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated

import typer

from batchnorm.cli.terminal import print_json, tell, usage_error
from batchnorm.report import Report
from batchnorm.runs.run import Run


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
    if follow and not found.kind.follow:
        raise usage_error(f"--follow is for trainings that are being watched, this is a {what}")
    if pictures is not None and not found.kind.pictures:
        raise usage_error(f"--pictures is for studies, this is a {what}")
    try:
        path = found.target(out)
    except ValueError as error:
        raise usage_error(str(error)) from error
    if follow:
        found = _follow(run, path, every, found.kind.follow)
    else:
        found.write(path)
    if pictures is not None:
        resolve_name(found.kind.pictures)(found.page.sections, pictures)
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
        run = (
            ""
            if found.kind.several or not isinstance(found.subjects[0], Run)
            else f"run     {found.subjects[0].path}\n"
        )
        print(f"\n{run}report  {page}")


def _open(folders: Sequence[Path]) -> Report:
    try:
        return Report.of(folders)
    except ValueError as error:
        raise usage_error(str(error)) from error


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


def _follow(folders: Sequence[Path], path: Path, seconds: float, follow: str) -> Report:
    """Write the page until no training is running any more; the last report."""
    last: Report

    def write(runs: list[Run], refresh: int | None) -> Path:
        nonlocal last
        last = Report.of(runs)
        last.write(path, refresh)
        steps = [(run.label, run.reading.last_step) for run in last.summary]
        reached = (f"{name} {'has no step yet' if step is None else f'at step {step}'}" for name, step in steps)
        tell(f"{path}: {', '.join(reached)}")
        return path

    try:
        resolve_name(follow)(folders, write, seconds)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    return last
