"""watch(): a Run that is being recorded while any loop trains.

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
from batchnorm.recording._recorder.writer import Lock, Writer, claim, default_path, number, place, step_number
from batchnorm.recording.steps import Schedule, Steps, described, log_spaced
from batchnorm.restoring import unwrapped
from batchnorm.runs.run import STATUSES, Run, RunError


def watch(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    schedule: Schedule | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    force: bool = False,
) -> Recorder:
    """Record what gamma and beta of a model's batch norm layers do while it trains; a context manager.

    On a recorded step every layer leaves the mean and variance of its batch (biased), dgamma = Σg·xhat, dbeta = Σg and
    Σg², with g the gradient at gamma·xhat + beta; gamma, beta, the running statistics (as the step leaves them) and the
    norms of the weights below are read beside. Our layers compute these sums in the loops that they run anyway;
    torch.nn's own are watched by one more pass over input and gradient. On other steps nothing is attached.

    A step is a step() of the first optimizer that holds parameters of the model; without one, a training forward of the
    model. Forwards between two steps are pooled by their counts.

    Args:
        model: anything with batch norm layers, compiled and wrapped in DistributedDataParallel as well.
        path: the Run's folder, new or empty; by default a new one in runs/.
        schedule: step (from 0) → whether to record it; `log_spaced()` by default, or `every(k)`.
        optimizer: the one whose steps count, where there are several.
        force: replace the Run that the folder holds.

    Returns:
        The Run, to be used with `with`, or between `start()` and `close()`.

    Raises TypeError and ValueError for arguments that cannot be meant, among them a model without a layer to watch;
    RunError, when it starts, for a folder that holds a Run, cannot be written or is being written by someone else, and
    for a model that is being watched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch takes a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    schedule = log_spaced() if schedule is None else schedule
    if not callable(schedule):
        raise TypeError(f"schedule must be a function step -> bool, got {schedule!r}: use every(k) or log_spaced()")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return Recorder(model, None if path is None else Path(path), schedule, optimizer, force)


