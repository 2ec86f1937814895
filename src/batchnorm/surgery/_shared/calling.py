"""The one rule by which tools call a model with what their user gives them.

- A tensor is the input: model(x).
- A mapping has the model's arguments by name: model(**mapping).
- A tuple or list in `batches` is what a DataLoader gives: its first element is the input, model(batch[0]), as
  torch.optim.swa_utils.update_bn has it.
- A tuple as `example` has the model's positional arguments: model(*example), as torch.export has it.
- forward_fn(model, batch) or forward_fn(model, example) runs the model on anything else.

A model is given copies, since it may write to its input.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.restoring import same_random_numbers

ForwardFn = Callable[[Any, Any], Any]
"""forward_fn(model, batch) or forward_fn(model, example): runs the model on it."""

Follow = Callable[[Iterable[Any], int, int, int | None], Iterator[Any]]
"""follow(batches, number of the pass, passes, batches in it where known) shows how far the reading is."""


class Feed:
    """Batches for a model, for the function `what`: `read` moves them to its device, `run` calls it with one.

    Without a device that of the model's first tensor. Raises TypeError where the batches are none, or forward_fn cannot
    be called.
    """

    def __init__(
        self,
        what: str,
        model: nn.Module,
        batches: Iterable[Any],
        forward_fn: ForwardFn | None,
        device: torch.device | str | int | None = None,
    ) -> None:
        if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
            raise TypeError(
                f"{what}: batches must be a list of batches or a DataLoader, got {type(batches).__name__}: "
                "for a single batch pass [batch]"
            )
        _check(what, forward_fn, "batch")
        self.what, self.model, self.batches, self.forward_fn = what, model, batches, forward_fn
        own = next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)
        self.device = own if device is None else torch.device(device)

    def length(self, most: int | None) -> int | None:
        """How many batches `read` gives; None where it is not known."""
        try:
            found = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return most
        return found if most is None else min(found, most)

    def read(self, most: int | None = None) -> Iterator[Any]:
        """The batches, at most `most`: copies on the device, since a model may write to its input."""
        for batch in itertools.islice(self.batches, most):
            yield moved(batch, self.device)

    def run(self, batch: Any) -> Any:
        """What the model returns on a batch, by the rule of this module."""
        known = isinstance(batch, Tensor | Mapping) or (isinstance(batch, tuple | list) and batch)
        if known or self.forward_fn is not None:
            return _call(self.model, batch, self.forward_fn)
        raise TypeError(
            f"{self.what}: a batch is a tensor, a tuple or list whose first element is the input, or a mapping of the "
            f"model's arguments, got {'an empty ' if batch == () or batch == [] else ''}{type(batch).__name__}: "
            "pass forward_fn(model, batch) for any other"
        )


class Example:
    """What a model is called with, once or several times, for the function `what`: `run` calls it.

    Raises TypeError where the model cannot be called with it.
    """

    def __init__(self, what: str, model: nn.Module, example: Any, forward_fn: ForwardFn | None) -> None:
        _check(what, forward_fn, "example")
        forms = "a tensor, a tuple of the model's arguments or a mapping of named ones"
        if example is None:
            raise TypeError(f"{what} needs an example of the model's input, to run it on: {forms}")
        if forward_fn is None and not isinstance(example, Tensor | Mapping | tuple):
            raise TypeError(
                f"{what}: the example must be {forms}, got {type(example).__name__}: pass forward_fn(model, example) "
                "for any other" + (", or (list,) to a model that takes a list" if isinstance(example, list) else "")
            )
        self.what, self.model, self.value, self.forward_fn = what, model, example, forward_fn

    def run(self) -> Any:
        """What the model returns on a copy of the example, with the same random numbers each time.

        Raises ValueError, for the function `what`, where the model does not take it.
        """
        value = moved(self.value, None)
        with same_random_numbers(self.model):
            try:
                return _call(self.model, value, self.forward_fn, positional=True)
            except Exception as error:
                raise ValueError(f"{self.what}: the model does not run on the example: {error}") from error


def moved(value: Any, device: torch.device | None) -> Any:
    """The value with copies of its tensors, on the device if any: in dicts, lists, tuples and named ones.

    What else has a `to` (a PackedSequence, a BatchEncoding) is moved by it.
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone() if device is None else leaf.to(device, copy=True)
        if callable(getattr(leaf, "to", None)):
            return leaf if device is None else leaf.to(device)
        if isinstance(leaf, dict):  # of a subclass that PyTorch does not know
            copied = leaf.copy()
            copied.update({key: moved(part, device) for key, part in leaf.items()})
            return copied
        return leaf

    return tree_map(of_leaf, value, is_leaf=lambda part: callable(getattr(part, "to", None)))


@contextmanager
def followed(what: str, progress: bool | None) -> Iterator[Follow]:
    """A progress bar on stderr, or none: `progress` None shows it where stderr is a terminal."""
    wanted = sys.stderr.isatty() if progress is None else progress
    if not wanted or (progress is None and find_spec("rich") is None):
        yield lambda batches, number, passes, total: iter(batches)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(what)

        def follow(batches: Iterable[Any], number: int, passes: int, total: int | None) -> Iterator[Any]:
            bar.reset(task, total=total, description=f"{what}: pass {number} of {passes}")
            for batch in batches:
                yield batch
                bar.advance(task)

        yield follow


def _call(model: nn.Module, given: Any, forward_fn: ForwardFn | None, positional: bool = False) -> Any:
    """The rule: `positional` says that a tuple has the arguments, and not the input first."""
    if forward_fn is not None:
        return forward_fn(model, given)
    if isinstance(given, Mapping):
        return model(**given)
    if isinstance(given, Tensor):
        return model(given)
    return model(*given) if positional else model(given[0])


def _check(what: str, forward_fn: object, of: str) -> None:
    if forward_fn is not None and not callable(forward_fn):
        raise TypeError(f"{what}: forward_fn must be a function of (model, {of}), got {type(forward_fn).__name__}")


def leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in what a model returns: nested sequences, mappings and dataclasses."""
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
