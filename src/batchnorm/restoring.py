"""What a model is, kept so that it can be put back: after a forward that was run to look at it, or after an error.

A forward may do more than compute: a first one materializes lazy layers or registers hooks and notes that it has,
others append to lists, count, fill caches, move buffers, draw random numbers. Taken back in part, a model can be broken
(hooks without the mark that they are there are registered twice), so all of it is taken back.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_DEPTH = 4
"""How many plain objects (a meter, a cache and its layers) are followed into each other."""
_LONGEST = 10_000
"""Elements of a longer container are not looked into: it holds data, not state."""
_MOST = 100_000
"""Containers and objects that are followed besides modules' own: a module may refer to a whole program."""
_OF_A_MODULE = 40
"""More than the containers and tensors that a module has by itself."""
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType)
_NOT_STATE = (type, ModuleType, *_FUNCTIONS, str, bytes, int, float, complex, bool, type(None))
_FOREIGN = frozenset(
    {"builtins", "torch", "numpy", "threading", "_thread", "logging", "functools", "weakref", "re", "typing", "abc"}
)
"""Packages whose objects keep their own state; containers, tensors and modules among them are known by type."""

Undo = Callable[[], object]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model and the random numbers are as before, whatever ran inside.

    Restored are, of every module: its class, attributes, containers (nested, of every kind), plain objects, tensors
    and NumPy arrays that are changed in place, buffers, hooks, and which parameters need gradients; of parameters only
    the values that a forward writes (`max_norm` of an embedding); and the generators of PyTorch, NumPy and Python.
    TorchScript keeps its state to itself.
    """
    state = Snapshot(model)
    numbers = _random_numbers(model)
    try:
        yield
    finally:
        state.restore()
        for undo in numbers:
            undo()


class Snapshot:
    """What was found of a model, and how each of it is put back.

    With `values`, those of buffers and other tensors are kept too; of parameters as `unchanged` says.
    """

    def __init__(self, model: nn.Module, values: bool = True) -> None:
        self._undo: list[Undo] = []
        self._kept: dict[int, Any] = {}  # by id, and alive, so that no id is used twice
        self._with_values = values
        self._most = _MOST + _OF_A_MODULE * sum(1 for _ in model.modules())
        self._remember(model)

    def restore(self) -> None:
        """The model is what it was: the same objects, and in them what they held."""
        for undo in self._undo:
            undo()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Keep the values of these tensors, to the bit."""
        for tensor in tensors:
            self._undo.append(partial(put, tensor, tensor.detach().clone()))

    def _remember(self, value: Any, depth: int = 0) -> None:
        """One value, with everything in it."""
        if isinstance(value, _NOT_STATE) or id(value) in self._kept or len(self._kept) >= self._most:
            return
        self._kept[id(value)] = value
        if isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, dict):
            self._dict(value, depth)
        elif isinstance(value, list | deque | set | bytearray):
            self._sequence(value, depth)
        elif isinstance(value, tuple | frozenset):
            self._within(value, depth)
        elif isinstance(value, np.ndarray):
            saved = value.copy()
            self._undo.append(partial(_put_array, value, saved))
        elif isinstance(value, torch.Generator):
            seed = value.get_state()
            self._undo.append(partial(value.set_state, seed))
        elif depth < _DEPTH and _plain_object(value):
            self._attributes(value, depth + 1)

    def _within(self, values: Any, depth: int) -> None:
        if len(values) <= _LONGEST:
            for value in values:
                self._remember(value, depth)

    def _module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            for buffer in module.buffers():
                self._remember(buffer)
            return
        self._undo.append(partial(become, module, type(module), vars(module)))
        self._attributes(module, 0)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            self._values(module.weight)

    def _attributes(self, owner: Any, depth: int) -> None:
        self._dict(vars(owner), depth)

    def _dict(self, value: dict[Any, Any], depth: int) -> None:
        saved = list(value.items())
        self._undo.append(partial(_put_dict, value, saved))
        self._within([each for _, each in saved], depth)

    def _sequence(self, value: Any, depth: int) -> None:
        saved = value.copy()
        self._undo.append(partial(_put_sequence, value, saved))
        if not isinstance(value, bytearray):
            self._within(list(saved), depth)

    def _tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor):
            self._undo.append(partial(_unmaterialize, tensor, type(tensor)))
        elif isinstance(tensor, nn.Parameter):
            needed, gradient = tensor.requires_grad, tensor.grad
            hooks = _hooks(tensor)
            self._undo.append(partial(_put_parameter, tensor, needed, gradient, hooks))
        else:
            self._values(tensor)

    def _values(self, tensor: Tensor) -> None:
        if self._with_values and tensor.layout == torch.strided and not tensor.is_meta and tensor.device.type != "meta":
            saved = tensor.detach().clone()
            self._undo.append(partial(_put_values, tensor, saved))


