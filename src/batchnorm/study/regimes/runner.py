"""The study of regimes from the first argument to the last file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from batchnorm.report.regimes.html import write
from batchnorm.runs.provenance import provenance
from batchnorm.runs.run import Run
from batchnorm.study.data import load
from batchnorm.study.regimes.experiment import Config, study, work
from batchnorm.study.runner import check_numbers, default_folder, seen_through

KIND = "regimes"


def conduct(
    config: Config,
    out: Path | None = None,
    *,
    force: bool = False,
    arguments: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Run:
    """Run the study into the folder `out`, or a new one in runs/, and write its report; returns the finished Run.

    KeyboardInterrupt ends the training early: the Run's status is then "interrupted", and the report is of what was
    measured. Raises ConfigError or RunError.
    """
    check_numbers(config.seeds, config.steps, config.lr)
    out = default_folder(KIND) if out is None else out
    Run.check_vacant(out, force=force)
    data = load("digits")
    run = Run.create(out, KIND, force=force, config={"data": data.name, **asdict(config)}, **provenance(arguments))
    seen_through(run, work(config), lambda advance: study(config, data, run, advance), write, progress, tell)
    return run
