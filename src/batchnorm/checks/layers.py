"""Batch norm layers found by the names of tensors, whatever framework named them.

A layer is where a running mean and a running variance stand beside each other; what else stands there is its gamma,
beta and count of batches. Tensors come by path: the keys of the containers they lie in, then the name that the
framework gave them. Of several containers with layers (a model and its moving average) each is a copy of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Path = tuple[str, ...]


def in_network_order(tensors: Mapping[Path, T], dtype_of: Callable[[T], str]) -> dict[Path, T]:
    """Tensors by path, in the file's order; where that is only the alphabet's, by the numbers in their names.

    safetensors and HDF5 sort names ("conv10" before "conv2"), safetensors those of each dtype separately. Such an order
    says nothing of the network. Any other order is kept.
    """
    containers: dict[Path, list[Path]] = {}
    for path in tensors:
        containers.setdefault(path[:-1], []).append(path)
    sorted_ones = {key for key, paths in containers.items() if _is_alphabetical(paths, tensors, dtype_of)}
    if not sorted_ones:
        return dict(tensors)
    order = (sorted(paths, key=_natural) if key in sorted_ones else paths for key, paths in containers.items())
    return {path: tensors[path] for paths in order for path in paths}


def _is_alphabetical(paths: list[Path], tensors: Mapping[Path, T], dtype_of: Callable[[T], str]) -> bool:
    """Whether the names of each dtype are sorted, as strings or (HDF5) group by group."""
    names: dict[str, list[str]] = {}
    for path in paths:
        names.setdefault(dtype_of(tensors[path]), []).append(path[-1])
    parts = ([name.split("/") for name in one] for one in names.values())
    return all(one == sorted(one) for one in names.values()) or all(one == sorted(one) for one in parts)


def _natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """A key that compares numbers in names as numbers, module by module."""
    return [[_piece(piece) for piece in re.findall(r"[0-9]+|[^0-9]+", part)] for part in re.split(r"[./]", path[-1])]


def _piece(piece: str) -> tuple[int, int, str]:
    if not piece[0].isdecimal() or not piece.isascii():
        return 1, 0, piece
    digits = piece.lstrip("0")
    return 0, len(digits), digits  # compared by length first: int() refuses very long ones


# What each framework calls the same tensor. A name may end in ":0", TensorFlow's output number.
ROLES: Mapping[str, Mapping[str, str]] = {
    "PyTorch": {
        "running_mean": "running_mean",
        "running_var": "running_var",
        "weight": "gamma",
        "bias": "beta",
        "num_batches_tracked": "batches",
    },
    "Keras": {"moving_mean": "running_mean", "moving_variance": "running_var", "gamma": "gamma", "beta": "beta"},
}
EPS: Mapping[str, float] = {"PyTorch": 1e-5, "ONNX": 1e-5, "Keras": 1e-3}
"""Each framework's default, which counts where a checkpoint does not say."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel, DistributedDataParallel and torch.compile put before every name."""


@dataclass(frozen=True)
class Place(Generic[T]):
    """A layer, and where its tensors are: by role, as gamma, beta, running_mean, running_var, batches.

    `producer` is the module whose weight stands right before it and makes as many units; `below` the name and the
    tensor of its bias.
    `aliases` are further names of the same tensors: of a module that is registered several times.
    """

    name: str
    copy: str
    tensors: Mapping[str, T]
    framework: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    below: tuple[str, T] | None = None
    aliases: tuple[str, ...] = ()
    producer: str = ""


