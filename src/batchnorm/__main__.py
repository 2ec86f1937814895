"""The command `batchnorm`, and `python -m batchnorm`."""

from __future__ import annotations

import sys

from batchnorm.importing import load_module


def main() -> None:
    """Run the command line; exit status 2 and one line where a library of an extra is missing."""
    try:
        run = load_module("batchnorm.cli").main
        run()
    except ModuleNotFoundError as error:
        print(f"batchnorm: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