def _plain_object(value: Any) -> bool:
    """An instance of a class of the user's or of another library, with attributes that can be put back."""
    root = type(value).__module__.partition(".")[0]
    return root not in _FOREIGN and isinstance(getattr(value, "__dict__", None), dict)


def become(module: nn.Module, cls: type, attributes: dict[str, Any] | None = None) -> None:
    """Change the module's class, and its attributes if given, whatever its own __setattr__ says."""
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)
    if attributes is not None and vars(module) is not attributes:
        object.__setattr__(module, "__dict__", attributes)


def put(tensor: Tensor, values: Tensor | int) -> None:
    """Write in place, whatever mode the tensor was made in."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values) if isinstance(values, Tensor) else tensor.fill_(values)


def _put_dict(value: dict[Any, Any], saved: list[tuple[Any, Any]]) -> None:
    if len(value) == len(saved) and all(a is c and b is d for (a, b), (c, d) in zip(value.items(), saved, strict=True)):
        return
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # not what a subclass makes of an assignment
    kind.clear(value)
    for key, each in saved:
        kind.__setitem__(value, key, each)


def _put_sequence(value: Any, saved: Any) -> None:
    if isinstance(value, list):
        if len(value) != len(saved) or any(a is not b for a, b in zip(value, saved, strict=True)):
            list.__setitem__(value, slice(None), saved)
    elif isinstance(value, bytearray):
        value[:] = saved
    elif isinstance(value, deque):
        deque.clear(value)
        deque.extend(value, saved)
    else:
        set.clear(value)
        set.update(value, saved)


def _put_array(array: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> None:
    if array.flags.writeable and array.shape == saved.shape:
        array[...] = saved


def _put_values(tensor: Tensor, saved: Tensor) -> None:
    """Compared first: a batch norm moves its statistics without a change of their version, and most move nothing."""
    if tensor.shape == saved.shape and not torch.equal(tensor, saved):
        put(tensor, saved)


def _hooks(tensor: Tensor) -> tuple[Any, Any]:
    return tuple(  # type: ignore[return-value]
        None if found is None else OrderedDict(found)
        for found in (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    )


def _put_parameter(parameter: Tensor, needed: bool, gradient: Tensor | None, hooks: tuple[Any, Any]) -> None:
    if parameter.requires_grad is not needed:
        parameter.requires_grad = needed
    if parameter.grad is not gradient:
        parameter.grad = gradient
    for name, saved in zip(("_backward_hooks", "_post_accumulate_grad_hooks"), hooks, strict=True):
        found = getattr(parameter, name, None)
        if found is None or (saved is not None and list(found.items()) == list(saved.items())):
            continue
        found.clear()
        found.update(saved or {})


def _unmaterialize(tensor: Tensor, cls: type) -> None:
    """Back to a tensor without a shape, as a lazy layer has it before its first forward."""
    if type(tensor) is not cls:
        with torch.no_grad():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.__class__ = cls


def _random_numbers(model: nn.Module) -> list[Undo]:
    """What puts the generators back that a forward may draw from: PyTorch's on each device, NumPy's and Python's."""
    undo: list[Undo] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002 - a forward may draw from it
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    return undo + [partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device) for device in devices]


_INSIDE = ("_orig_mod", "module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the parallel wrappers: its layers have the names that their user knows.

    It runs on one device and without other processes, so that a forward can be left halfway.
    """
    wrappers: list[type] = [nn.DataParallel, nn.parallel.DistributedDataParallel]
    compiled = compiled_class()
    if compiled is not None:
        wrappers.append(compiled)
    while isinstance(model, tuple(wrappers)):
        model = next(model._modules[name] for name in _INSIDE if name in model._modules)  # type: ignore[assignment]
    return model


def compiled_class() -> type | None:
    """The class of what torch.compile returns; None where nothing can have been compiled.

    To import the compiler takes a second, and while another thread does it, its module is there without the class.
    """
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
