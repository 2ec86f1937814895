"""What forward stores in the place of a saved tensor: the tensor itself, or a recipe that makes it again in backward.

A recipe reads tensors that forward keeps anyway, and other recipes. In one backward each recipe runs once: its tensor
is shared by all who read it, and freed after the last one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from batchnorm.saved_tensors import _in_place

_DEEPEST = 2
"""How many recipes may need one another's tensors in a row, as along the residual blocks of a stage.

Backward needs all of a row at the same time: a longer one would move the memory from forward to backward.
"""
_LONGEST = 16
"""How many operations may follow one another in all: each of them makes its tensor again."""


Run = Callable[..., Tensor]
Layer = tuple[int, ...]
"""A batch norm layer by the identities of its tensors: to search its name takes a millisecond."""


class Kept:
    """A tensor that is kept, with the version that it must have in backward."""

    __slots__ = ("__weakref__", "_origin", "_version", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that is saved with its graph would never be freed
        self._version = tensor._version
        node = tensor.grad_fn
        self._origin = None if node is None else (tensor.output_nr, node.name())

    def tensors(self) -> Iterator[Tensor]:
        """The tensors in memory."""
        yield self.tensor

    def add_reader(self) -> None:
        """Nothing to count: the tensor stays."""

    def take(self) -> Tensor:
        """The tensor. Raises PyTorch's RuntimeError if it was changed in place."""
        tensor = self.tensor
        if tensor._version != self._version:
            raise RuntimeError(_in_place.message(tensor, self._origin, self._version))
        return tensor


class Recipe:
    """An operation and the sources of its tensors."""

    __slots__ = (
        "__weakref__",
        "_like",
        "_overwrite",
        "_readers",
        "_run",
        "_sources",
        "_tensor",
        "_waiting",
        "depth",
        "layer",
        "length",
    )
    depth: int
    length: int

    def __init__(
        self,
        run: Run,
        sources: Sequence[Source],
        like: Tensor,
        layer: Layer,
        nested: bool = False,
        overwrite: Run | None = None,
    ) -> None:
        """`run` of the sources' tensors makes `like`.

        `nested` for a batch norm, whose backward needs them, too. `overwrite` does the same in the first tensor's
        memory.
        """
        self._run, self._overwrite, self._sources = run, overwrite, tuple(sources)
        self._like = like.shape, like.stride(), like.dtype
        self.layer = layer
        made = depth = length = 0
        for source in sources:
            if type(source) is Recipe:
                made += 1
                depth, length = max(depth, source.depth), max(length, source.length)
        self.depth = depth + (made > (0 if nested else 1))
        self.length = length + 1
        self._readers = self._waiting = 0
        self._tensor: Tensor | None = None

    @property
    def is_short(self) -> bool:
        """Whether it may be used: backward would otherwise make many tensors for this one."""
        return self.depth <= _DEEPEST and self.length <= _LONGEST

    @property
    def is_used(self) -> bool:
        """Whether anyone reads it."""
        return self._readers > 0

    def tensors(self) -> Iterator[Tensor]:
        """The tensors in memory that it reads."""
        return chain.from_iterable(source.tensors() for source in self._sources)

    def add_reader(self) -> None:
        """Count one more reader: a saved tensor, or another recipe that is read."""
        if not self._readers:
            for source in self._sources:
                source.add_reader()
        self._readers += 1

    def take(self) -> Tensor:
        """The tensor, made now or for an earlier reader in this backward."""
        with _LOCK:
            tensor = self._tensor
            if tensor is None:
                tensor = self._make()
                self._waiting = self._readers
                if self._waiting > 1 and _at_end_of_backward(partial(_drop, weakref.ref(self))):
                    self._tensor = tensor
            self._waiting -= 1
            if self._waiting <= 0:
                self._tensor = None
            return tensor

    def _make(self) -> Tensor:
        shape, strides, dtype = self._like
        with torch.no_grad(), torch._C.DisableTorchFunction(), _no_autocast():
            tensors = [source.take() for source in self._sources]
            first = self._sources[0]
            run = self._run
            if self._overwrite is not None and isinstance(first, Recipe) and first._readers == 1:  # only this one
                run = self._overwrite
            made = run(*tensors).to(dtype)
            if made.stride() != strides:
                made = torch.empty_strided(shape, strides, dtype=dtype, device=made.device).copy_(made)
        return made


Source = Kept | Recipe


class Slot:
    """A source that may be replaced until the operation that saves the tensor has returned."""

    __slots__ = ("source",)

    def __init__(self, source: Source) -> None:
        self.source = source

    def take(self) -> Tensor:
        """The tensor of the source."""
        return self.source.take()


def unpack(packed: Source | Slot) -> Tensor:
    """The saved tensor. A function, not a method: the graph must not keep what forward knew."""
    return packed.take()


_LOCK = threading.RLock()
"""Backward runs in a thread for each device; a recipe reads tensors of one."""


def _drop(recipe: weakref.ref[Recipe]) -> None:
    """Free what is left at the end of a backward that did not reach all readers.

    By a weak reference: until then the recipe would keep its sources in memory.
    """
    alive = recipe()
    if alive is not None:
        alive._tensor = None


def _at_end_of_backward(action: Callable[[], None]) -> bool:
    """Call `action` at the end of the running backward; False if none runs, as when a node's attribute is read."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(action)
    except RuntimeError:
        return False
    return True


def _no_autocast() -> Any:
    """Operations ran on tensors that autocast had converted already; backward may be inside of autocast."""
    return torch._C._DisableAutocast()
