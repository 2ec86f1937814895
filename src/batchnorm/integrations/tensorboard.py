"""Write a watched Run as TensorBoard event files: `write_events("runs/a", "tb/a")`.

Needs TensorBoard: pip install batchnorm[tensorboard].
"""

from __future__ import annotations

import os

import numpy as np

from batchnorm.importing import load_module
from batchnorm.runs.history import History
from batchnorm.runs.run import Run
from batchnorm.words import ClassCounts

SummaryWriter = load_module("torch.utils.tensorboard").SummaryWriter

MEDIANS = ("undo_index", "undo_angle", "gradient_diverted", "eval_gap", "effective_lr")
CLASSES_SHOWN = ("undone", "away", "dead")
HISTOGRAMS = ("gamma", "beta")


def write_events(run: Run | str | os.PathLike[str], log_dir: str | os.PathLike[str]) -> None:
    """Write each layer's quantities at the recorded steps, and everything that was logged.

    Per layer: medians of undo_index, undo_angle, gradient_diverted, eval_gap and effective_lr over the units, the
    shares of units undone, away and dead, and histograms of gamma and beta.

    Args:
        run: a Run or its folder; of one that is still being recorded, the rows so far.
        log_dir: the folder that TensorBoard reads.

    Raises RunError if there is no watched Run.
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    history = History.read(opened)
    with SummaryWriter(os.fspath(log_dir)) as writer:
        for layer in history.layers:
            columns = {name: layer[name] for name in (*MEDIANS, *HISTOGRAMS, "class")}
            for row, step in enumerate(layer.steps.tolist()):
                values = {name: column[row] for name, column in columns.items()}
                for name in MEDIANS:
                    known = values[name][np.isfinite(values[name])]
                    if known.size:
                        writer.add_scalar(f"{name}/{layer.name}", float(np.median(known)), step)
                classes = ClassCounts.of(values["class"])
                for name in CLASSES_SHOWN if classes.units > classes["unknown"] else ():
                    writer.add_scalar(f"{name}/{layer.name}", classes.share(name), step)
                for name in HISTOGRAMS:
                    if np.isfinite(values[name]).all():
                        writer.add_histogram(f"{name}/{layer.name}", values[name], step)
        if "log" in opened.tables():
            for row in opened.table("log").to_pylist():
                writer.add_scalar(row["name"], row["value"], row["step"])
