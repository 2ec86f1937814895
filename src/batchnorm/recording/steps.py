"""Schedules of recorded steps, and the hooks on the model and on all optimizers that detect a step's end.

A schedule is a function step → bool. `every` and `log_spaced` limit the number of recorded steps in runs of any length.

A step ends when an optimizer with parameters of the model takes a step. All forwards and backwards since the previous
one belong to it, so accumulated gradients are one step. With several optimizers, the given one counts, else the first
that steps; if it pauses while another takes more than `_SILENT` steps, the other counts from then on.

Without an optimizer of torch.optim, a step is a training forward of the model. This is decided after `_UNDECIDED`
forwards without an optimizer's step. If an optimizer steps before that, these forwards belong to its first step.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

_UNDECIDED = 16
_SILENT = 10


Schedule = Callable[[int], bool]


@dataclass(frozen=True)
class every:  # noqa: N801 - users call it like a function
    """A schedule that records every k-th step, and fewer steps later in a long run.

    It records every k-th step from step 0, every 2k-th from step k·at_most, then every 4k-th, and so on. Each doubling
    of a run's length adds about `at_most`/2 recorded steps. A run of a million steps has at most
    at_most·(1 + log2(1e6/(k·at_most))/2) + 1 of them: about 1,800 for every(1).

    Args:
        k: the initial distance between recorded steps; an integer >= 1.
        at_most: the number of steps recorded before the distance first doubles; an integer >= 2.

    Raises ValueError for other numbers.
    """

    k: int = 1
    at_most: int = 256

    def __post_init__(self) -> None:
        for name, value, minimum in (("k", self.k, 1), ("at_most", self.at_most, 2)):
            if type(value) is not int or value < minimum:
                raise ValueError(f"every() takes {name} >= {minimum}, an integer, got {value!r}")

    def __call__(self, step: int) -> bool:
        doublings = (step // (self.k * self.at_most)).bit_length()
        return step % (self.k << doublings) == 0


@dataclass(frozen=True)
class log_spaced:  # noqa: N801 - users call it like a function
    """A schedule that records `per_decade` steps in every power of ten, evenly spread on a logarithmic scale.

    All steps are recorded while there are fewer than that. Training changes fastest at its start: the default records
    105 of the first 1,000 steps and 255 of the first million. The last recorded step is at most 5 % before the end.

    Args:
        per_decade: the number of steps, an integer from 1 to 1000.

    Raises ValueError for other numbers.
    """

    per_decade: int = 50

    def __post_init__(self) -> None:
        if type(self.per_decade) is not int or not 1 <= self.per_decade <= 1000:
            raise ValueError(f"log_spaced() takes per_decade from 1 to 1000, an integer, got {self.per_decade!r}")

    def __call__(self, step: int) -> bool:
        return step == 0 or self._interval(step + 1) > self._interval(step)

    def _interval(self, step: int) -> int:
        return math.floor(self.per_decade * math.log10(step))


def describe_schedule(schedule: Schedule) -> str:
    """The schedule's name in run.json."""
    if isinstance(schedule, every | log_spaced):
        return repr(schedule)
    return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))


class Listener(Protocol):
    """What `Steps` calls: the methods of `watch.Recorder`, which describes them."""

    def collect(self, optimizer: torch.optim.Optimizer | None = None) -> None: ...
    def step_ends(self) -> None: ...
    def forwards_count(self) -> None: ...
    def forked(self) -> None: ...
    def guarded(self, action: Callable[..., object], *arguments: object) -> None: ...


