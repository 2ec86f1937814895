"""`batchnorm check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.report import print_report
from batchnorm.cli.terminal import CommandError, in_one_line
from batchnorm.report import Report


def check(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|FOLDER", help="A checkpoint (.pt .pth .ckpt .safetensors .onnx .h5 .keras), or its folder."
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

    if html is not None and html.exists() and not force:
        raise CommandError(f"{html} exists: choose another name, or --force to replace it")
    with in_one_line((CheckpointError, sources.SourceError)):
        result = checkup.checkup(sources.of_file(path))
    page = Report.of(result)
    if html is not None:
        page.write(html)
    print_report(page, html, as_json)
    if not result.healthy:
        raise typer.Exit(1)
