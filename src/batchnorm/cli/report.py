"""`batchnorm report` and `batchnorm show`: what Runs say, as a page and in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.study import print_run
from batchnorm.cli.terminal import CommandError, print_json, tell, usage_error
from batchnorm.runs.run import Run

STUDIES: dict[str, Callable[[Run, bool], None]] = {"study": print_run}
"""What prints a study, by the kind of its Run."""


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
    opened = [Run.open(folder) for folder in run]
    kind = _kind(opened)
    if kind in STUDIES and follow:
        raise usage_error("--follow is for trainings that are being watched, this is a study")
    if kind == "study":
        from batchnorm.report.html import write

        path = write(opened[0], out)
        if pictures is not None:
            from batchnorm.report.study.page import build
            from batchnorm.report.study.pictures import write_pictures

            write_pictures(build(opened[0]), pictures)
        print_run(opened[0], as_json, path)
        return
    if pictures is not None:
        raise usage_error("--pictures is for studies, this is a watched training")
    if len(opened) > 1 and out is None:
        raise usage_error("several Runs make one page: say where it goes with --out FILE")
    _report_watched(run, out, every if follow else None, as_json)


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The Run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show a Run in the terminal: its layers over time, the answer and the findings. Writes nothing, needs no torch."""
    opened = Run.open(run)
    kind = _kind([opened])
    if kind in STUDIES:
        STUDIES[kind](opened, as_json)
        return
    from rich.console import Console

    from batchnorm.report.watch import terminal
    from batchnorm.report.watch.page import tell
    from batchnorm.report.watch.terminal import described

    (told,) = tell([opened])
    if as_json:
        print_json(described([told], None))
    else:
        terminal.show(told, Console())


def _reached(step: int | None) -> str:
    return "has no step yet" if step is None else f"at step {step}"


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


def _kind(runs: Sequence[Run]) -> str:
    """The kind that all of them are of."""
    kinds = {str(each.info.get("kind")) for each in runs}
    if len(kinds) > 1:
        raise usage_error(f"one page shows Runs of one kind, these are of kinds {' and '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind not in STUDIES and kind != "watch":
        raise CommandError(f"{runs[0].path} is a Run of kind {kind!r}, which this batchnorm does not know")
    if kind in STUDIES and len(runs) > 1:
        raise usage_error("a page shows one study: give one RUN")
    return kind


def _report_watched(folders: Sequence[Path], out: Path | None, every: float | None, as_json: bool) -> None:
    from rich.console import Console

    from batchnorm.report.html import write_text
    from batchnorm.report.watch import html, terminal
    from batchnorm.report.watch.follow import follow
    from batchnorm.report.watch.page import WatchPage, build
    from batchnorm.report.watch.terminal import described

    def told(page: WatchPage, path: Path) -> None:
        steps = ", ".join(f"{run.label} {_reached(run.reading.last_step)}" for run in page.runs)
        tell(f"{path}: {steps}")

    if every is not None:
        try:
            page, path = follow(folders, out, every, told)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    else:
        runs = [Run.open(folder) for folder in folders]
        page, path = build(runs), html.target(runs, out)
        write_text(html.render(page), path)
    if as_json:
        print_json(described(page.runs, path))
        return
    console = Console()
    if len(page.runs) == 1:
        terminal.show(page.runs[0], console)
    else:
        terminal.run_lines(page.runs, console)
    print(f"\nreport  {path}")
