"""`batchnorm study`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.report import print_report
from batchnorm.cli.terminal import in_one_line, print_status, progress
from batchnorm.report import FILE, Report


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
    print_report(Report.of(run), run.path / FILE, as_json)
    if run.info["status"] == "interrupted":
        raise typer.Exit(130)
