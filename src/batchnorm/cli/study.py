"""`batchnorm study`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.terminal import CommandError, print_json, print_text, progress, tell, usage_error
from batchnorm.runs.run import Run

if TYPE_CHECKING:
    from batchnorm.report.study.terminal import Row


def study(
    data: Annotated[str, typer.Option(help="digits (embedded), mnist, fashion-mnist or cifar10.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="The folder with the files as published; without it, OpenML is asked.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds: 0 to N-1.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of SGD for each arm.")] = 5000,
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
    try:
        with progress("training") as told:
            run = conduct(config, data, data_dir, folder, force=force, arguments=sys.argv[1:], progress=told, tell=tell)
    except (ConfigError, DataArgumentError) as error:
        raise usage_error(str(error)) from error
    except DataError as error:
        raise CommandError(str(error)) from error
    print_run(run, as_json)
    if run.info["status"] == "interrupted":
        raise typer.Exit(130)


def print_run(run: Run, as_json: bool, path: Path | None = None) -> None:
    from batchnorm.report.study.answer import answer
    from batchnorm.report.study.terminal import summary
    from batchnorm.report.tables import jsonable

    page = path or run.path / "report.html"
    found, rows = answer(run), summary(run)
    if as_json:
        described: dict[str, Any] = {"run": str(run.path), "report": str(page), "status": run.info.get("status")}
        described |= {"answer": jsonable(found), "classes": {row.arm: row.classes.as_dict() for row in rows}}
        described |= {"summary": jsonable(rows)}
        print_json(described)
        return
    _print_table(rows)
    print_text("\n\n".join(found.lines()))
    print(f"\nrun     {run.path}\nreport  {page}")


def _print_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from batchnorm.console import write_table
    from batchnorm.report.study.terminal import COLUMNS, COLUMNS_NOTE

    console = Console()
    # A range on a separate line under its median, narrow edges, and one column less: the table fits in 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=COLUMNS_NOTE, caption_justify="left")
    shown = [place for place, name in enumerate(COLUMNS) if name != "gradient diverted"]
    for name in (COLUMNS[place] for place in shown):
        table.add_column(name.replace(" ", "\n"), overflow="fold", justify="left" if name == COLUMNS[0] else "right")
    for row in rows:
        cells = row.cells()
        table.add_row(*(cells[place].replace(" [", "\n[") for place in shown))
    write_table(console, table)
    console.print()
