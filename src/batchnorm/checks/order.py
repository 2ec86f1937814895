"""The order of layers in the network, as far as names show it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

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
    by_string = all(one == sorted(one) for one in names.values())
    return by_string or all(one == sorted(one, key=lambda name: name.split("/")) for one in names.values())


def _natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """A key that compares numbers in names as numbers, module by module."""
    return [[_piece(piece) for piece in re.findall(r"[0-9]+|[^0-9]+", part)] for part in re.split(r"[./]", path[-1])]


def _piece(piece: str) -> tuple[int, int, str]:
    if not piece[0].isdecimal() or not piece.isascii():
        return 1, 0, piece
    digits = piece.lstrip("0")
    return 0, len(digits), digits  # compared by length first: int() refuses very long ones