class Recorder(Run):
    """A Run that is being recorded, which `watch` returns.

    `step` is the number of steps so far. `log`, `probe` and `flush` add to the Run, `close` ends it. In a forked child
    it records nothing, and its methods leave the parent's Run alone.

    The arguments model, path, schedule, optimizer and force are those of `watch`.

    Raises ValueError where the model has no layer to watch.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path | None,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer | None,
        force: bool,
    ) -> None:
        super().__init__(default_path() if path is None else path, {})
        self._in_new_folder = path is None
        self.step = 0
        self._model, self._schedule, self._force = model, schedule, force
        self._attachment = attach.Attachment(model)
        if not self._attachment.watched:
            skipped = "".join(f"; {each['name']}: {each['why']}" for each in self._attachment.skipped)
            raise ValueError(f"there is no batch norm layer to watch in this {type(model).__name__}{skipped}")
        self._steps = Steps(model, self, optimizer)
        self._recorded: int | None = None
        self._after_update: list[Callable[[], None]] = []
        self._rank, self._processes = place()
        self._open = False
        self._process: int | None = None
        """The process that records, from `start` on: a forked child has another number."""

    # From `start` on.
    _writer: Writer
    _lock: Lock
    _facts: list[dict[str, Any]]

    def start(self) -> Self:
        """Make the Run's folder, begin to record, and return the Run itself.

        Raises RunError where the folder cannot be made or holds a Run, where the model is being watched, and when
        called a second time.
        """
        if self._process is not None:
            raise RunError(f"{self.path} has been started before: call watch() again for another Run")
        self._attachment.take()
        self._facts = self._attachment.facts()
        about: dict[str, Any] = {
            "processes": self._processes,
            "model": type(unwrapped(self._model)).__name__,
            "schedule": described(self._schedule),
            "counted": self._steps.counted,
            "layers": self._facts,
            "skipped": self._attachment.skipped,
            "errors": [],
        }
        try:
            run, self._lock = claim(self.path, self._rank, force=self._force, new=self._in_new_folder, **about)
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
        """Write what has gathered, leave the model as it was, and end the Run.

        `status` says how it ended: "complete", "interrupted" or "failed". A second call does nothing. Raises ValueError
        for another status, and nothing else.
        """
        if status not in STATUSES[1:]:
            raise ValueError(f"status is one of {', '.join(STATUSES[1:])}, got {status!r}")
        if not self._records():
            return
        self._open = False
        try:
            try:
                self.guarded(self._take_what_is_left)
                self.guarded(self._record_end)
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
        seconds = time.monotonic() - self._writer.started
        found = {"steps": self.step, "seconds": seconds, "counted": self._steps.counted, "errors": self._writer.errors}
        self.note(layers=self._attachment.facts(), **found)
        self.finish(status)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.close("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")

    def log(self, *, step: int | None = None, **values: float | Tensor) -> None:
        """Record numbers of the current step by their names: `run.log(loss=loss, accuracy=0.9)`.

        Args:
            step: which step; by default the one whose forward began last.
            values: numbers, or tensors of one value, by their names. A tensor may be updated in place later: on a GPU
                it is copied there and read when it is written, so that log does not wait for it.

        A closed Run ignores the call.
        Raises TypeError for a value that is not a number, and for a step that is not an integer of 64 bits; RunError
        before `start()`.
        """
        if self._process is None:
            raise RunError(f"{self.path} has not been started: use watch() with `with`, or call start() before log()")
        numbers = {name: number(name, value) for name, value in values.items()}
        latest = self.step if self._steps.begun or self.step == 0 else self.step - 1
        at = latest if step is None else step_number(step)
        if self._records():
            for name, found in numbers.items():
                self._writer.log(at, name, found)
            self.guarded(self._writer.flush_now_and_then)

    def probe(
        self, batch: Any, *, loss: Callable[[Any], Tensor] | None = None
    ) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Measure the activations that one held batch gives now, into the table `probe`: a row for each unit.

        Percentiles {15, 50, 85} of each unit's input, the shares of x > 0 and of y > 0 (before the activation), and the
        share of y in the linear regime of the activation that follows. With `loss` also the covariate shift of
        Santurkar et al. (2018), ||G - G'||, which is complete once the next step has been taken: as many forwards and
        backwards as there are layers, and a copy of the parameters until then.

        Args:
            batch: the model's input: a tensor, a tuple of arguments or a mapping of named ones. A list is of several
                such batches: the first is the held one, and `noise_mean` and `noise_log_scale` are over all of them.
            loss: the model's output → the loss, a tensor of one value, as `lambda out: cross_entropy(out, y)`.

        Returns:
            The columns (C,) by layer.

        Raises RunError outside of `start()` and `close()`, and ValueError for an empty list.

        Dropout draws what it would have drawn; parameters, buffers, modes and random numbers are left as they were.
        """
        if not self._records():
            raise RunError(f"{self.path} is not being recorded: call probe inside the with block")
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise ValueError("probe needs a batch, got an empty list")
        model, layers = unwrapped(self._model), self._attachment.watched
        with self._aside():
            columns = probes.look(model, layers, batches)
            shift = None if loss is None else probes.Shift(model, layers, batches[0], loss)
        at = self.step  # the parameters are those that this step's forward will use, or has just used
        for name, found in columns.items():
            units = len(found["positive_in"])
            self._writer.table("probe", at, [name] * units, {"unit": np.arange(units, dtype=np.int32), **found})
        if shift is not None:
            self._after_update.append(partial(self._shifted, at, shift))
        self.guarded(self._writer.flush_now_and_then)
        return columns

    def _shifted(self, at: int, shift: probes.Shift) -> None:
        with self._aside():
            layers, columns = shift.measured()
        if layers:
            self._writer.table("shift", at, layers, columns)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What runs here is no part of the training, and draws none of its random numbers."""
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
        """Write what has gathered, so that none of it can be lost from here on."""
        if self._process == os.getpid():
            self._writer.flush()

    def check_still_there(self) -> None:
        """Raise RunError before `start()`, in a forked child, and where the folder was removed or holds another Run."""
        if self._process != os.getpid():
            raise RunError(f"{self.path} is not recorded by this process: only the one that called start() writes it")
        super().check_still_there()

    def table(self, name: str, rank: int = 0, columns: Sequence[str] | None = None) -> pa.Table:
        """A table as pyarrow.Table, with what has gathered so far.

        `name`, `rank` and `columns` are those of `Run.table`. Raises RunError as that does.
        """
        if self._records():
            self.flush()
            self.check_still_there()  # not the rows of another Run in the same folder
        return super().table(name, rank, columns)

    def _records(self) -> bool:
        """Whether this process records now: between `start` and `close`, and not in a forked child."""
        return self._open and self._process == os.getpid()

    # --- called by `Steps`

    def guarded(self, action: Callable[..., object], *arguments: object) -> None:
        """Call `action` with the `arguments`, and note what it raises: a training must not end with its recording."""
        try:
            action(*arguments)
        except Exception as error:
            self._writer.failed(error)

    def forked(self) -> None:
        """Stop in a forked child, whose parent goes on recording."""
        self._steps.stop()
        self._attachment.release()

    def update_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """See what the step has left, before `optimizer` moves the parameters."""
        if self._attachment.armed:
            self.guarded(self._see, optimizer)

    def forward_begins(self) -> None:
        """See what the forward before this one has left."""
        if self._attachment.armed:
            self.guarded(self._see, None)

    def forwards_count(self) -> None:
        """Make steps of the forwards seen so far."""
        seen, self._attachment.seen = self._attachment.seen, []
        for forward in seen:
            if self._wanted(self.step):
                self.guarded(self._record, forward)
            self.step += 1
        self._arm()

    def step_ends(self) -> None:
        """Record the step, if it is due, and count it."""
        if self._attachment.armed:
            self.guarded(self._take)
        self.step += 1
        for action in self._after_update[:]:
            self._after_update.remove(action)
            self.guarded(action)
        self._arm()

    # --- what a step leaves

    def _see(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._attachment.see(None if self._steps.counted is None else self.step, optimizer)

    def _take(self) -> None:
        """Record the step in hand."""
        seen = self._attachment.pooled()
        if seen is not None:
            self._record(seen)

    def _take_what_is_left(self) -> None:
        """At the end: without optimizers the last forward's step is over, too."""
        if not self._steps.begun or self._steps.counted == "optimizer":
            return
        self.forward_begins()
        if self._steps.counted is None:
            self._steps.counted = "forwards"
            self.forwards_count()
        else:
            self._take()
            self.step += 1

    def _record_end(self) -> None:
        """The last step, whatever the schedule: the layers as it left them, so that what is saved is what is reported.

        Where the schedule left it out, nothing was attached when it ran: its row has no batch and no gradient.
        """
        if self._rank != 0 or self.step == 0 or self._recorded == self.step - 1:
            return
        self._writer.snapshot(self.step - 1, self._attachment.columns())

    def _record(self, seen: attach.Seen) -> None:
        self._writer.snapshot(self.step, self._attachment.columns(seen, self.step))
        self._recorded = self.step
        self._writer.flush_now_and_then()
        facts = self._attachment.facts()  # of which a forward may have shown more
        if self._rank == 0 and facts != self._facts:
            self._facts = facts  # before the write: a full disk must not be tried at each step, and `close` writes it
            self.note(layers=facts)

    def _wanted(self, step: int) -> bool:
        try:
            return bool(self._schedule(step))
        except Exception as error:
            self._writer.failed(RunError(f"the schedule failed at step {step}: {type(error).__name__}: {error}"))
            return False

    def _arm(self) -> None:
        wanted = self._steps.counted is None or self._wanted(self.step)
        self._attachment.arm(wanted and self._records())  # the schedule is the user's: it may fork
