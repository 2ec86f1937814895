"""The command line. Thin: it parses, calls and prints.

Results go to standard output, progress to standard error. A mistake gets one line and exit status 2, what is
interrupted 130; a benchmark that finds a wrong result, and a check that finds an error, end with 1.

program    the commands together, and the exit status
terminal   what they share
"""

from batchnorm.cli.program import app, main

__all__ = ["app", "main"]
