"""Subclasses of a module's class, which a module gets by a change of its class only.

Its parameters, buffers, hooks and attributes do not change. `convert` makes classes of the same name with rewritten
methods, in which batch norms fuse. Copies and pickles carry the rewritten source, and get the original class if its
methods have changed since. `freeze` makes classes with frozen statistics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from batchnorm.restoring import set_class
from batchnorm.surgery._fusing import runtime
from batchnorm.surgery._fusing.source import build, digest
from batchnorm.surgery._shared.layers import ORIGINAL

# By method: its name, the rewritten source, the name of the original method, and the digest of that method.
Recipe = tuple[tuple[str, str, str, str], ...]


def why_no_subclass(cls: type) -> str | None:
    """Why a module's class cannot be subclassed without side effects; None if it can."""
    if type(cls) is not type:
        return f"{cls.__name__} has a metaclass"
    for base in cls.__mro__:
        if "__init_subclass__" in vars(base) and base is not object:
            return f"{base.__name__} defines __init_subclass__"
    return None


def method_of(cls: type, name: str) -> tuple[FunctionType, type] | None:
    """A plain method of the class, and the class that defines it."""
    base = next((base for base in cls.__mro__ if name in vars(base)), None)
    method = None if base is None else vars(base)[name]
    return (method, base) if isinstance(method, FunctionType) and base is not None else None


def subclass(cls: type, bases: tuple[type, ...], members: dict[str, Any], make: Callable[..., type], *key: Any) -> type:
    """A subclass with these members; copies and pickles of its instances have the class make(cls, *key).

    `bases` come before `cls`, which sets the name unless `members` has a __qualname__.
    """

    def reduce_ex(self: Any, protocol: Any) -> Any:
        reduce: Any = cls.__reduce_ex__
        create, arguments, *rest = reduce(self, protocol)
        arguments = tuple(cls if argument is new else argument for argument in arguments)
        return (rebuilt, (cls, make, key, create, arguments), *rest)

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace = {"__slots__": (), **names, "__reduce_ex__": reduce_ex, **members}
    new: type = type(cls)(namespace["__qualname__"].rpartition(".")[2], (*bases, cls), namespace)
    return new


def rebuilt(cls: type, make: Callable[..., type], key: tuple[Any, ...], create: Any, arguments: tuple[Any, ...]) -> Any:
    """Create a copied or unpickled module, without its state, with its subclass."""
    module = create(*arguments)
    if type(module) is cls and isinstance(module, nn.Module):
        set_class(module, make(cls, *key))
    return module


@cache
def stand_in(cls: type[Any], recipe: Recipe) -> type:
    """The subclass of `cls` with the recipe's methods; `cls` itself if its methods have changed."""
    members: dict[str, Any] = {ORIGINAL: cls}
    for name, text, source, expected in recipe:
        method = method_of(cls, source)
        if method is None or digest(method[0]) != expected:
            return cls
        members[name] = build(text, method[0], method[1].__name__)
    return subclass(cls, (), members, stand_in, recipe)


@cache
def sequential(cls: type) -> type:
    """The fusing subclass of torch.nn.Sequential or a subclass with the same forward; other classes unchanged."""
    if inspect.getattr_static(cls, "forward", None) is not nn.Sequential.forward:
        return cls

    def forward(self: Any, input: Any) -> Any:
        return runtime.settle(runtime.through(self, input))

    def tail(self: Any, input: Any) -> Any:
        return runtime.tail(runtime.through(self, input))

    forward.__qualname__ = "Sequential.forward"
    return subclass(cls, (), {ORIGINAL: cls, "forward": forward, runtime.TAIL: tail}, sequential)
