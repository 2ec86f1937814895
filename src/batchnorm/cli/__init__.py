"""The command line. Thin: it parses, calls and prints.

Results go to standard output, progress to standard error. A mistake gets one line and exit status 2, what is
interrupted 130; a benchmark that finds a wrong result, and a check that finds an error, end with 1.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from batchnorm import __version__
from batchnorm.cli import (
    bench,
    check,
    report,
    study,
    terminal,
)
from batchnorm.cli.terminal import CommandError, say
from batchnorm.runs.run import RunError

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, context_settings=_HELP)

_AnyUsageError: type[Exception] = typer.BadParameter.__mro__[2]
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
        status = terminal.command(app)(prog_name="batchnorm", standalone_mode=False)
    except (CommandError, RunError) as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except _AnyUsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its text, if any, is the help that was not printed yet
            print(str(error), end="\n" if str(error) else "", file=sys.stderr)
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = "batchnorm" if context is None else context.command_path
        _fail(f"{error.format_message()} (see {command} --help)")  # type: ignore[attr-defined]
    sys.exit(status if isinstance(status, int) else 0)


_ARGUMENTS = (
    *("act", "called", "compile", "data", "data_dir", "device", "filter", "force", "lr", "models", "out", "repeats"),
    *("seeds", "steps", "threads"),
)
"""The library's arguments that are options here, of the same name."""

_NAMED = re.compile(
    rf"""(?<![\w./-])(?P<name>{"|".join(_ARGUMENTS)})=(?P<value>True\b|\.\.\.|'[^']*'|"[^"]*")"""
    rf"""|^(?P<number>{"|".join(_ARGUMENTS)})(?= must be )"""
)


def as_options(message: str) -> str:
    """A message of the library with its arguments as options.

    force=True is --force here, data_dir=... is --data-dir, device='cuda' is --device cuda, and a message that starts
    with "steps must be" starts with "--steps must be".
    """

    def option(found: re.Match[str]) -> str:
        name = "--" + (found["name"] or found["number"]).replace("_", "-")
        value = found["value"]
        if value in (None, "True", "..."):
            return name
        word = value[1:-1]
        return f"{name} {word if re.fullmatch('[a-z0-9-]+', word) else value}"

    return _NAMED.sub(option, message.replace("scope='full'", "--full"))


def _fail(message: str) -> None:
    say(f"batchnorm: error: {as_options(message)}")
    sys.exit(2)
