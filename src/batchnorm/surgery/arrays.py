"""The batch norms among named arrays, flat or nested, of any framework: each one's parts by PyTorch's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What a batch norm's state is made of; num_batches_tracked is not carried over.
PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it was given, and its value."""

    given: str
    value: Any


def flat_names(what: str, given: object, collections: tuple[str, ...] = ()) -> dict[str, Key]:
    """Every array by its dotted name, without Keras's ":0" and without Flax's collections."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} takes a mapping of arrays by name, got {type(given).__name__}")
    flat: dict[str, Key] = {}
    linen = collections and any(key.startswith(collections[-1]) for key, _ in _leaves(given, ""))
    for key, value in _leaves(given, ""):
        short = re.sub(r":\d+$", "", key).replace("/", ".")
        for collection in collections if linen else ():
            short = short.removeprefix(collection) if key.startswith(collection) else short
        if short in flat:
            raise ValueError(f"{what}: {key} and {flat[short].given} are one name, {short}: convert them separately")
        flat[short] = Key(key, value)
    return flat


def _leaves(given: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for step, value in given.items():
        key = prefix + (".".join(map(str, step)) if isinstance(step, tuple) else str(step))
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def layers_of(flat: dict[str, Key], names: Mapping[str, str]) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """The parts of each batch norm under PyTorch's names, and the keys of nothing of the kind."""
    parts: dict[str, dict[str, Key]] = {}
    for key, held in flat.items():
        name, _, part = key.rpartition(".")
        if part in names:
            parts.setdefault(name, {})[names[part]] = held
    layers: dict[str, dict[str, Tensor]] = {}
    taken: set[str] = set()
    for name, found in parts.items():
        if {"running_mean", "running_var"} <= found.keys():
            taken |= {held.given for held in found.values()}
            layers[name] = {part: _tensor(found[part]) for part in PARTS if part in found}
            shapes = {tuple(tensor.shape) for tensor in layers[name].values()}
            if len(shapes) > 1 or len(next(iter(shapes))) != 1:
                raise ValueError(
                    f"{name or 'the layer'} has arrays of shapes {sorted(shapes)}: one number a channel each"
                )
    return layers, tuple(held.given for held in flat.values() if held.given not in taken)


def _tensor(held: Key) -> Tensor:
    """A copy on the CPU, of the array's type."""
    if isinstance(held.value, Tensor):
        tensor = held.value.detach().to("cpu", copy=True)
    else:
        array = np.array(held.value)
        if array.dtype.name == "bfloat16":
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        elif array.dtype.kind == "f" and array.dtype.itemsize <= 8:
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        else:
            raise TypeError(
                f"{held.given} must be an array of floats, got {type(held.value).__name__} of {array.dtype}"
            )
    if not tensor.is_floating_point():
        raise TypeError(f"{held.given} must be an array of floats, got {tensor.dtype}")
    return tensor
