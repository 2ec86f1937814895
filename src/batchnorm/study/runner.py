"""Run a study: check its arguments, load the data, train, measure, and write the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from batchnorm.report import render
from batchnorm.runs.interrupts import noting_interrupts
from batchnorm.runs.run import Run, numbered, provenance
from batchnorm.study.data import Data, load
from batchnorm.study.experiment import Config, describe, study, work


class ConfigError(Exception):
    """A configuration is invalid. The message is one line and says what to do."""


def check(config: Config, data: Data | None = None) -> None:
    """Raise ConfigError if the study cannot be run with these values (and on this data, if given)."""
    if config.act not in ("sigmoid", "relu"):
        raise ConfigError(f"unknown act={config.act!r}: use sigmoid or relu")
    for name, value in (("seeds", config.seeds), ("steps", config.steps)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if not (math.isfinite(config.lr) and config.lr > 0):
        raise ConfigError(f"lr must be a positive number, got {config.lr}")
    if data is not None and len(data.train_x) < config.batch:
        raise ConfigError(f"{data.name} has {len(data.train_x)} training images, fewer than a batch of {config.batch}")


def default_folder(*about: str) -> Path:
    """The name of a new folder in runs/, with the time in it."""
    first = Path("runs") / "-".join(["study", *about, f"{datetime.now(UTC):%Y%m%d-%H%M%S}"])
    return next(folder for folder in numbered(first) if not folder.exists())


def conduct(
    config: Config,
    data: str,
    data_dir: Path | None,
    out: Path,
    *,
    force: bool = False,
    arguments: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    message: Callable[[str], None] = lambda line: None,
) -> Run:
    """Run the study into the folder `out`, write its report and return the Run.

    KeyboardInterrupt ends the training early: the Run's status is then "interrupted", and the report is about the rows
    measured so far. `progress(done, total)` is called after each step, `message(line)` after an interrupt. Raises
    ConfigError, DataError or RunError.
    """
    check(config)
    Run.check_vacant(out, force=force)
    loaded = load(data, data_dir)
    check(config, loaded)
    run = Run.create(out, "study", force=force, config=describe(config, loaded), **provenance(arguments))
    started, done = time.monotonic(), 0

    def advance(units: int) -> None:
        nonlocal done
        done += units
        progress(done, work(config))
        if interrupted():
            raise KeyboardInterrupt

    status, threads = "failed", torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small are slower with several threads
    try:
        with noting_interrupts() as interrupted:
            study(config, loaded, run, advance)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        message("interrupted: writing the report of what was measured ...")
    finally:
        torch.set_num_threads(threads)
        run.note(seconds=round(time.monotonic() - started, 1))
        run.finish(status)
    try:
        render(run)
    except KeyboardInterrupt:
        message(f"no report written; what was measured is in {run.path}: batchnorm report {run.path} renders it")
        raise
    return run
