"""Subclasses made of a module's own class: a module takes one on by a change of its class, and nothing else of it.

Its parameters, buffers, hooks and attributes are not touched. `convert` makes stand-ins: the same methods, some of them
rewritten so that batch norms fuse, in a class of the same name; copies and pickles of a module carry the rewritten
source, and go back to the module's own class where that has changed since. `freeze` makes classes that do not train.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from batchnorm.restoring import become
from batchnorm.surgery._fusing import runtime
from batchnorm.surgery._fusing.source import build, digest
from batchnorm.surgery._shared.layers import ORIGINAL

# By method: the rewritten source, the method that it was made from, and that method's digest.
Recipe = tuple[tuple[str, str, str, str], ...]


def refused(cls: type) -> str | None:
    """Why no subclass can be made of a module's class without side effects; None where one can."""
    if type(cls) is not type:
        return f"{cls.__name__} has a metaclass of its own"
    for base in cls.__mro__:
        if "__init_subclass__" in vars(base) and base is not object:
            return f"{base.__name__} defines __init_subclass__"
    return None


def method_of(cls: type, name: str) -> tuple[FunctionType, type] | None:
    """A plain method that is looked up on the class, and the class that defines it."""
    base = next((base for base in cls.__mro__ if name in vars(base)), None)
    found = None if base is None else vars(base)[name]
    return (found, base) if isinstance(found, FunctionType) and base is not None else None


def subclass(cls: type, bases: tuple[type, ...], members: dict[str, Any], make: Callable[..., type], *key: Any) -> type:
    """A subclass with these members; copies and pickles of its instances are of the class that make(cls, *key) gives.

    `bases` come before `cls`, which gives the name where `members` has no __qualname__.
    """

    def reduce_ex(self: Any, protocol: Any) -> Any:
        reduce: Any = cls.__reduce_ex__
        create, arguments, *rest = reduce(self, protocol)
        arguments = tuple(cls if argument is new else argument for argument in arguments)
        return (rebuilt, (cls, make, key, create, arguments), *rest)

    own = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace = {"__slots__": (), **own, "__reduce_ex__": reduce_ex, **members}
    new: type = type(cls)(namespace["__qualname__"].rpartition(".")[2], (*bases, cls), namespace)
    return new


def rebuilt(cls: type, make: Callable[..., type], key: tuple[Any, ...], create: Any, arguments: tuple[Any, ...]) -> Any:
    """A copied or unpickled module, still without its state, with the subclass of its class."""
    module = create(*arguments)
    if type(module) is cls and isinstance(module, nn.Module):
        become(module, make(cls, *key))
    return module


@cache
def stand_in(cls: type[Any], recipe: Recipe) -> type:
    """The subclass of `cls` with the recipe's methods; `cls` itself where its methods are not what they were."""
    members: dict[str, Any] = {ORIGINAL: cls}
    for name, text, source, expected in recipe:
        found = method_of(cls, source)
        if found is None or digest(found[0]) != expected:
            return cls
        members[name] = build(text, found[0], found[1].__name__)
    return subclass(cls, (), members, stand_in, recipe)


@cache
def sequential(cls: type) -> type:
    """The stand-in of torch.nn.Sequential, or of a subclass that keeps its forward; another class itself."""
    if inspect.getattr_static(cls, "forward", None) is not nn.Sequential.forward:
        return cls

    def forward(self: Any, input: Any) -> Any:
        return runtime.settle(runtime.through(self, input))

    def tail(self: Any, input: Any) -> Any:
        return runtime.tail(runtime.through(self, input))

    forward.__qualname__ = "Sequential.forward"
    return subclass(cls, (), {ORIGINAL: cls, "forward": forward, runtime.TAIL: tail}, sequential)
