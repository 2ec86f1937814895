"""What a pickle of tensors builds here: containers, storages and tensors as descriptions, and no other object.

A name in the pickle (a storage, a function that rebuilds a tensor) stands for one of a fixed list of kinds, and calling
it makes a description. Nothing is imported, called or loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchnorm.checks.readers._parsing.allowed import Name
from batchnorm.checks.readers._parsing.elements import SIZES
from batchnorm.checks.readers._parsing.files import Bytes, Region
from batchnorm.checks.readers._parsing.stored import CheckpointError, Stored, Unreadable
from batchnorm.checks.readers._parsing.strided import Strided, extent, plausible

OTHER = Name("other")
"""An object that holds no tensor: it is carried along and dropped."""
DAMAGED = "the pickle in the file is damaged: save the checkpoint again"


@dataclass(slots=True, eq=False)
class Items:
    """A dict, as its keys and values in turn. Keys are not hashed: a file may choose them to collide."""

    flat: list[Any] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Storage:
    """The bytes that tensors are views of, and the type of their elements. Older files tell last where they lie.

    `size` is in bytes; `base` is the storage that this one is a part of, from byte `start`; `order` is "<" for
    little-endian.
    """

    dtype: str
    size: int
    source: Bytes | None = None
    base: Storage | None = None
    start: int = 0
    order: str = "<"

    def placed(self) -> Bytes:
        """The bytes."""
        if self.base is not None:
            return Region(self.base.placed(), self.start, self.size)
        if self.source is None:
            raise CheckpointError("the file is damaged: it does not hold the numbers of a tensor that it names")
        return self.source


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides count elements. One without a storage has no numbers, and says why."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    offset: int = 0
    storage: Storage | None = None
    why: str = ""

    def stored(self) -> Stored:
        """Where it lies.

        Raises:
            CheckpointError: outside its storage.
        """
        if self.storage is None:
            return Unreadable(self.shape, self.dtype, self.why)
        if self.dtype not in SIZES:
            return Unreadable(self.shape, self.dtype, f"tensors of type {self.dtype} are not read")
        source = self.storage.placed()
        need = extent(self.shape, self.strides)
        if need and (self.offset + need) * SIZES[self.dtype] > source.size:
            raise CheckpointError("the file is damaged: a tensor reaches beyond its storage")
        return Strided(self.shape, self.dtype, source, self.offset, self.strides, self.storage.order)


def called(function: Any, arguments: Any) -> Any:
    """What calling a name of the list makes: a description, or OTHER."""
    while isinstance(function, Name) and function.kind == "_rebuild_from_type_v2":
        function, _, arguments, *_ = _arguments(arguments, 4)
    if not isinstance(function, Name):
        raise CheckpointError("the pickle in the file calls what it may not: do not load it anywhere")
    kind = function.kind
    if kind == "mapping":
        return _mapping(arguments)
    if kind == "size":
        (sizes,) = _arguments(arguments, 1)[:1]
        return tuple(sizes) if isinstance(sizes, list | tuple) else OTHER
    if kind in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        storage, offset, shape, strides, *rest = _arguments(arguments, 4)
        return _view(storage, offset, shape, strides, None, rest[2:])
    if kind == "_rebuild_tensor_v3":
        storage, offset, shape, strides, _, _, dtype, *rest = _arguments(arguments, 7)
        return _view(storage, offset, shape, strides, dtype, rest)
    if kind in ("_rebuild_parameter", "_rebuild_parameter_with_state", "parameter"):
        return _arguments(arguments, 1)[0]
    if kind == "_rebuild_device_tensor_from_cpu_tensor":
        return _arguments(arguments, 1)[0]
    if kind == "_rebuild_qtensor":
        storage, _, shape, *_ = _arguments(arguments, 3)
        dtype = storage.dtype if isinstance(storage, Storage) else "quantized"
        return Tensor(dtype, _sizes(shape), why="quantized tensors are not read")
    if kind == "_rebuild_meta_tensor_no_storage":
        dtype, shape, *_ = _arguments(arguments, 2)
        name = dtype.dtype if isinstance(dtype, Name) else "unknown"
        return Tensor(name, _sizes(shape), why="a tensor on the meta device has no numbers")
    return OTHER


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any, metadata: list[Any]) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(offset, int) or offset < 0:
        raise CheckpointError(DAMAGED)
    name = dtype.dtype if isinstance(dtype, Name) else storage.dtype
    sizes, steps = _sizes(shape), _sizes(strides)
    if len(sizes) != len(steps):
        raise CheckpointError(DAMAGED)
    if metadata and isinstance(metadata[0], Items) and metadata[0].flat:
        return Tensor(name, sizes, why="a lazily conjugated or negated tensor is not read")
    return Tensor(name, sizes, steps, offset, storage)


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, tuple | list) and all(type(entry) is int for entry in value) and plausible(tuple(value)):
        return tuple(value)
    raise CheckpointError(DAMAGED)


def _mapping(arguments: Any) -> Items:
    """OrderedDict(), OrderedDict(pairs), Counter(dict)."""
    items = Items()
    for argument in _arguments(arguments, 0)[:1]:
        if isinstance(argument, Items):
            items.flat += argument.flat
        elif isinstance(argument, list | tuple):
            for pair in argument:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise CheckpointError(DAMAGED)
                items.flat += pair
        else:
            raise CheckpointError(DAMAGED)
    return items


def _arguments(value: Any, least: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) < least:
        raise CheckpointError(DAMAGED)
    return value