class Steps:
    """Counts steps by hooks on every optimizer of the process and on the model's forward."""

    def __init__(self, model: nn.Module, listener: Listener, optimizer: torch.optim.Optimizer | None) -> None:
        self.counted: str | None = None if optimizer is None else "optimizer"
        self.begun = False
        """Whether a forward of the model has begun since the last step; unknown under torch.compile."""
        self.paused = False
        """Whether forwards are ignored because they are not part of the training."""
        self.listener = listener
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._is_given = optimizer is not None
        self._counted_optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._relevant: weakref.WeakKeyDictionary[torch.optim.Optimizer, bool] = weakref.WeakKeyDictionary()
        self._other_steps = 0
        self._undecided = 0
        self._handle: RemovableHandle | None = None
        self._model = model

    def start(self) -> None:
        """Begin to count."""
        self._handle = self._model.register_forward_pre_hook(_ForwardHook(self._model, self))
        _OPTIMIZERS.subscribe(self)

    def stop(self) -> None:
        """Stop counting and remove the hooks."""
        _OPTIMIZERS.unsubscribe(self)
        if self._handle is not None:
            self._handle.remove()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of the process is about to step."""
        if self._is_counted(optimizer):
            self.counted, self._undecided = "optimizer", 0
            self.listener.collect(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of the process has taken a step."""
        if self._counted_optimizer is not None and self._counted_optimizer() is optimizer:
            self.begun = False
            self.listener.step_ends()

    def _is_counted(self, optimizer: torch.optim.Optimizer) -> bool:
        current = None if self._counted_optimizer is None else self._counted_optimizer()
        if optimizer is current:
            self._other_steps = 0
            return True
        if self._is_given or not self._has_our_parameters(optimizer):
            return False
        self._other_steps += 1
        if current is None or self._other_steps > _SILENT:
            self._counted_optimizer, self._other_steps = weakref.ref(optimizer), 0
            return True
        return False

    def _has_our_parameters(self, optimizer: torch.optim.Optimizer) -> bool:
        if optimizer not in self._relevant:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            self._relevant[optimizer] = any(id(p) in self._parameters for p in parameters)
        return self._relevant[optimizer]

    def forward(self) -> None:
        """A training forward of the model begins."""
        if self.paused:
            return
        if self.counted != "optimizer" and self.begun:
            self.listener.collect()
            if self.counted == "forwards":
                self.listener.step_ends()
            else:
                self._undecided += 1
                if self._undecided >= _UNDECIDED:
                    self.counted = "forwards"
                    self.listener.forwards_count()
        self.begun = True


class _Optimizers:
    """One pair of hooks on all optimizers of the process, for all recordings.

    Other threads iterate over PyTorch's global dictionaries of hooks while their optimizers step. If a dictionary
    changes meanwhile, the iterator raises, unless it has reached the last entry. So the dictionaries change only when
    the first recording starts and the last one ends. Our hook is removed only if it is the only one; beside other hooks
    it stays and calls nothing. `_subscribers` is replaced, never changed in place.
    """

    def __init__(self) -> None:
        self._subscribers: tuple[Steps, ...] = ()
        self._handles: dict[Callable[..., None], RemovableHandle] = {}
        self._lock = threading.Lock()

    def subscribe(self, steps: Steps) -> None:
        with self._lock:
            self._subscribers = (*self._subscribers, steps)
            for register, method in (
                (register_optimizer_step_pre_hook, Steps.before_step),
                (register_optimizer_step_post_hook, Steps.after_step),
            ):
                handle = self._handles.get(method)
                if handle is None or handle.id not in _registered(handle):
                    self._handles[method] = register(partial(self._notify, method))

    def unsubscribe(self, steps: Steps) -> None:
        with self._lock:
            self._subscribers = tuple(other for other in self._subscribers if other is not steps)
            if self._subscribers:
                return
            for handle in self._handles.values():
                if list(_registered(handle)) == [handle.id]:
                    handle.remove()

    def forked(self) -> None:
        """End the recordings in a child process. The lock is replaced: a thread of the parent may hold it for ever."""
        self._lock = threading.Lock()
        for steps in self._subscribers:
            steps.listener.forked()

    def _notify(self, method: Callable[[Steps, torch.optim.Optimizer], None], *arguments: Any) -> None:
        for steps in self._subscribers:
            steps.listener.guarded(method, steps, arguments[0])


def _registered(handle: RemovableHandle) -> Mapping[int, object]:
    """PyTorch's dictionary with the handle's hook."""
    hooks: Mapping[int, object] | None = handle.hooks_dict_ref()
    return {} if hooks is None else hooks


_OPTIMIZERS = _Optimizers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_OPTIMIZERS.forked)


class _ForwardHook:
    """Counts the training forwards of one model. Copies and pickles of the model get `nothing` in its place."""

    def __init__(self, model: nn.Module, steps: Steps) -> None:
        self._model, self._steps = weakref.ref(model), steps

    def __call__(self, module: nn.Module, *_: object) -> None:
        if not torch.compiler.is_compiling() and module.training and self._model() is module:
            self._steps.listener.guarded(self._steps.forward)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return partial, (nothing,)


def nothing(*_: object) -> None:
    """The hook in copies and pickles of the model."""
