"""Tensors in nested containers, by path. Containers may be shared, or lie inside themselves; names may be anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchnorm.checks.readers._parsing.described import Items, Tensor
from batchnorm.checks.readers._parsing.files import well_formed
from batchnorm.checks.readers._parsing.stored import MAX_TENSORS, CheckpointError, Stored

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
