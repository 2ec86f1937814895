"""What a model is called with, as users hand it over: a tensor, a tuple of arguments, or a dict of named ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from batchnorm.surgery._shared.undisturbed import same_random_numbers

_FORMS = "a tensor, a tuple of the model's arguments or a mapping of named ones"


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """model(*args, **kwargs)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, what: str, example: object) -> Example:
        """As the user of the function `what` gave it. Raises TypeError where it is none of the three."""
        if isinstance(example, Tensor):
            return cls((example,), {})
        if isinstance(example, Mapping):
            return cls((), dict(example))
        if isinstance(example, tuple):
            return cls(example, {})
        if example is None:
            raise TypeError(f"{what} needs an example of the model's input, to run it on: {_FORMS}")
        raise TypeError(
            f"{what}: the example must be {_FORMS}, got "
            f"{type(example).__name__}" + (": for a model that takes a list, give (list,)" if example else "")
        )

    def run(self, what: str, model: nn.Module) -> Any:
        """What the model returns on a copy of the example, with the same random numbers each time.

        Raises ValueError, for the function `what`, where the model does not take it.
        """
        args, kwargs = tree_map_only(Tensor, torch.clone, (self.args, self.kwargs))
        with same_random_numbers(model):
            try:
                return model(*args, **kwargs)
            except Exception as error:
                raise ValueError(f"{what}: the model does not run on the example: {error}") from error


def leaves(value: Any, kind: type[Any] = Tensor) -> Iterator[Any]:
    """All tensors (or what else is asked for) in what a model returns: nested sequences, mappings and dataclasses."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from leaves(part, kind)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from leaves(part, kind)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), kind)
