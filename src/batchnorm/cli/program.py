"""The program: its commands, and how it ends."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from batchnorm import __version__
from batchnorm.cli import bench, check, report, study
from batchnorm.cli.terminal import CommandError
from batchnorm.runs.run import RunError

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, context_settings=_HELP)

_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""The common base of what typer raises on a bad command line; where it lives differs between typer's versions."""


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


for command in (study.study, report.report, report.show, check.check, bench.bench):
    app.command(context_settings=_HELP)(command)


def main() -> None:
    """The program: exit status 0, 2 with one line on standard error for a mistake, 130 when interrupted."""
    try:
        status = app(prog_name="batchnorm", standalone_mode=False)
    except (CommandError, RunError) as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except _UsageError as error:
        if not str(error):  # no command: the help was printed
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = "batchnorm" if context is None else context.command_path
        _fail(f"{error.format_message()} (see {command} --help)")  # type: ignore[attr-defined]
    sys.exit(status if isinstance(status, int) else 0)


def _as_options(message: str) -> str:
    """A message of the library with its remedies as options: force=True is --force here."""
    return re.sub(r"\b(force)=True\b", r"--\1", message)


def _fail(message: str) -> None:
    print(f"batchnorm: error: {_as_options(message)}", file=sys.stderr)
    sys.exit(2)
