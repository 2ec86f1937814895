"""lean(): keep less for backward. Outputs of batch norms are made again there, with the same bits."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.autograd import on_made
from batchnorm.records import Record, Skipped, format_names
from batchnorm.restoring import unwrapped
from batchnorm.saved_tensors import _counter
from batchnorm.saved_tensors._following import Following
from batchnorm.saved_tensors._recipes import Layer, unpack

__all__ = ["Lean", "Remade", "lean"]

_MIB = 1 << 20
_FUNCTION = ("batch_norm()", "function")
"""Name and class of a call that belongs to no layer."""


@dataclass(frozen=True, slots=True)
class Remade:
    """One layer of a `Lean`, of the last forward.

    Attributes:
        name: the layer's name; "batch_norm()" for calls that belong to no layer.
        kind: its class.
        bytes: what forward did not keep: the layer's output, and what follows it up to the next convolution.
    """

    name: str
    kind: str
    bytes: int


class _Forwards(threading.local):
    """The forwards that run in this thread: the module, and what follows it, or None."""

    def __init__(self) -> None:
        self.running: list[tuple[nn.Module, _Run | None]] = []


_FORWARDS = _Forwards()


class _Run:
    """One forward that is followed."""

    def __init__(self, following: Following) -> None:
        self.following = following
        self._hooks: Any = saved_tensors_hooks(following.hook, unpack)
        self._hooks.__enter__()
        following.__enter__()  # type: ignore[no-untyped-call]
        self._before = on_made.get()
        on_made.set(following.made)

    def end(self) -> None:
        on_made.set(self._before)
        self.following.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(None, None, None)
        self.following.close()


class Lean(Record):
    """What `lean` changed, and what it saves: of the model's last forward.

    Attributes:
        layers: one record for each layer whose output is not kept.
        skipped: the other layers, each with the reason.
        aside: why the last forward kept everything: None if it did not.
    """

    _left = "kept"

    def __init__(self) -> None:
        self._forget()
        self._handles: list[Any] = []

    def _forget(self) -> None:
        self.layers: tuple[Remade, ...] = ()
        self.skipped: tuple[Skipped, ...] = ()
        self.aside: str | None = None
        self._ran = False
        self._names: dict[int, tuple[str, str]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the model has hooks with a record of the copy's forwards, and none so far."""
        vars(self).update(state)
        self._forget()

    @property
    def bytes(self) -> int:
        """What the last forward did not keep."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def active(self) -> bool:
        """Whether the model's forwards keep less."""
        return bool(self._handles)

    def close(self) -> None:
        """Remove it from the model: forwards from now on keep everything."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Lean:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _head(self) -> list[str]:
        if self.aside is not None:
            return [f"nothing saved: {self.aside}"]
        if not self._ran:
            return ["no forward yet"]
        return [f"{self.bytes / _MIB:.1f} MiB less kept by the last forward"]

    def _rows(self) -> Iterable[tuple[str, str]]:
        return [(f"{layer.kind}  {layer.bytes / _MIB:.1f} MiB", format_names(layer.name)) for layer in self.layers]

    # --- the hooks of the model

    def _attach(self, model: nn.Module) -> None:
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        run = None
        if torch.is_grad_enabled() and not any(run is not None for _, run in _FORWARDS.running):
            self.aside = _why_aside((*args, *kwargs.values()))
            if self.aside is None:
                run = _Run(Following(_counter.current()))
        _FORWARDS.running.append((module, run))

    def _end(self, module: nn.Module, *_: object) -> None:
        if torch.compiler.is_compiling() or not _FORWARDS.running or _FORWARDS.running[-1][0] is not module:
            return
        run = _FORWARDS.running.pop()[1]
        if run is not None:
            run.end()
            self._learn(module, run.following.saved, run.following.why)

    def _learn(self, module: nn.Module, saved: dict[Layer, int], why: dict[Layer, str]) -> None:
        if not all(any(tensor in self._names for tensor in tensors) for tensors in why):
            self._names = _names(module)  # not in each forward: it takes a millisecond

        def name_of(tensors: Layer) -> tuple[str, str]:
            return next((self._names[tensor] for tensor in tensors if tensor in self._names), _FUNCTION)

        sums: dict[tuple[str, str], int] = {}
        for tensors, number in saved.items():
            name = name_of(tensors)
            sums[name] = sums.get(name, 0) + number
        reasons = {name_of(tensors): reason for tensors, reason in why.items()}
        self.layers = tuple(Remade(*name, number) for name, number in sums.items())
        self.skipped = tuple(Skipped(*name, reason) for name, reason in reasons.items() if name not in sums)
        self._ran = True


def lean(model: nn.Module) -> Lean:
    """Keep less for backward, with equal bits: outputs of batch norms are made again there, not kept.

    What a convolution saves for its gradient is often the output of a batch norm, with an activation, an addition or
    padding after it. It follows from the batch norm's input, which is kept in any case: forward stores a recipe in its
    place, and backward runs the same operations again, once for all who need the tensor. Losses and gradients do not
    change.

    >>> bn.lean(model)                   # from now on
    >>> with bn.lean(model) as record:   # or for a while
    ...     train(model)
    >>> print(record)

    Followed are torch.nn's batch norms and this package's, activations, casts, sums, products and constant padding,
    in place or not. Anything else is kept. Where forward runs under other saved-tensor hooks (activation checkpointing,
    `save_on_cpu`), torch.compile, torch.func or a trace, everything is kept, and the record says so.

    Args:
        model: gets two forward hooks; its state dict does not change. A second call returns the same record.

    Returns:
        What the last forward did not keep, by layer, and why not; `close` removes it, and so does the end of `with`.

    Raises TypeError if `model` is not a torch.nn.Module. Backward raises PyTorch's RuntimeError if a tensor that it
    needs was changed in place.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lean takes a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    inner = unwrapped(model)
    for hook in inner._forward_pre_hooks.values():
        found = getattr(hook, "__self__", None)
        if isinstance(found, Lean):
            return found
    record = Lean()
    record._attach(inner)
    return record


def _names(model: nn.Module) -> dict[int, tuple[str, str]]:
    """The name and the class of each batch norm layer, by the identities of its tensors."""
    found: dict[int, tuple[str, str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            for tensor in (*layer.buffers(), *layer.parameters()):
                found.setdefault(id(tensor), (name, type(layer).__name__))
    return found


def _why_aside(inputs: Iterable[Any]) -> str | None:
    """Why a forward is not followed; None if it is."""
    if torch._C._get_tracing_state() is not None or any(isinstance(value, torch.fx.Proxy) for value in inputs):
        return "a trace records the operations"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms the operations"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return "saved-tensor hooks are disabled"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None and _counter.current() is None:
        return "other saved-tensor hooks are active, as of activation checkpointing or save_on_cpu"
    return None
