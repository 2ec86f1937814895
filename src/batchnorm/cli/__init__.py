"""The command line: parse, call, print, and exit with a status.

The commands and their options are in `cli.report` and `cli.bench`.

Results go to standard output, progress to standard error. Exit status: 2 with one line for a mistake, 130 if
interrupted, 1 if a benchmark finds a wrong result or a check finds an error.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from batchnorm import __version__
from batchnorm.cli import bench, report, terminal
from batchnorm.cli.terminal import CommandError, print_error
from batchnorm.runs.run import RunError

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, context_settings=_HELP)

_AnyUsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""click's ClickException; its module depends on typer's version."""


def _print_version(version: bool) -> None:
    if version:
        print(f"batchnorm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch normalization for PyTorch: what do gamma and beta do?"""


for command in (report.study, report.report, report.show, report.check, bench.bench):
    app.command(context_settings=_HELP)(command)


def main() -> None:
    """Run the program and exit with its status."""
    try:
        status = terminal.command(app)(prog_name="batchnorm", standalone_mode=False)
    except (CommandError, RunError) as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except _AnyUsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help, if it was not printed yet
            print(str(error), end="\n" if str(error) else "", file=sys.stderr)
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = "batchnorm" if context is None else context.command_path
        _fail(f"{error.format_message()} (see {command} --help)")  # type: ignore[attr-defined]
    sys.exit(status if isinstance(status, int) else 0)


_ARGUMENTS = (
    *("act", "batch", "called", "compile", "data", "data_dir", "device", "filter", "force", "lr", "models"),
    *("out", "repeats", "seeds", "steps", "threads"),
)
"""Arguments of the library that are options with the same name."""

_NAMED = re.compile(
    rf"""(?<![\w./-])(?P<name>{"|".join(_ARGUMENTS)})=(?P<value>True\b|\.\.\.|'[^']*'|"[^"]*")"""
    rf"""|^(?P<number>{"|".join(_ARGUMENTS)})(?= must be )"""
)


def as_options(message: str) -> str:
    """Replace arguments by options in a message of the library.

    force=True becomes --force, data_dir=... --data-dir, device='cuda' --device cuda, and "steps must be" at the start
    "--steps must be".
    """

    def option(match: re.Match[str]) -> str:
        name = "--" + (match["name"] or match["number"]).replace("_", "-")
        value = match["value"]
        if value in (None, "True", "..."):
            return name
        word = value[1:-1]
        return f"{name} {word if re.fullmatch('[a-z0-9-]+', word) else value}"

    return _NAMED.sub(option, message.replace("scope='full'", "--full"))


def _fail(message: str) -> None:
    print_error(f"batchnorm: error: {as_options(message)}")
    sys.exit(2)
