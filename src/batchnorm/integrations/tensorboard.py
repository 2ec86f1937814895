"""A watched Run as TensorBoard's event files, `write_events("runs/a", "tb/a")`.

Needs TensorBoard: pip install batchnorm[tensorboard].
"""

from __future__ import annotations

import os

import numpy as np

from batchnorm.runs.history import History
from batchnorm.runs.run import Run
from batchnorm.words import ClassCounts

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError("TensorBoard's event files need TensorBoard: pip install batchnorm[tensorboard]") from error

MEDIANS = ("undo_index", "undo_angle", "gradient_diverted", "eval_gap", "effective_lr")
CLASSES_SHOWN = ("undone", "away", "dead")
HISTOGRAMS = ("gamma", "beta")


def write_events(run: Run | str | os.PathLike[str], log_dir: str | os.PathLike[str]) -> None:
    """Per layer: the median unit's undo_index, undo_angle, gradient_diverted, eval_gap and effective_lr, the shares of
    units undone, away and dead, histograms of gamma and beta; and what was logged; at the steps recorded.

    Args:
        run: a Run, or its folder; one that is still being recorded is written as far as it is.
        log_dir: the folder that TensorBoard reads.

    Raises RunError where there is no watched Run to read.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    history = History.read(opened)
    with SummaryWriter(os.fspath(log_dir)) as writer:
        for layer in history.layers:
            for name in MEDIANS:
                for step, values in zip(layer.steps.tolist(), layer[name], strict=True):
                    known = values[np.isfinite(values)]
                    if known.size:
                        writer.add_scalar(f"{name}/{layer.name}", float(np.median(known)), step)
            for step, codes in zip(layer.steps.tolist(), layer["class"], strict=True):
                classes = ClassCounts.of(codes)
                if classes.units > classes["unknown"]:
                    for name in CLASSES_SHOWN:
                        writer.add_scalar(f"{name}/{layer.name}", classes.share(name), step)
            for name in HISTOGRAMS:
                for step, values in zip(layer.steps.tolist(), layer[name], strict=True):
                    if np.isfinite(values).all():
                        writer.add_histogram(f"{name}/{layer.name}", values, step)
        if "log" in opened.tables():
            for row in opened.table("log").to_pylist():
                writer.add_scalar(row["name"], row["value"], row["step"])
