"""Find batch norm layers by the names of tensors, for every framework's names.

A layer is a module with a running mean or a running variance; its other tensors are gamma, beta and the count of
batches. The path of a tensor is the keys of its containers, then its name in the framework. Each container with layers
is one copy of the model: its moving average, for example.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from batchnorm.frameworks import FRAMEWORKS

T = TypeVar("T")
Path = tuple[str, ...]


class Tensor(Protocol):
    """A tensor in memory or in a file. `key` is equal for tensors that share their memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def key(self) -> Hashable: ...

    def values(self) -> np.ndarray: ...


def in_network_order(tensors: Mapping[Path, T], dtype_of: Callable[[T], str]) -> dict[Path, T]:
    """Tensors in the file's order; if that is alphabetical, in the order of the numbers in their names.

    safetensors and HDF5 sort names ("conv10" before "conv2"), safetensors separately per dtype. Such an order says
    nothing about the network.
    """
    containers: dict[Path, list[Path]] = {}
    for path in tensors:
        containers.setdefault(path[:-1], []).append(path)
    is_sorted = {key: _is_alphabetical(paths, tensors, dtype_of) for key, paths in containers.items()}
    if not any(is_sorted.values()):
        return dict(tensors)
    order = (sorted(paths, key=_natural) if is_sorted[key] else paths for key, paths in containers.items())
    return {path: tensors[path] for paths in order for path in paths}


def _is_alphabetical(paths: list[Path], tensors: Mapping[Path, T], dtype_of: Callable[[T], str]) -> bool:
    """Whether the names of each dtype are sorted, as strings or (HDF5) group by group."""
    names: dict[str, list[str]] = {}
    for path in paths:
        names.setdefault(dtype_of(tensors[path]), []).append(path[-1])
    parts = ([name.split("/") for name in group] for group in names.values())
    return all(group == sorted(group) for group in names.values()) or all(group == sorted(group) for group in parts)


def _natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """Sort key that compares numbers in names as numbers, module by module."""

    def piece_key(piece: str) -> tuple[int, int, str]:
        if not piece[0].isdecimal() or not piece.isascii():
            return 1, 0, piece
        digits = piece.lstrip("0")
        return 0, len(digits), digits  # compare by length first: int() refuses very long numbers

    return [[piece_key(piece) for piece in re.findall(r"[0-9]+|[^0-9]+", part)] for part in re.split(r"[./]", path[-1])]


# A name may end in ":0", TensorFlow's output number. Flax has its statistics apart from its parameters: see from_flax.
ROLES: Mapping[str, Mapping[str, str]] = {name: FRAMEWORKS[name].roles for name in ("PyTorch", "Keras")}
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel, DistributedDataParallel and torch.compile add to every name."""


@dataclass(frozen=True)
class Place:
    """A layer and its tensors by role: gamma, beta, running_mean, running_var, batches.

    `producer` is the module whose weight comes right before it and has as many output channels, `below` the name and
    the tensor of its bias. `aliases` are further names of a module that is registered several times.
    """

    name: str
    copy: str
    tensors: Mapping[str, Tensor]
    framework: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    below: tuple[str, Tensor] | None = None
    aliases: tuple[str, ...] = ()
    producer: str = ""


def find(tensors: Mapping[Path, Tensor], settings: Mapping[tuple[Path, str], Mapping[str, Any]] = {}) -> list[Place]:
    """Find every layer, in the network's order; `settings` are those of modules, by container and name."""
    groups: dict[tuple[Path, str], dict[str, Tensor]] = {}
    for path, tensor in in_network_order(tensors, lambda tensor: tensor.dtype).items():
        container, prefix, leaf = _split(path)
        groups.setdefault((container, prefix), {})[leaf] = tensor
    copies = list(dict.fromkeys(copy for (copy, _), leaves in groups.items() if _framework(leaves)))
    labels = {copy: ".".join(copy) or "(top)" if len(copies) > 1 else "" for copy in copies}
    places = []
    before: dict[Path, tuple[str, dict[str, Tensor]]] = {}
    for (copy, prefix), leaves in groups.items():
        framework = _framework(leaves)
        if framework is None:
            before[copy] = prefix, leaves
            continue
        roles = {ROLES[framework][leaf]: tensor for leaf, tensor in leaves.items() if leaf in ROLES[framework]}
        producer, below = _producer(*before.pop(copy, ("", {})), roles)
        module = settings.get((copy, prefix), {})
        places.append(Place(unwrapped(prefix), labels[copy], roles, framework, module, below, (), producer))
    return places


def merged(places: Sequence[Place], is_distinct: Callable[[Place], bool] = lambda place: False) -> list[Place]:
    """Merge layers that share the memory of all tensors, under the first name.

    Layers of two copies of a model are not merged, nor those that are `is_distinct`.
    """
    first: dict[Hashable, Place] = {}
    for place in places:
        tensors = frozenset((role, tensor.key) for role, tensor in place.tensors.items())
        same: Hashable = (place.copy, tensors, tuple(sorted(place.settings.items())))
        key = id(place) if is_distinct(place) else same
        if key not in first:
            first[key] = place
        elif place.name not in (first[key].name, *first[key].aliases):
            first[key] = replace(first[key], aliases=(*first[key].aliases, place.name))
    return list(first.values())


def unwrapped(name: str) -> str:
    """A name without the prefixes of wrappers."""
    return re.sub(rf"\A(?:{'|'.join(map(re.escape, WRAPPERS))})+", "", name)


def flattened(value: Any, is_tensor: Any, path: Path = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors in nested mappings and sequences, by path. `above` has the ids of containers, to stop cycles."""
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


def _producer(
    prefix: str, leaves: Mapping[str, Tensor], norm: Mapping[str, Tensor]
) -> tuple[str, tuple[str, Tensor] | None]:
    """The module right before a norm if its weight has as many output channels, and its bias by name, if any."""
    weight, bias = leaves.get("weight"), leaves.get("bias")
    shape = () if weight is None else weight.shape
    outputs = shape[:1] if bias is None else bias.shape  # the weight of a transposed convolution has inputs first
    channels = norm["running_var" if "running_var" in norm else "running_mean"].shape
    if len(shape) < 2 or len(channels) != 1 or outputs != channels:
        return "", None
    name = unwrapped(prefix)
    return name, None if bias is None else (f"{name}.bias".lstrip("."), bias)
