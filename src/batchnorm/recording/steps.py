"""Which steps of a training are recorded, and when a step ends.

A schedule is a function step → bool. `every` and `log_spaced` bound how many are recorded, however long the run is.

A step ends when an optimizer that holds parameters of the model takes a step: whatever forwards and backwards came
before belong to it, so that accumulated gradients are one step. Of several optimizers the first seen counts, or the one
given; should it rest while another takes `_SILENT` steps, the other counts from then on.

Without an optimizer of torch.optim, a step is a training forward of the model. That nobody steps is known after
`_UNDECIDED` forwards; until then they are held, and should an optimizer step after all, they are its first step.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

_UNDECIDED = 16
_SILENT = 10


Schedule = Callable[[int], bool]


@dataclass(frozen=True)
class every:  # noqa: N801 - called as the function that it is to its users
    """A schedule that records every k-th step, and fewer and fewer of them in a long run.

    From step 0 on every k-th step is recorded, from step k·at_most on every 2k-th, then every 4k-th, and so on. So
    each doubling of a run's length adds some `at_most`/2 recorded steps, and a run of a million steps has at most
    at_most·(1 + log2(1e6/(k·at_most))/2) + 1 of them: some 1,800 for every(1).

    Args:
        k: the distance between recorded steps, at first; a whole number >= 1.
        at_most: how many steps are recorded before the distance first doubles; a whole number >= 2.

    Raises ValueError for other numbers.
    """

    k: int = 1
    at_most: int = 256

    def __post_init__(self) -> None:
        for name, value, least in (("k", self.k, 1), ("at_most", self.at_most, 2)):
            if type(value) is not int or value < least:
                raise ValueError(f"every() takes {name} >= {least}, a whole number, got {value!r}")

    def __call__(self, step: int) -> bool:
        doubled = (step // (self.k * self.at_most)).bit_length()
        return step % (self.k << doubled) == 0


@dataclass(frozen=True)
class log_spaced:  # noqa: N801 - called as the function that it is to its users
    """A schedule that records `per_decade` steps in every power of ten, evenly spread on a logarithmic scale.

    Where there are fewer steps than that, all are recorded. Training moves fastest at its start: with the default, 105
    of the first 1,000 steps are recorded and 255 of the first million, and the last one recorded is never more than 5 %
    before the end.

    Args:
        per_decade: how many steps, a whole number from 1 to 1000.

    Raises ValueError for other numbers.
    """

    per_decade: int = 50

    def __post_init__(self) -> None:
        if type(self.per_decade) is not int or not 1 <= self.per_decade <= 1000:
            raise ValueError(f"log_spaced() takes per_decade from 1 to 1000, a whole number, got {self.per_decade!r}")

    def __call__(self, step: int) -> bool:
        return step == 0 or self._mark(step + 1) > self._mark(step)

    def _mark(self, step: int) -> int:
        return math.floor(self.per_decade * math.log10(step))


def described(schedule: Schedule) -> str:
    """As run.json names it."""
    if isinstance(schedule, every | log_spaced):
        return repr(schedule)
    return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))


class Listener(Protocol):
    """What `Steps` calls.

    update_begins    the step's forwards and backwards are over; the parameters are still those that they used
    forward_begins   without optimizers, as far as is known: the step's forward and backward are over
    step_ends        the step is counted
    forwards_count   each of the forwards so far was a step
    forked           this is a child process: the recording is its parent's
    guarded          calls an action; the training must not see what it raises
    """

    def update_begins(self, optimizer: torch.optim.Optimizer) -> None: ...
    def forward_begins(self) -> None: ...
    def step_ends(self) -> None: ...
    def forwards_count(self) -> None: ...
    def forked(self) -> None: ...
    def guarded(self, action: Callable[..., object], *arguments: object) -> None: ...


class Steps:
    """The hooks that count: on every optimizer of the process, and on the model's forward."""

    def __init__(self, model: nn.Module, listener: Listener, optimizer: torch.optim.Optimizer | None) -> None:
        self.counted: str | None = None if optimizer is None else "optimizer"
        self.begun = False
        """Whether a forward of the model has begun since the last step ended; not known under torch.compile."""
        self.paused = False
        """Nothing counts for now: what runs is no part of the training."""
        self.listener = listener
        self._mine = {id(parameter) for parameter in model.parameters()}
        self._given = optimizer is not None
        self._counting = None if optimizer is None else weakref.ref(optimizer)
        self._concerns: weakref.WeakKeyDictionary[torch.optim.Optimizer, bool] = weakref.WeakKeyDictionary()
        self._others = 0
        self._held = 0
        self._handle: RemovableHandle | None = None
        self._model = model

    def start(self) -> None:
        """Begin to count."""
        self._handle = self._model.register_forward_pre_hook(_ForwardHook(self._model, self))
        _OPTIMIZERS.subscribe(self)

    def stop(self) -> None:
        """Count no more, and leave no hook."""
        _OPTIMIZERS.unsubscribe(self)
        if self._handle is not None:
            self._handle.remove()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of the process is about to step."""
        if self._counts(optimizer):
            self.counted, self._held = "optimizer", 0
            self.listener.update_begins(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of the process has taken a step."""
        if self._counting is not None and self._counting() is optimizer:
            self.begun = False
            self.listener.step_ends()

    def _counts(self, optimizer: torch.optim.Optimizer) -> bool:
        now = None if self._counting is None else self._counting()
        if optimizer is now:
            self._others = 0
            return True
        if self._given or not self._holds_mine(optimizer):
            return False
        self._others += 1
        if now is None or self._others > _SILENT:
            self._counting, self._others = weakref.ref(optimizer), 0
            return True
        return False

    def _holds_mine(self, optimizer: torch.optim.Optimizer) -> bool:
        known = self._concerns.get(optimizer)
        if known is None:
            known = any(id(p) in self._mine for group in optimizer.param_groups for p in group["params"])
            self._concerns[optimizer] = known
        return known

    def forward(self) -> None:
        """A training forward of the model begins."""
        if self.paused:
            return
        if self.counted != "optimizer" and self.begun:
            self.listener.forward_begins()
            if self.counted == "forwards":
                self.listener.step_ends()
            else:
                self._held += 1
                if self._held >= _UNDECIDED:
                    self.counted = "forwards"
                    self.listener.forwards_count()
        self.begun = True


