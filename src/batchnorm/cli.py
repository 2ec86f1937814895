"""The command line: `batchnorm study`, `report`, `show` and `bench`. Thin: it parses, calls and prints.

Results go to standard output, progress to standard error. A mistake gets one line and exit status 2, what is
interrupted 130, and a benchmark that finds a wrong result 1.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm import __version__
from batchnorm.record.run import Run, RunError

if TYPE_CHECKING:
    from batchnorm.report.summary import Row

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""The common base of what typer raises on a bad command line; where it lives differs between typer's versions."""


class CommandError(Exception):
    """What the user did that cannot be done, in one line."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"batchnorm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch normalization for PyTorch: what do gamma and beta do?"""


@app.command()
def study(
    data: Annotated[str, typer.Option(help="digits (embedded), mnist, fashion-mnist or cifar10.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="The folder with the files as published; without it, OpenML is asked.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, 0 to N-1.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of SGD for each arm, 60 rows a step.")] = 5000,
    lr: Annotated[float, typer.Option(help="The learning rate.")] = 0.1,
    act: Annotated[str, typer.Option(help="sigmoid (the paper's) or relu.")] = "sigmoid",
    out: Annotated[
        Path | None, typer.Option(help="The folder for the Run and its report.html; by default a new one in runs/.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the Run that --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Train the paper's network four ways and answer: do gamma and beta undo batch normalization, and why (not)?"""
    from batchnorm.study.data import DataError
    from batchnorm.study.experiment import Config
    from batchnorm.study.runner import ConfigError, conduct, default_folder

    config = Config(act=act, seeds=seeds, steps=steps, lr=lr)
    folder = out if out is not None else default_folder(data, act)
    try:
        with _progress("training") as progress:
            run = conduct(
                config, data, data_dir, folder, force=force, arguments=sys.argv[1:], progress=progress, tell=_tell
            )
    except (ConfigError, DataError) as error:
        raise CommandError(str(error)) from error
    _print_run(run, as_json)
    if run.info["status"] == "interrupted":
        raise typer.Exit(130)


@app.command()
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
    opened = [Run.open(folder) for folder in run]
    kind = _kind(opened)
    if kind == "study":
        if follow:
            raise CommandError("--follow is for trainings that are being watched, this is a study")
        from batchnorm.report.html import write

        path = write(opened[0], out)
        if pictures is not None:
            from batchnorm.report.page import build
            from batchnorm.report.pictures import write_pictures

            write_pictures(build(opened[0]), pictures)
        _print_run(opened[0], as_json, path)
        return
    if pictures is not None:
        raise CommandError("--pictures is for studies, this is a watched training")
    if len(opened) > 1 and out is None:
        raise CommandError("several Runs make one page: say where it goes with --out FILE")
    if not every > 0:
        raise CommandError(f"--every must be a positive number of seconds, got {every:g}")
    _report_watched(run, out, every if follow else None, as_json)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The Run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show a Run in the terminal: its layers over time, the answer and the findings. Writes nothing, needs no torch."""
    opened = Run.open(run)
    if _kind([opened]) == "study":
        _print_run(opened, as_json)
        return
    from rich.console import Console

    from batchnorm.report.watch import terminal
    from batchnorm.report.watch.described import described
    from batchnorm.report.watch.page import tell

    (told,) = tell([opened])
    if as_json:
        _print_json(described([told], None))
    else:
        terminal.show(told, Console())


def _kind(runs: Sequence[Run]) -> str:
    """The kind that all of them are of."""
    kinds = {str(each.info.get("kind")) for each in runs}
    if len(kinds) > 1:
        raise CommandError(f"one page shows Runs of one kind, these are of kinds {' and '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind not in ("study", "watch"):
        raise CommandError(f"{runs[0].path} is a Run of kind {kind!r}, which this batchnorm does not know")
    if kind == "study" and len(runs) > 1:
        raise CommandError("a page shows one study: give one RUN")
    return kind


def _report_watched(folders: Sequence[Path], out: Path | None, every: float | None, as_json: bool) -> None:
    from rich.console import Console

    from batchnorm.report.html import write_text
    from batchnorm.report.watch import html, terminal
    from batchnorm.report.watch.described import described
    from batchnorm.report.watch.follow import follow
    from batchnorm.report.watch.page import WatchPage, build

    def told(page: WatchPage, path: Path) -> None:
        steps = ", ".join(f"{run.label} at step {run.reading.last_step}" for run in page.runs)
        _tell(f"{path}: {steps}")

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
        _print_json(described(page.runs, path))
        return
    console = Console()
    if len(page.runs) == 1:
        terminal.show(page.runs[0], console)
    else:
        terminal.run_lines(page.runs, console)
    print(f"\nreport  {path}")


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A dozen cases, in under a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every shape, layout, type, variant and mode.")] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Whole training steps of ResNet-50, MobileNetV2 and EfficientNet-B0.")
    ] = False,
    only: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="Only cases with these words, as 'channels_last bn+relu'.")
    ] = "",
    with_compile: Annotated[bool, typer.Option("--compile", help="Also torch.compile; needs a C++ compiler.")] = False,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads; by default as many as it takes.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds for each case; by default until it is steady.")] = None,
    allocator: Annotated[
        str, typer.Option(help="tuned (freed memory stays with the process) or default (as the system has it).")
    ] = "tuned",
    out: Annotated[
        Path | None, typer.Option(help="The file for the result; by default a new one, in benchmarks/ or here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the result that --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    render: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure nothing: print a stored result as Markdown.")
    ] = None,
) -> None:
    """Time the layers beside PyTorch's, JAX's and what memory allows. What is wrong gets no time and exit status 1."""
    from batchnorm.bench import record as records
    from batchnorm.bench.allocator import POLICIES, start_anew

    if allocator not in POLICIES:
        raise CommandError(f"unknown --allocator {allocator!r}: use {' or '.join(POLICIES)}")
    if quick and full:
        raise CommandError("--quick and --full exclude each other")
    try:
        if render is not None:
            from batchnorm.bench.table import markdown

            print(markdown(records.load(render)))
            return
        from batchnorm.bench import conduct, table

        settings = conduct.Settings(
            "quick" if quick else "full" if full else "default", models, only, with_compile, threads, repeats
        )
        conduct.check(settings)
        if out is not None:
            records.check_vacant(out, force=force)
        start_anew(allocator)
        with _progress("measuring") as progress:
            record, path = conduct.conduct(
                settings, out, force=force, arguments=sys.argv[1:], progress=progress, tell=_tell
            )
    except records.BenchError as error:
        raise CommandError(str(error)) from error
    if as_json:
        print(records.as_json(record))
    else:
        table.show(record)
        print(f"\nresult  {path}")
    if record["status"] == "interrupted":
        raise typer.Exit(130)
    if table.red(record):
        raise typer.Exit(1)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with the time left, from the first word of (done, total) to the yielded function on."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=None)

    def told(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield told
    finally:
        if bar.live.is_started:
            bar.stop()


def _print_run(run: Run, as_json: bool, path: Path | None = None) -> None:
    from batchnorm.report.answer import answer
    from batchnorm.report.summary import summary

    page = path or run.path / "report.html"
    found, rows = answer(run), summary(run)
    if as_json:
        described: dict[str, Any] = {"run": str(run.path), "report": str(page), "status": run.info.get("status")}
        described |= {"answer": asdict(found), "summary": [asdict(row) for row in rows]}
        _print_json(described)
        return
    _print_table(rows)
    _print_text("\n\n".join(found.lines()))
    print(f"\nrun     {run.path}\nreport  {page}")


def _print_json(value: Any) -> None:
    print(json.dumps(_unknown_as_null(value), indent=2, allow_nan=False))


def _print_text(text: str) -> None:
    """Wrapped between words in a terminal, as it is into a file or a pipe."""
    from rich.console import Console

    console = Console()
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _unknown_as_null(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, dict):
        return {key: _unknown_as_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_unknown_as_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from batchnorm.report.summary import COLUMNS, COLUMNS_NOTE

    # A range on a line of its own under its median, and narrow edges: the table fits in 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=COLUMNS_NOTE, caption_justify="left")
    for name in COLUMNS:
        table.add_column(name.replace(" ", "\n"), overflow="fold", justify="left" if name == COLUMNS[0] else "right")
    for row in rows:
        table.add_row(*(cell.replace(" [", "\n[") for cell in row.cells()))
    Console().print(table, end="\n\n")


def main() -> None:
    """The program: exit status 0, 2 with one line on standard error for a mistake, 130 when interrupted."""
    try:
        status = app(standalone_mode=False)
    except (CommandError, RunError) as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except _UsageError as error:
        if not str(error):  # no command: the help was printed
            sys.exit(2)
        _fail(f"{error.format_message()} (see batchnorm --help)")  # type: ignore[attr-defined]
    sys.exit(status if isinstance(status, int) else 0)


def _tell(line: str) -> None:
    print(f"\nbatchnorm: {line}", file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    print(f"batchnorm: error: {message}", file=sys.stderr)
    sys.exit(2)
