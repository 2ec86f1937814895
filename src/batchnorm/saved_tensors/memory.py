"""memory(): what a forward keeps for backward, by layer and kind."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.activation import MultiheadAttention
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from batchnorm.records import Record, format_names
from batchnorm.restoring import unchanged, unwrapped
from batchnorm.saved_tensors._counter import counting
from batchnorm.surgery._shared.calling import Feed, ForwardFn
from batchnorm.surgery._shared.layers import check_module, names_of
from batchnorm.words import KEPT_BY, plural, shortened

__all__ = ["Memory", "Saved", "memory"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_MAPS = (_ConvNd, nn.Linear, nn.Bilinear)
_MODULES_OF_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
_LAYERS = 8
"""How many layers are printed."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What one layer keeps, of one kind.

    Attributes:
        layer: its name; empty if it is the model itself.
        type: its class.
        kind: "norm", "convolution" (or linear layer), "activation", "mask" (bool, or packed bits), or "other".
        bytes: the sizes of the storages that this layer is the first to keep.
        storages: their number.
    """

    layer: str
    type: str
    kind: str
    bytes: int
    storages: int


@dataclass(frozen=True, slots=True, repr=False)
class Memory(Record):
    """What `memory` measured: what one forward keeps for backward.

    Attributes:
        entries: one record for each layer and kind, in the order in which they run.
        training: whether the model was in training mode.
    """

    entries: tuple[Saved, ...]
    training: bool

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by kind, each kind that occurs."""
        sums = {kind: sum(entry.bytes for entry in self.entries if entry.kind == kind) for kind in KEPT_BY}
        return {kind: size for kind, size in sums.items() if size}

    @property
    def by_layer(self) -> dict[str, int]:
        """Bytes by layer, the largest first."""
        sums: Counter[str] = Counter()
        for entry in self.entries:
            sums[entry.layer] += entry.bytes
        return dict(sums.most_common())

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "training": self.training,
            "bytes": self.total,
            "by_kind": self.by_kind,
            "entries": [asdict(entry) for entry in self.entries],
        }

    def __str__(self) -> str:
        mode = "training" if self.training else "eval"
        storages = plural(sum(entry.storages for entry in self.entries), "storage")
        lines = [f"{in_words(self.total)} kept by one forward in {mode} mode, in {storages}"]
        for kind, size in self.by_kind.items():
            lines.append(f"{in_words(size):>14}  {size / self.total:4.0%}  {KEPT_BY[kind]}")
        layers = self.by_layer
        if len(layers) > 1:
            most = min(_LAYERS, len(layers))
            lines.append(f"the {plural(most, 'layer')} that keep most, of {len(layers)}")
            types = {entry.layer: entry.type for entry in self.entries}
            lines += [
                f"{in_words(layers[name]):>14}  {shortened(format_names(name), 60)} ({types[name]})"
                for name in list(layers)[:most]
            ]
        return "\n".join(lines)


def memory(model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None) -> Memory:
    """Measure what one forward keeps for backward, by layer and kind.

    It counts the storages that autograd saves, without parameters and buffers: each once, under the first layer that
    saves it. What `lean` keeps in place of a tensor is counted as well. This is the part of a step's memory that grows
    with the batch and that batch norm shares in. A step also needs gradients, the state of the optimizer and workspaces
    of convolutions: `batchnorm bench --memory` measures whole steps.

    Runs one forward on a copy of the batch, in the model's mode, and restores the model and the random number
    generators: buffers, gradients and training flags are as before. Activations that `convert` fused stay fused.

    Not counted: the loss; tensors that code keeps without autograd, such as attributes of `ctx` in a
    `torch.autograd.Function`; tensors that other code keeps in its own saved-tensor hooks.

    Args:
        model: in training mode, to see what a step of training keeps. Of a wrapper (DistributedDataParallel), the
            wrapped model is measured.
        batch: a tensor; a tuple or list, whose first element is the input; a mapping of the model's arguments; or
            anything that forward_fn accepts.
        forward_fn: forward_fn(model, batch) runs the model. If it returns the loss, that is counted, too.

    Returns:
        A record with the total, the sums by kind and by layer; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module, or the batch is none of the above without a forward_fn;
    ValueError if the model or a part of it is compiled: compiled code has no layers.
    """
    check_module("memory", model)
    inner = unwrapped(model)
    for module in inner.modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise ValueError("memory: a part of the model is compiled: pass the model that is not compiled")
    feed = Feed("memory", inner, [batch], forward_fn)
    with torch.inference_mode(False), torch.enable_grad(), unchanged(inner):
        copied = next(feed.read())
        storages = Storages(inner)
        with collected(storages):
            outputs = feed.run(copied)
        kept = storages.kept()
        del outputs
    return Memory(_entries(kept, {module: names[0] for module, names in names_of(inner).items()}), model.training)


def _entries(kept: list[Storage], names: Mapping[nn.Module, str]) -> tuple[Saved, ...]:
    groups: dict[tuple[nn.Module, str], list[int]] = {}
    for storage in kept:
        groups.setdefault((storage.layer, _kind(storage)), []).append(storage.nbytes)
    return tuple(
        Saved(names.get(layer, ""), type(layer).__name__, kind, sum(sizes), len(sizes))
        for (layer, kind), sizes in groups.items()
    )


def _kind(storage: Storage) -> str:
    """A key of `KEPT_BY`."""
    if storage.dtype in (torch.bool, torch.uint8):
        return "mask"
    if isinstance(storage.layer, _NORMS):
        return "norm"
    if isinstance(storage.layer, _MAPS):
        return "convolution"
    if isinstance(storage.layer, MultiheadAttention):
        return "other"
    classes = type(storage.layer).__mro__
    return "activation" if any(cls.__module__ in _MODULES_OF_ACTIVATIONS for cls in classes) else "other"


def in_words(size: int) -> str:
    """A number of bytes in MiB, or in KiB if it is small."""
    return f"{size / (1 << 20):,.1f} MiB" if size >= 1 << 17 else f"{size / 1024:,.1f} KiB"


# --- the storages that autograd saves in a forward, each with the layer that saves it first


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
