"""The command `batchnorm`, and `python -m batchnorm`."""

from __future__ import annotations

import sys

from batchnorm.importing import load_module


def main() -> None:
    """Run the command line; print one line and exit with status 2 if an optional library is missing."""
    try:
        run = load_module("batchnorm.cli").main
        run()
    except ModuleNotFoundError as error:
        print(f"batchnorm: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
