"""What a pickle of tensors builds here: containers, storages and tensors as descriptions, and no other object.

A name in the pickle (a storage, a function that rebuilds a tensor) stands for one of a fixed list of kinds, and calling
it makes a description. Nothing is imported, called or loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchnorm.checks.readers._parsing.files import Bytes, CheckpointError, Region, well_formed
from batchnorm.checks.readers._parsing.stored import MAX_TENSORS, SIZES, Stored, Strided, Unreadable, extent, plausible

_STORAGES = (
    {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"}
    | {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
    | {"ComplexDouble": "complex128", "ComplexFloat": "complex64"}
    | {"QInt8": "qint8", "QInt32": "qint32", "QUInt8": "quint8", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"}
)
_TENSORS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = (
    *SIZES,
    *("complex32", "complex64", "complex128", "float4_e2m1fn_x2"),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)),
)
_UTILS = (
    *("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_tensor", "_rebuild_tensor_v2"),
    *("_rebuild_tensor_v3", "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage"),
    *("_rebuild_nested_tensor", "_rebuild_wrapper_subclass"),
    *("_rebuild_device_tensor_from_numpy", "_rebuild_device_tensor_from_cpu_tensor"),
)
_QSCHEMES = (
    *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"),
    "per_channel_affine_float_qparams",
)


@dataclass(frozen=True, slots=True)
class Name:
    """What a name stands for: its kind, and of a storage or a dtype the type of its elements."""

    kind: str
    dtype: str = ""


def _table() -> dict[str, Name]:
    table = {
        "collections.OrderedDict": Name("mapping"),
        "collections.Counter": Name("mapping"),
        "builtins.set": Name("other"),
        "builtins.complex": Name("other"),
        "builtins.bytearray": Name("other"),
        "_codecs.encode": Name("encode"),
        "torch.Size": Name("size"),
        "torch.device": Name("other"),
        "torch.serialization._get_layout": Name("other"),
        "torch.nn.parameter.Parameter": Name("parameter"),
        "torch.Tensor": Name("tensor"),
        "torch._tensor._rebuild_from_type_v2": Name("_rebuild_from_type_v2"),
        "torch.storage.UntypedStorage": Name("storage", "uint8"),
        "torch.storage.TypedStorage": Name("other"),
    }
    for name, dtype in _STORAGES.items():
        table[f"torch.{name}Storage"] = Name("storage", dtype)
        if not name.startswith("Q"):
            table[f"torch.cuda.{name}Storage"] = Name("storage", dtype)
    for name in _TENSORS:
        kinds = ("torch", "torch.cuda", *(("torch.sparse", "torch.cuda.sparse") if name != "Bool" else ()))
        table |= {f"{kind}.{name}Tensor": Name("tensor") for kind in kinds}
    table |= {f"torch.{name}": Name("dtype", name) for name in _DTYPES}
    table |= {f"torch.{name}": Name("other") for name in _QSCHEMES}
    table |= {f"torch._utils.{name}": Name(name) for name in _UTILS}
    return table


ALLOWED: Mapping[str, Name] = _table()
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules as Python 2 called them, which pickles of protocol 2 still do."""


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


MAX_DEPTH = 16
"""Containers inside containers. Checkpoints have up to six."""
MAX_VISITS = 2**21
"""Entries looked at: a container that is shared a thousand times is looked at a thousand times."""

Path = tuple[str, ...]


def tensors(value: Any) -> dict[Path, Stored]:
    """Every tensor in a described object, by the keys and positions that lead to it; of equal paths the last.

    Raises:
        CheckpointError: too many, too deep, or a tensor outside the file.
    """
    found: dict[Path, Stored] = {}
    places: dict[int, Stored] = {}
    visits = 0
    # One iterator for each container from the outermost to where we are.
    open_: list[tuple[int, Path, Iterator[tuple[Any, Any]]]] = [(0, (), iter([("", value)]))]
    inside: set[int] = set()
    while open_:
        container, path, entries = open_[-1]
        key, entry = next(entries, (None, open_))
        if entry is open_:
            open_.pop()
            inside.discard(container)
            continue
        visits += 1
        if visits > MAX_VISITS:
            raise CheckpointError("the containers in the file hold one another too often: save the state_dict alone")
        if isinstance(entry, Tensor):
            if id(entry) not in places:
                places[id(entry)] = entry.stored()
            found[path + _step(key, open_) or ("",)] = places[id(entry)]
            if len(found) > MAX_TENSORS:
                raise CheckpointError(f"the file holds more than {MAX_TENSORS} tensors")
        elif isinstance(entry, Items | list | tuple) and id(entry) not in inside:
            if len(open_) > MAX_DEPTH:
                raise CheckpointError(
                    f"containers in the file are nested deeper than {MAX_DEPTH}: save the state_dict alone"
                )
            visits += len(entry.flat if isinstance(entry, Items) else entry)
            inside.add(id(entry))
            open_.append((id(entry), path + _step(key, open_), _entries(entry)))
    return found


def _step(key: Any, open_: list[Any]) -> Path:
    """The last part of a path; what lies at the top has none, and a tensor there the empty name."""
    return (_name(key),) if len(open_) > 1 else ()


def _entries(container: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(container, Items):
        return enumerate(container)
    flat = container.flat
    last = {_name(key): at for at, key in enumerate(flat[::2])}
    return ((name, flat[2 * at + 1]) for name, at in last.items())


def _name(key: Any) -> str:
    if isinstance(key, str):
        return well_formed(key)
    return str(key) if key is None or isinstance(key, int | float) else type(key).__name__
