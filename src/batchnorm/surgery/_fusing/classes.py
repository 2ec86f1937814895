"""Classes that stand in for a module's own: the same methods, some of them rewritten so that batch norms fuse.

A module is converted by changing its class, so its parameters, buffers, hooks and attributes are not touched. The class
is a subclass of the module's own, of the same name; copies and pickles of a module carry the rewritten source, and go
back to the module's own class where that has changed since.
"""

from __future__ import annotations

import inspect
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

# The class attribute under which a stand-in keeps its recipe.
_RECIPE = "_batchnorm_recipe"


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
    for base in cls.__mro__:
        if name in vars(base):
            found = vars(base)[name]
            return (found, base) if isinstance(found, FunctionType) else None
    return None


@cache
def stand_in(cls: type[Any], recipe: Recipe) -> type:
    """The subclass of `cls` with the recipe's methods; `cls` itself where its methods are not what they were."""
    members: dict[str, Any] = {}
    for name, text, source, expected in recipe:
        found = method_of(cls, source)
        if found is None or digest(found[0]) != expected:
            return cls
        members[name] = build(text, found[0], found[1].__name__)
    return _subclass(cls, members, recipe)


@cache
def sequential(cls: type) -> type:
    """The stand-in of torch.nn.Sequential, or of a subclass that keeps its forward."""

    def forward(self: Any, input: Any) -> Any:
        return runtime.settle(runtime.through(self, input))

    def tail(self: Any, input: Any) -> Any:
        return runtime.tail(runtime.through(self, input))

    forward.__qualname__ = "Sequential.forward"
    return _subclass(cls, {"forward": forward, runtime.TAIL: tail}, None)


def _subclass(cls: type, members: dict[str, Any], recipe: Recipe | None) -> type:
    def reduce_ex(self: Any, protocol: Any) -> Any:
        reduce: Any = cls.__reduce_ex__
        make, arguments, *rest = reduce(self, protocol)
        arguments = tuple(cls if argument is new else argument for argument in arguments)
        return (rebuilt, (cls, recipe, make, arguments), *rest)

    namespace = {
        "__slots__": (),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce_ex,
        ORIGINAL: cls,
        _RECIPE: recipe,
        **members,
    }
    new: type = type(cls)(cls.__name__, (cls,), namespace)
    return new


def rebuilt(cls: type, recipe: Recipe | None, make: Any, arguments: tuple[Any, ...]) -> Any:
    """A copied or unpickled module, still without its state, with the stand-in of its class."""
    if recipe is not None:
        new = stand_in(cls, recipe)
    else:
        fits = inspect.getattr_static(cls, "forward", None) is nn.Sequential.forward
        new = sequential(cls) if fits else cls
    module = make(*arguments)
    if type(module) is cls and isinstance(module, nn.Module):
        become(module, new)
    return module