def find(
    tensors: Mapping[Path, T],
    shape_of: Callable[[T], Sequence[int]],
    settings: Mapping[tuple[Path, str], Mapping[str, Any]] = {},
) -> list[Place[T]]:
    """Every layer among tensors by path, in the network's order.

    Args:
        tensors: by path.
        shape_of: returns a tensor's sizes.
        settings: of modules, by container and name, where the source has them.
    """
    groups: dict[tuple[Path, str], dict[str, T]] = {}
    for path, tensor in in_network_order(tensors, lambda tensor: str(getattr(tensor, "dtype", ""))).items():
        container, prefix, leaf = _split(path)
        groups.setdefault((container, prefix), {})[leaf] = tensor
    copies = list(dict.fromkeys(copy for (copy, _), leaves in groups.items() if _framework(leaves)))
    labels = {copy: ".".join(copy) or "(top)" if len(copies) > 1 else "" for copy in copies}
    found = []
    before: dict[Path, tuple[str, dict[str, T]]] = {}
    for (copy, prefix), leaves in groups.items():
        framework = _framework(leaves)
        if framework is None:
            before[copy] = prefix, leaves
            continue
        roles = {ROLES[framework][leaf]: tensor for leaf, tensor in leaves.items() if leaf in ROLES[framework]}
        units = _units(roles, shape_of)
        producer, below = _producer(*before.pop(copy, ("", {})), units, shape_of)
        own = settings.get((copy, prefix), {})
        found.append(Place(unwrapped(prefix), labels[copy], roles, framework, own, below, (), producer))
    return found


def merged(
    places: Sequence[Place[T]],
    memory_of: Callable[[T], Hashable],
    is_distinct: Callable[[Place[T]], bool] = lambda place: False,
) -> list[Place[T]]:
    """Layers all of whose tensors are the same memory are one, under its first name.

    Not: layers of two copies of a model, and those of which `is_distinct` is true.
    """
    first: dict[Hashable, Place[T]] = {}
    for place in places:
        tensors = frozenset((role, memory_of(tensor)) for role, tensor in place.tensors.items())
        same: Hashable = (place.copy, tensors, tuple(sorted(place.settings.items())))
        key = id(place) if is_distinct(place) else same
        if key not in first:
            first[key] = place
        elif place.name not in (first[key].name, *first[key].aliases):
            first[key] = replace(first[key], aliases=(*first[key].aliases, place.name))
    return list(first.values())


def unwrapped(name: str) -> str:
    """The name that the model's author knows."""
    return re.sub(rf"\A(?:{'|'.join(map(re.escape, WRAPPERS))})+", "", name)


def flattened(value: Any, is_tensor: Any, path: Path = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors in nested mappings and sequences, by path. One inside itself (`above`) is not entered again."""
    if is_tensor(value):
        yield path or ("",), value
    elif id(value) not in above:
        entries: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            entries = value.items()
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            entries = enumerate(value)
        for key, entry in entries:
            yield from flattened(entry, is_tensor, (*path, str(key)), (*above, id(value)))


def _split(path: Path) -> tuple[Path, str, str]:
    """Container, layer and leaf of ("model", "layer1.bn.running_mean"), "a/b/moving_mean:0" or ("bn", "weight")."""
    *container, name = path
    bare = name[:-2] if name.endswith(":0") else name
    last = max(bare.rfind("."), bare.rfind("/"))  # a module's name may hold "/", and a layer's of Keras "."
    if last >= 0:
        return tuple(container), bare[:last], bare[last + 1 :]
    return tuple(container[:-1]), "".join(container[-1:]), bare


def _framework(leaves: Iterable[str]) -> str | None:
    for framework, roles in ROLES.items():
        if any(roles.get(leaf) in ("running_mean", "running_var") for leaf in leaves):
            return framework
    return None


def _units(roles: Mapping[str, T], shape_of: Any) -> int | None:
    shape = shape_of(roles["running_var" if "running_var" in roles else "running_mean"])
    return int(shape[0]) if len(shape) == 1 else None


def _producer(
    prefix: str, leaves: Mapping[str, T], units: int | None, shape_of: Any
) -> tuple[str, tuple[str, T] | None]:
    """The module just before where its weight is a map onto as many units, and its bias, by name, if it has one."""
    weight, bias = leaves.get("weight"), leaves.get("bias")
    shape = () if weight is None else tuple(shape_of(weight))
    made = shape[:1] if bias is None else tuple(shape_of(bias))  # a transposed map's weight begins with its inputs
    if len(shape) < 2 or made != (units,):
        return "", None
    name = unwrapped(prefix)
    return name, None if bias is None else (f"{name}.bias".lstrip("."), bias)
