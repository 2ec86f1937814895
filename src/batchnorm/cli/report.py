"""`batchnorm study`, `report`, `show`, `check` and `diff`: the commands that print a report and write it as a page."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.terminal import in_one_line, keep_file, print_status, progress, usage_error
from batchnorm.report import FILE, KINDS, Report
from batchnorm.runs.run import Run, RunError, write_text_atomically


def study(
    data: Annotated[str, typer.Option(help="digits (embedded), mnist, fashion-mnist or cifar10.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="The folder with the published files; without it, they come from OpenML.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds: 0 to N-1.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of SGD per arm.")] = 5000,
    lr: Annotated[float, typer.Option(help="The learning rate.")] = 0.1,
    act: Annotated[str, typer.Option(help="sigmoid (the paper's) or relu.")] = "sigmoid",
    out: Annotated[
        Path | None, typer.Option(help="The folder for the Run and its report.html; by default a new one in runs/.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the Run that --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Train the paper's network four ways and answer: do gamma and beta undo batch normalization, and why (not)?"""
    from batchnorm.study.data import DataArgumentError, DataError
    from batchnorm.study.experiment import Config
    from batchnorm.study.runner import ConfigError, conduct, default_folder

    config = Config(act=act, seeds=seeds, steps=steps, lr=lr)
    folder = out if out is not None else default_folder(data, act)
    with in_one_line(DataError, usage=(ConfigError, DataArgumentError)), progress("training") as update:
        arguments = sys.argv[1:]
        run = conduct(
            config, data, data_dir, folder, force=force, arguments=arguments, progress=update, message=print_status
        )
    _print(Report.of(run), run.path / FILE, as_json)
    if run.info["status"] == "interrupted":
        raise typer.Exit(130)


def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN", help="The Run's folder; several for trainings.")],
    out: Annotated[
        Path | None, typer.Option(help="The file of the page; by default report.html in the Run's folder.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder for a study's main charts as PNG.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Update the page while the training goes on.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="With --follow: how often to update.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Render the report of a study, or of one or several watched trainings, and print the answer. Needs no torch."""
    if not every > 0:
        raise usage_error(f"--every must be a positive number of seconds, got {every:g}")
    if follow:
        _wait_for(run, every)
    result = _open(run)
    if follow and not result.kind.several:
        raise usage_error(f"--follow is for watched trainings, this is a {result.kind.label}")
    if pictures is not None and result.kind is not KINDS["study"]:
        raise usage_error(f"--pictures is for studies, this is a {result.kind.label}")
    with in_one_line((), usage=ValueError):
        path = result.target(out)
    if follow:
        try:
            for result in followed(run, path, every):
                steps = ((run.label, run.reading.last_step) for run in result.summary)
                reached = (f"{name} {'has no step yet' if step is None else f'at step {step}'}" for name, step in steps)
                print_status(f"{path}: {', '.join(reached)}")
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    else:
        result.write(path)
    if pictures is not None:
        from batchnorm.report.study.pictures import write_pictures

        write_pictures(result.page.sections, pictures)
    _print(result, path, as_json)


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The Run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show a Run in the terminal: its layers over time, the answer and the findings. Writes nothing, needs no torch."""
    _print(_open([run]), None, as_json)


def check(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|FOLDER",
            help="A checkpoint (.pt .pth .ckpt .pt2 .safetensors .onnx .h5 .keras), or its folder.",
        ),
    ],
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Also write the report as a page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a page that --html names.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Find unhealthy batch norm layers in a checkpoint. Exit status: 0 healthy, 1 errors found, 2 unreadable.

    The file is never executed, and only the tensors of norms are read. Needs no torch.
    """
    from batchnorm.checks import check as checkup
    from batchnorm.checks import sources
    from batchnorm.checks.readers import CheckpointError

    keep_file(html, force)
    with in_one_line((CheckpointError, sources.SourceError)):
        result = checkup.checkup(sources.of_file(path))
    page = Report.of(result)
    if html is not None:
        page.write(html)
    _print(page, html, as_json)
    if not result.healthy:
        raise typer.Exit(1)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, or its folder, as for check.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, of any format.")],
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Also write the report as a page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a page that --html names.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Compare the batch norm layers of two checkpoints, by effect on the output. Exit status: 0 equal, 1 different.

    Only differences are printed, the worst first. It is 2 if a file is unreadable. Files are never executed, and only
    the tensors of norms and biases are read. Needs no torch.
    """
    from batchnorm.checks import diff as checks
    from batchnorm.checks import sources
    from batchnorm.checks.readers import CheckpointError

    keep_file(html, force)
    with in_one_line((CheckpointError, sources.SourceError)):
        result = checks.compared(sources.of_file(a), sources.of_file(b))
    page = Report.of(result)
    if html is not None:
        page.write(html)
    _print(page, html, as_json)
    if not result.equal:
        raise typer.Exit(1)


def _print(result: Report, page: Path | None, as_json: bool) -> None:
    """Print the answer, and the path of the page if one was written."""
    if as_json:
        from batchnorm.report.terminal import json_text

        print(json_text(result.describe(page), indent=2))
        return
    result.show()
    if page is not None:
        run = f"run     {result.subjects[0].path}\n" if result.kind is KINDS["study"] else ""
        print(f"\n{run}report  {page}")


def _open(folders: Sequence[Path]) -> Report:
    with in_one_line((), usage=ValueError):
        return Report.of(folders)


def _wait_for(folders: Sequence[Path], seconds: float) -> None:
    """Wait until every folder has a Run: the command may start before the training."""
    waiting = [folder for folder in folders if not (folder / "run.json").exists()]
    if waiting:
        print_status(f"waiting for a Run in {', '.join(str(folder) for folder in waiting)} (Ctrl-C to stop)")
    try:
        while not all((folder / "run.json").exists() for folder in folders):
            time.sleep(seconds)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def followed(
    folders: Sequence[Path], path: Path, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Report]:
    """Write the page whenever a Run has new files, until none is running; yield each report that was written.

    The files are checked every `seconds`, and an open page reloads itself as often. The last page does not, also after
    Ctrl-C (KeyboardInterrupt).
    """
    written = None
    try:
        while True:
            files = _files(folders)
            runs = [Run.open(folder) for folder in folders]
            if files != written:
                running = any(run.info.get("status") == "running" for run in runs)
                result = Report.of(runs)
                result.write(path, max(1, round(seconds)) if running else None)
                written = files
                yield result
                if not running:
                    return
            sleep(seconds)
    except (KeyboardInterrupt, RunError, GeneratorExit):
        if written is not None:
            lines = path.read_text(encoding="utf-8").split("\n")
            write_text_atomically(path, "\n".join(line for line in lines if not line.startswith('<meta name="reload"')))
        raise


def _files(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of the Runs' files, which differ after every write."""
    files = []
    for folder in folders:
        with suppress(OSError):  # removed meanwhile: Run.open raises
            for file in (*sorted(folder.glob("*.parquet")), folder / "run.json"):
                status = file.stat()
                files.append((str(file), status.st_size, status.st_mtime_ns))
    return files