class _Optimizers:
    """One pair of hooks on all optimizers of the process, for all recordings.

    Other threads iterate over PyTorch's global dictionaries of hooks while their optimizers step. Such an iterator
    raises in their step when its dictionary changes, unless it has reached the last entry. So these dictionaries change
    only when the first recording starts and when the last one ends, and a hook of ours is removed only where it is the
    only one; beside hooks of others it stays, with nothing to call. `_subscribers` is replaced, never changed.
    """

    def __init__(self) -> None:
        self._subscribers: tuple[Steps, ...] = ()
        self._handles: dict[str, RemovableHandle] = {}
        self._lock = threading.Lock()

    def subscribe(self, steps: Steps) -> None:
        with self._lock:
            self._subscribers = (*self._subscribers, steps)
            for name, register, hook in (
                ("pre", register_optimizer_step_pre_hook, self._before_step),
                ("post", register_optimizer_step_post_hook, self._after_step),
            ):
                handle = self._handles.get(name)
                if handle is None or handle.id not in _registered(handle):
                    self._handles[name] = register(hook)

    def unsubscribe(self, steps: Steps) -> None:
        with self._lock:
            self._subscribers = tuple(other for other in self._subscribers if other is not steps)
            if self._subscribers:
                return
            for handle in self._handles.values():
                if list(_registered(handle)) == [handle.id]:
                    handle.remove()

    def forked(self) -> None:
        """In a child process: end the recordings. The lock may be held by a thread that the child does not have."""
        self._lock = threading.Lock()
        for steps in self._subscribers:
            steps.listener.forked()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for steps in self._subscribers:
            steps.listener.guarded(steps.before_step, optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for steps in self._subscribers:
            steps.listener.guarded(steps.after_step, optimizer)


def _registered(handle: RemovableHandle) -> Mapping[int, object]:
    """PyTorch's dictionary that the handle's hook is in."""
    found: Mapping[int, object] | None = handle.hooks_dict_ref()
    return {} if found is None else found


_OPTIMIZERS = _Optimizers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_OPTIMIZERS.forked)


class _ForwardHook:
    """Counts the training forwards of one model. Copies and pickles of the model take nothing of it along."""

    def __init__(self, model: nn.Module, steps: Steps) -> None:
        self._model, self._steps = weakref.ref(model), steps

    def __call__(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        if module.training and self._model() is module:
            self._steps.listener.guarded(self._steps.forward)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return partial, (nothing,)


def nothing(*_: object) -> None:
    """What is left of the hook in copies and pickles of the model."""
