"""`python -m batchnorm` is the command `batchnorm`."""

from batchnorm.cli import main

main()
