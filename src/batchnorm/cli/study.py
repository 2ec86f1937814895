"""`batchnorm study`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.terminal import CommandError, print_json, print_text, progress, tell, usage_error
from batchnorm.record.run import Run

if TYPE_CHECKING:
    from batchnorm.report.summary import Row


def study(
    what: Annotated[str, typer.Argument(metavar="[undo|regimes]", help="What to study.")] = "undo",
    data: Annotated[str, typer.Option(help="digits (embedded), mnist, fashion-mnist or cifar10.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="The folder with the files as published; without it, OpenML is asked.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, 0 to N-1; by default 3 (regimes: 5).")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of SGD for each arm; by default 5000 (400).")] = None,
    lr: Annotated[float, typer.Option(help="The learning rate.")] = 0.1,
    act: Annotated[str, typer.Option(help="sigmoid (the paper's) or relu.")] = "sigmoid",
    out: Annotated[
        Path | None, typer.Option(help="The folder for the Run and its report.html; by default a new one in runs/.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the Run that --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Train the paper's network four ways and answer: do gamma and beta undo batch normalization, and why (not)?

    `study regimes` trains small networks on small batches, batches not drawn at random and padded sequences, and
    answers: when is each of the layers for them worth it?
    """
    if what == "regimes":
        if (data, data_dir, act) != ("digits", None, "sigmoid"):
            raise usage_error(
                "study regimes has the embedded digits and networks of its own: leave out --data and --act"
            )
        _regimes(seeds, steps, lr, out, force, as_json)
        return
    if what != "undo":
        raise usage_error(f"unknown study {what!r}: use undo or regimes")
    from batchnorm.study.data import DataArgumentError, DataError
    from batchnorm.study.experiment import Config
    from batchnorm.study.runner import ConfigError, conduct, default_folder

    defaults = Config()
    config = Config(
        act=act,
        seeds=defaults.seeds if seeds is None else seeds,
        steps=defaults.steps if steps is None else steps,
        lr=lr,
    )
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


def _regimes(seeds: int | None, steps: int | None, lr: float, out: Path | None, force: bool, as_json: bool) -> None:
    from batchnorm.study.regimes.experiment import Config
    from batchnorm.study.regimes.runner import conduct
    from batchnorm.study.runner import ConfigError

    given = {name: value for name, value in (("seeds", seeds), ("steps", steps)) if value is not None}
    try:
        with progress("training") as told:
            run = conduct(Config(lr=lr, **given), out, force=force, arguments=sys.argv[1:], progress=told, tell=tell)
    except ConfigError as error:
        raise usage_error(str(error)) from error
    print_regimes(run, as_json)
    if run.info["status"] == "interrupted":
        raise typer.Exit(130)


def print_regimes(run: Run, as_json: bool, path: Path | None = None) -> None:
    from batchnorm.report.regimes.terminal import described, show

    page = path or run.path / "report.html"
    if as_json:
        print_json({"run": str(run.path), "report": str(page), "status": run.info.get("status"), **described(run)})
        return
    show(run)
    print(f"\nrun     {run.path}\nreport  {page}")


def print_run(run: Run, as_json: bool, path: Path | None = None) -> None:
    from batchnorm.report.answer import answer
    from batchnorm.report.jsonable import jsonable
    from batchnorm.report.summary import summary

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
    from batchnorm.report.summary import COLUMNS, COLUMNS_NOTE

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
