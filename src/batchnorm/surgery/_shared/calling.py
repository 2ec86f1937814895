"""The one rule by which all tools call a model.

- A tensor is the input: model(x).
- A mapping has the model's arguments by name: model(**mapping).
- A tuple or list in `batches` is a DataLoader's batch: its first element is the input, model(batch[0]), as in
  torch.optim.swa_utils.update_bn.
- A tuple as `example` has the model's positional arguments: model(*example), as in torch.export.
- forward_fn(model, batch) or forward_fn(model, example) runs the model on anything else.
- Without an example, a random input of the first convolution's or linear layer's sizes is one, if the model runs on it.

The model receives copies, since it may write to its input.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from batchnorm.restoring import preserve_random_state, undisturbed

ForwardFn = Callable[[Any, Any], Any]
"""forward_fn(model, batch) or forward_fn(model, example): runs the model on it."""

_SIDES = (32, 64, 224)
"""Sizes of a random input along each axis, in the order in which they are tried; the last is too large in 3-d."""

Follow = Callable[[Iterable[Any], int, int, int | None], Iterator[Any]]
"""follow(batches, pass number, passes, number of batches if known) iterates over the batches and shows the progress."""


class Feed:
    """The batches of the tool named `tool`: `read` yields copies on the device, `run` calls the model with one.

    The default device is that of the model's first tensor. Raises TypeError if `batches` is not an iterable of batches
    or forward_fn is not callable.
    """

    def __init__(
        self,
        tool: str,
        model: nn.Module,
        batches: Iterable[Any],
        forward_fn: ForwardFn | None,
        device: torch.device | str | int | None = None,
    ) -> None:
        if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
            raise TypeError(
                f"{tool}: batches must be a list of batches or a DataLoader, got {type(batches).__name__}: "
                "for a single batch pass [batch]"
            )
        _check_forward_fn(tool, forward_fn, "batch")
        self.tool, self.model, self.batches, self.forward_fn = tool, model, batches, forward_fn
        first = next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)
        self.device = first if device is None else torch.device(device)

    def length(self, limit: int | None) -> int | None:
        """The number of batches that `read` yields; None if unknown."""
        try:
            length = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return limit
        return length if limit is None else min(length, limit)

    def read(self, limit: int | None = None) -> Iterator[Any]:
        """Yield copies of the batches, at most `limit`, on the device."""
        for batch in itertools.islice(self.batches, limit):
            yield copy_to(batch, self.device)

    def run(self, batch: Any) -> Any:
        """Call the model with a batch, by the rule of this module."""
        known = isinstance(batch, Tensor | Mapping) or (isinstance(batch, tuple | list) and batch)
        if known or self.forward_fn is not None:
            return _call(self.model, batch, self.forward_fn)
        raise TypeError(
            f"{self.tool}: a batch is a tensor, a tuple or list whose first element is the input, or a mapping of the "
            f"model's arguments, got {'an empty ' if batch == () or batch == [] else ''}{type(batch).__name__}: "
            "pass forward_fn(model, batch) for any other"
        )


class Example:
    """The example of the tool named `tool`: `run` calls the model with it.

    With None it makes one, and `made` has its sizes. Raises TypeError if the model cannot be called with it.
    """

    def __init__(self, tool: str, model: nn.Module, example: Any, forward_fn: ForwardFn | None) -> None:
        _check_forward_fn(tool, forward_fn, "example")
        forms = "a tensor, a tuple of the model's arguments or a mapping of named ones"
        self.made: tuple[int, ...] | None = None
        if example is None and forward_fn is None and (example := _random_input(model)) is not None:
            self.made = tuple(example.shape)
        if example is None:
            raise TypeError(f"{tool} needs an example of the model's input, to run it on: {forms}")
        if forward_fn is None and not isinstance(example, Tensor | Mapping | tuple):
            raise TypeError(
                f"{tool}: the example must be {forms}, got {type(example).__name__}: pass forward_fn(model, example) "
                "for any other" + (", or (list,) to a model that takes a list" if isinstance(example, list) else "")
            )
        self.tool, self.model, self.value, self.forward_fn = tool, model, example, forward_fn

    def run(self) -> Any:
        """Call the model with a copy of the example, with the same random numbers each time.

        Raises ValueError if the model raises.
        """
        value = copy_to(self.value, None)
        with preserve_random_state(self.model):
            try:
                return _call(self.model, value, self.forward_fn, positional=True)
            except Exception as error:
                raise ValueError(f"{self.tool}: the model does not run on the example: {error}") from error


def _random_input(model: nn.Module) -> Tensor | None:
    """A random input that fits the first convolution or linear layer; None if the model does not run on one."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear | _ConvNd))
    layer = next(layers, None)
    if layer is None:
        return None
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    axes = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    for side in _SIDES[: 3 if axes < 3 else 2]:
        value = torch.randn((2, channels, *[side] * axes), generator=torch.Generator().manual_seed(0)).to(layer.weight)
        with suppress(Exception), undisturbed(model):
            model(value.clone())
            return value
    return None


def copy_to(value: Any, device: torch.device | None) -> Any:
    """Copy the tensors in dicts, lists, tuples and named tuples, to the device if any.

    Other objects with a method `to` (a PackedSequence, a BatchEncoding) are moved by it.
    """

    def copy_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone() if device is None else leaf.to(device, copy=True)
        if callable(getattr(leaf, "to", None)):
            return leaf if device is None else leaf.to(device)
        if isinstance(leaf, dict):  # of a subclass that PyTorch does not know
            copied = leaf.copy()
            copied.update({key: copy_to(part, device) for key, part in leaf.items()})
            return copied
        return leaf

    return tree_map(copy_leaf, value, is_leaf=lambda part: callable(getattr(part, "to", None)))


@contextmanager
def show_progress(tool: str, progress: bool | None) -> Iterator[Follow]:
    """Show a progress bar on stderr; with `progress` None only if stderr is a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    if not shown or (progress is None and find_spec("rich") is None):
        yield lambda batches, number, passes, total: iter(batches)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(tool)

        def follow(batches: Iterable[Any], number: int, passes: int, total: int | None) -> Iterator[Any]:
            bar.reset(task, total=total, description=f"{tool}: pass {number} of {passes}")
            for batch in batches:
                yield batch
                bar.advance(task)

        yield follow


def _call(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None, positional: bool = False) -> Any:
    """The rule of this module; `positional` passes all elements of a tuple instead of the first."""
    if forward_fn is not None:
        return forward_fn(model, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(*inputs) if positional else model(inputs[0])


def _check_forward_fn(tool: str, forward_fn: object, second: str) -> None:
    if forward_fn is not None and not callable(forward_fn):
        raise TypeError(f"{tool}: forward_fn must be a function of (model, {second}), got {type(forward_fn).__name__}")


def leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in a model's output: nested sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from leaves(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))
