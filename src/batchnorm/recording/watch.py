"""watch(): record a Run around any training loop.

with bn.watch(model, "runs/a") as run:
    for x, y in loader:
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchnorm.recording._recorder import attach
from batchnorm.recording._recorder import probe as probes
from batchnorm.recording._recorder.writer import Lock, Writer, claim, default_path, number, rank_and_size, step_number
from batchnorm.recording.steps import Schedule, Steps, describe_schedule, log_spaced
from batchnorm.restoring import unwrapped
from batchnorm.runs.run import STATUSES, Run, RunError


def watch(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    schedule: Schedule | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    force: bool = False,
    also: Sequence[type[nn.Module]] = (),
) -> Recorder:
    """Record what gamma and beta of a model's batch norm layers do while it trains; a context manager.

    A recorded step stores, per layer, the mean and biased variance of its batch, dgamma = Σg·xhat, dbeta = Σg and Σg²,
    with g the gradient at gamma·xhat + beta. It also stores gamma, beta, the running statistics after the step and the
    norms of the weights below. This package's layers compute these sums in the loops that they run anyway; torch.nn's
    layers need one more pass over input and gradient. Other steps run with nothing attached.

    A step is a step() of the first optimizer that has parameters of the model. Without an optimizer it is a training
    forward of the model. Forwards between two steps are pooled by their counts.

    Args:
        model: any module with batch norm layers; it may be compiled or wrapped in DistributedDataParallel.
        path: the Run's folder, new or empty; by default a new folder in runs/.
        schedule: step (from 0) → whether to record it; `log_spaced()` by default, or `every(k)`.
        optimizer: the one whose steps count, if there are several.
        force: replace the Run in the folder.
        also: classes of layers that normalize as torch.nn's do, to be included.

    Returns:
        The Run: use it with `with`, or between `start()` and `close()`.

    Raises TypeError or ValueError for invalid arguments, such as a model without a layer to watch. Raises RunError at
    the start if the folder has a Run, cannot be written or is being recorded, or if the model is being watched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch takes a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    schedule = log_spaced() if schedule is None else schedule
    if not callable(schedule):
        raise TypeError(f"schedule must be a function step -> bool, got {schedule!r}: use every(k) or log_spaced()")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return Recorder(model, None if path is None else Path(path), schedule, optimizer, force, also)


