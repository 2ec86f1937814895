"""The storages that autograd saves in a forward, each with the layer that saves it first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from batchnorm.saved_tensors._counter import counting


class Storage(NamedTuple):
    """A storage that was saved: its size, the type of the tensor that was saved first, and the layer that ran then."""

    reference: StorageWeakRef
    nbytes: int
    dtype: torch.dtype
    layer: nn.Module

    @property
    def is_alive(self) -> bool:
        return not self.reference.expired()  # type: ignore[no-untyped-call]


class Storages:
    """Collects the storages that a model's forward saves for backward.

    A storage that is freed before the forward ends is not counted: its address may be another one's by then, so a weak
    reference says whether it still exists.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._modules = model, set(model.modules())
        self._saved: dict[int, Storage] = {}
        self._excluded = self._of_model()

    def add(self, tensor: Tensor) -> None:
        """Record the storages of a saved tensor that are new."""
        for part in _dense(tensor):
            storage = part.untyped_storage()
            reference = _weak(storage)
            if reference.cdata not in self._saved:
                size = storage.nbytes()
                self._saved[reference.cdata] = Storage(reference, size, tensor.dtype, self._running())

    def kept(self) -> list[Storage]:
        """Those that exist, without parameters and buffers. The outputs of the forward must exist, too."""
        excluded = self._excluded | self._of_model()
        return [one for key, one in self._saved.items() if one.is_alive and key not in excluded and one.nbytes]

    def _of_model(self) -> set[int]:
        tensors = (tensor for tensor in (*self._model.parameters(), *self._model.buffers()) if not is_lazy(tensor))
        return {_weak(part.untyped_storage()).cdata for tensor in tensors for part in _dense(tensor)}

    def _running(self) -> nn.Module:
        """The innermost module whose method runs.

        It is read from the stack: with hooks on the modules, `convert`'s fused layers and activations would run apart.
        """
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and code.co_varnames[0] == "self":
                module = frame.f_locals.get("self")
                if isinstance(module, nn.Module) and module in self._modules:
                    return module
            frame = frame.f_back  # type: ignore[assignment]
        return self._model


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a storage that hold the values of a tensor: one, or those of a sparse tensor."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return ()  # of oneDNN, without a storage


@contextmanager
def collected(storages: Storages) -> Iterator[None]:
    """Record what autograd saves, and what `lean` keeps in place of it."""

    def pack(tensor: Tensor) -> Tensor:
        storages.add(tensor)
        return tensor.detach()  # an output that is saved with its graph would never be freed

    with counting(storages.add), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
