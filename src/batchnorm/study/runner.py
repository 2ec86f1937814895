"""The study from the first argument to the last file: check, load, train, and write the report of what there is."""

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
    """A configuration that cannot be run. The message is one line and says what to do."""


def check(config: Config, data: Data | None = None) -> None:
    """Raise ConfigError where the study cannot be run with these values (on this data, once it is known)."""
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
    """A new folder's name for each study, so that none is ever in another's way."""
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
    tell: Callable[[str], None] = lambda line: None,
) -> Run:
    """Run the study into the folder `out` and write its report; returns the finished Run.

    KeyboardInterrupt ends the training early: the Run's status is then "interrupted", and the report is of what was
    measured. `progress(done, total)` is told how far it is, `tell` what happens when it is interrupted. Raises
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
    torch.set_num_threads(1)  # layers this small are not worth sharing: threads would wait for each other
    try:
        with noting_interrupts() as interrupted:
            study(config, loaded, run, advance)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        tell("interrupted: writing the report of what was measured ...")
    finally:
        torch.set_num_threads(threads)
        run.note(seconds=round(time.monotonic() - started, 1))
        run.finish(status)
    try:
        render(run)
    except KeyboardInterrupt:
        tell(f"no report written; what was measured is in {run.path}: batchnorm report {run.path} renders it")
        raise
    return run