class Recorder(Run):
    """A Run while it is recorded; `watch` returns it.

    `step` is the number of steps so far. `log`, `probe` and `flush` add to the Run, `close` ends it. In a forked child
    it records nothing, and its methods do not touch the parent's Run.

    The arguments model, path, schedule, optimizer, force and also are those of `watch`.

    Raises ValueError if the model has no layer to watch.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path | None,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer | None,
        force: bool,
        also: Sequence[type[nn.Module]] = (),
    ) -> None:
        super().__init__(default_path() if path is None else path, {})
        self._in_new_folder = path is None
        self.step = 0
        self._model, self._schedule, self._force = model, schedule, force
        self._attachment = attach.Attachment(model, also)
        if not self._attachment.watched:
            skipped = "".join(f"; {layer['name']}: {layer['why']}" for layer in self._attachment.skipped)
            raise ValueError(f"there is no batch norm layer to watch in this {type(model).__name__}{skipped}")
        self._steps = Steps(model, self, optimizer)
        self._last_recorded: int | None = None
        self._after_update: list[Callable[[], None]] = []
        self._rank, self._processes = rank_and_size()
        self._open = False
        self._process: int | None = None
        """The id of the process that records; a forked child has another."""

    # Set by `start`.
    _writer: Writer
    _lock: Lock
    _facts: list[dict[str, Any]]

    def start(self) -> Self:
        """Create the Run's folder, begin to record, and return the Run.

        Raises RunError if the folder cannot be created or has a Run, if the model is being watched, and at a second
        call.
        """
        if self._process is not None:
            raise RunError(f"{self.path} has been started before: call watch() again for another Run")
        self._attachment.claim()
        self._facts = self._attachment.facts()
        info: dict[str, Any] = {
            "processes": self._processes,
            "model": type(unwrapped(self._model)).__name__,
            "schedule": describe_schedule(self._schedule),
            "counted": self._steps.counted,
            "layers": self._facts,
            "skipped": self._attachment.skipped,
            "errors": [],
        }
        try:
            run, self._lock = claim(self.path, self._rank, force=self._force, new=self._in_new_folder, **info)
        except BaseException:
            self._attachment.release()
            raise
        self.path, self.info = run.path, run.info
        layers = [(watched.name, watched.units) for watched in self._attachment.watched]
        self._writer = Writer(self, self._rank, layers)
        self._process, self._open = os.getpid(), True
        self._steps.start()
        self._arm()
        return self

    def close(self, status: str = "complete") -> None:
        """Write all buffered rows, restore the model, and end the Run.

        `status` is "complete", "interrupted" or "failed". A second call does nothing. Raises ValueError for another
        status, and nothing else.
        """
        if status not in STATUSES[1:]:
            raise ValueError(f"status is one of {', '.join(STATUSES[1:])}, got {status!r}")
        if not self._is_recording():
            return
        self._open = False
        try:
            try:
                self.guarded(self._count_last_forward)
                self.guarded(self._record_last_step)
            finally:
                self._steps.stop()
                self._attachment.release()
            if self._process == os.getpid():
                self._writer.flush()
                if self._rank == 0:
                    self.guarded(self._end, status)
        finally:
            self._lock.release()

    def _end(self, status: str) -> None:
        self.note(
            layers=self._attachment.facts(),
            steps=self.step,
            seconds=time.monotonic() - self._writer.started,
            counted=self._steps.counted,
            errors=self._writer.errors,
        )
        self.finish(status)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = None if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        self.close(failed or "complete")

    def log(self, *, step: int | None = None, **values: float | Tensor) -> None:
        """Record named numbers of the current step: `run.log(loss=loss, accuracy=0.9)`.

        Args:
            step: the step; by default the one whose forward began last.
            values: numbers, or tensors of one value, by name. A tensor may be updated in place later: a GPU tensor is
                copied on its device and read when the log is written, so log does not wait for the device.

        A closed Run ignores the call.
        Raises TypeError for a value that is not a number, or a step that is not a 64-bit integer; RunError before
        `start()`.
        """
        if self._process is None:
            raise RunError(f"{self.path} has not been started: use watch() with `with`, or call start() before log()")
        numbers = {name: number(name, value) for name, value in values.items()}  # raises also for a closed Run
        latest = self.step if self._steps.begun or self.step == 0 else self.step - 1
        at = latest if step is None else step_number(step)
        if self._is_recording():
            for name, value in numbers.items():
                self._writer.log(at, name, value)
            self.guarded(self._writer.flush_if_due)

    def probe(
        self, batch: Any, *, loss: Callable[[Any], Tensor] | None = None
    ) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Measure the activations of one batch at the current parameters, into the table `probe`: a row per unit.

        The columns are percentiles {15, 50, 85} of each unit's input, the shares of x > 0 and of y > 0 (before the
        activation), and the share of y in the linear regime of the activation that follows. With `loss` the covariate
        shift of Santurkar et al. (2018), ||G - G'||, is measured once the next step was taken. That costs a forward and
        a backward per layer, and a copy of the parameters until then.

        Args:
            batch: the model's input: a tensor, a tuple of arguments or a mapping of named arguments. A list has several
                such batches: the first is measured, and `noise_mean` and `noise_log_scale` are over all of them.
            loss: maps the model's output to the loss, a tensor of one value: `lambda out: cross_entropy(out, y)`.

        Returns:
            The columns (C,) by layer.

        Raises RunError before `start()` and after `close()`, and ValueError for an empty list.

        Parameters, buffers, modes and the state of the random generators are restored.
        """
        if not self._is_recording():
            raise RunError(f"{self.path} is not being recorded: call probe inside the with block")
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise ValueError("probe needs a batch, got an empty list")
        model, layers = unwrapped(self._model), self._attachment.watched
        with self._outside_training():
            columns = probes.measure(model, layers, batches)
            shift = None if loss is None else probes.Shift(model, layers, batches[0], loss)
        at = self.step  # this step's forward uses these parameters
        for name, measured in columns.items():
            units = len(measured["positive_in"])
            self._writer.table("probe", at, [name] * units, {"unit": np.arange(units, dtype=np.int32), **measured})
        if shift is not None:
            self._after_update.append(partial(self._record_shift, at, shift))
        self.guarded(self._writer.flush_if_due)
        return columns

    def _record_shift(self, at: int, shift: probes.Shift) -> None:
        with self._outside_training():
            layers, columns = shift.measure()
        if layers:
            self._writer.table("shift", at, layers, columns)

    @contextmanager
    def _outside_training(self) -> Iterator[None]:
        """Run code that is not part of the training: nothing is recorded, and random generators are restored."""
        armed, paused = self._attachment.armed, self._steps.paused
        devices = {parameter.device for parameter in self._model.parameters() if parameter.device.type == "cuda"}
        self._attachment.arm(False)
        self._steps.paused = True
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            self._steps.paused = paused
            self._attachment.arm(armed)

    def flush(self) -> None:
        """Write all buffered rows now."""
        if self._process == os.getpid():
            self._writer.flush()

    def check_still_there(self) -> None:
        """Raise RunError before `start()`, in a forked child, and if the folder was removed or has another Run."""
        if self._process != os.getpid():
            raise RunError(f"{self.path} is not recorded by this process: only the one that called start() writes it")
        super().check_still_there()

    def table(self, name: str, rank: int = 0, columns: Sequence[str] | None = None) -> pa.Table:
        """A table as pyarrow.Table, buffered rows included.

        `name`, `rank` and `columns` are those of `Run.table`. Raises RunError as that does.
        """
        if self._is_recording():
            self.flush()
            self.check_still_there()  # the folder may have another Run now
        return super().table(name, rank, columns)

    def _is_recording(self) -> bool:
        """Whether the Run is open and this process is the one that records it."""
        return self._open and self._process == os.getpid()

    # --- called by `Steps`

    def guarded(self, action: Callable[..., object], *arguments: object) -> None:
        """Call `action(*arguments)`; note an exception instead of raising it, since the training must go on."""
        try:
            action(*arguments)
        except Exception as error:
            self._writer.failed(error)

    def forked(self) -> None:
        """Stop in a forked child; the parent goes on recording."""
        self._steps.stop()
        self._attachment.release()

    def collect(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Collect the data before `optimizer` updates the parameters, or before the next forward."""
        if self._attachment.armed:
            self.guarded(self._attachment.collect, None if self._steps.counted is None else self.step, optimizer)

    def forwards_count(self) -> None:
        """Record each collected forward as a step."""
        forwards, self._attachment.collected = self._attachment.collected, []
        for data in forwards:
            if self._is_due(self.step):
                self.guarded(self._record, data)
            self.step += 1
        self._arm()

    def step_ends(self) -> None:
        """Record the step if it is due, and count it."""
        if self._attachment.armed:
            self.guarded(self._record_collected)
        self.step += 1
        for action in self._after_update[:]:
            self._after_update.remove(action)
            self.guarded(action)
        self._arm()

    # --- the data of a step

    def _record_collected(self) -> None:
        data = self._attachment.pooled()
        if data is not None:
            self._record(data)

    def _count_last_forward(self) -> None:
        """At the end: if forwards are steps, the last one is over."""
        if not self._steps.begun or self._steps.counted == "optimizer":
            return
        self.collect()
        if self._steps.counted is None:
            self._steps.counted = "forwards"
            self.forwards_count()
        else:
            self._record_collected()
            self.step += 1

    def _record_last_step(self) -> None:
        """Record the layers after the last step, for any schedule, so that the report is about the saved model.

        If the schedule skipped this step, nothing was attached when it ran: the row has no batch and no gradient.
        """
        if self._rank != 0 or self.step == 0 or self._last_recorded == self.step - 1:
            return
        self._writer.snapshot(self.step - 1, self._attachment.columns())

    def _record(self, data: attach.StepData) -> None:
        self._writer.snapshot(self.step, self._attachment.columns(data, self.step))
        self._last_recorded = self.step
        self._writer.flush_if_due()
        facts = self._attachment.facts()  # a forward may have revealed producers
        if self._rank == 0 and facts != self._facts:
            self._facts = facts  # before the write, so that a full disk is not tried at each step; `close` writes again
            self.note(layers=facts)

    def _is_due(self, step: int) -> bool:
        try:
            return bool(self._schedule(step))
        except Exception as error:
            self._writer.failed(RunError(f"the schedule failed at step {step}: {type(error).__name__}: {error}"))
            return False

    def _arm(self) -> None:
        due = self._steps.counted is None or self._is_due(self.step)
        self._attachment.arm(due and self._is_recording())  # after the user's schedule, which may fork
