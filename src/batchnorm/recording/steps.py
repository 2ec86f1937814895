"""What a step is, and when one ends.

A step ends when an optimizer that holds parameters of the model takes a step: whatever forwards and backwards came
before belong to it, so that accumulated gradients are one step. Of several optimizers the first seen counts, or the one
given; should it rest while another takes `_SILENT` steps, the other counts from then on.

Without an optimizer of torch.optim, a step is a training forward of the model. That nobody steps is known after
`_UNDECIDED` forwards; until then they are held, and should an optimizer step after all, they are its first step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_UNDECIDED = 16
_SILENT = 10


class Listener(Protocol):
    """Who is told."""

    def update_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """The step's forwards and backwards are over; the parameters are still those that they used."""

    def forward_begins(self) -> None:
        """Without optimizers, as far as is known: the step's forward and backward are over."""

    def step_ends(self) -> None:
        """The step is counted."""

    def forwards_count(self, held: int) -> None:
        """Each of the forwards held so far was a step."""


class Steps:
    """The hooks that count: on every optimizer of the process, and on the model's forward."""

    def __init__(self, model: nn.Module, listener: Listener, optimizer: torch.optim.Optimizer | None) -> None:
        self.counted: str | None = None if optimizer is None else "optimizer"
        self.begun = False
        """Whether a forward of the model has begun since the last step ended; not known under torch.compile."""
        self.paused = False
        """Nothing counts for now: what runs is no part of the training."""
        self._listener = listener
        self._mine = {id(parameter) for parameter in model.parameters()}
        self._given = optimizer is not None
        self._counting = None if optimizer is None else weakref.ref(optimizer)
        self._concerns: weakref.WeakKeyDictionary[torch.optim.Optimizer, bool] = weakref.WeakKeyDictionary()
        self._others = 0
        self._held = 0
        self._handles: list[Any] = []
        self._model = model

    def start(self) -> None:
        forward = _ForwardHook(self._model, self._forward)
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
            self._model.register_forward_pre_hook(forward),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._counts(optimizer):
            self.counted, self._held = "optimizer", 0
            self._listener.update_begins(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._counting is not None and self._counting() is optimizer:
            self.begun = False
            self._listener.step_ends()

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

    def _forward(self) -> None:
        if self.paused:
            return
        if self.counted == "optimizer":
            self.begun = True
            return
        if self.begun:
            self._listener.forward_begins()
            if self.counted is None:
                self._held += 1
                if self._held >= _UNDECIDED:
                    self.counted = "forwards"
                    self._listener.forwards_count(self._held)
            else:
                self._listener.step_ends()
        self.begun = True


class _ForwardHook:
    """Tells of the training forwards of one model. Copies and pickles of the model take nothing of it along."""

    def __init__(self, model: nn.Module, tell: Callable[[], None]) -> None:
        self._model = weakref.ref(model)
        self._tell = tell

    def __call__(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        if module.training and self._model() is module:
            self._tell()

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return left_over, ()


def nothing(*_: object) -> None:
    """What is left of the hook in a copy of the model."""


def left_over() -> Callable[..., None]:
    """What a pickle of the hook is loaded as."""
    return nothing
