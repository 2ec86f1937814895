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
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

_DEPTH = 4
"""How many plain objects (a meter, a cache and its layers) are followed into each other."""
_LONGEST = 10_000
"""Elements of a longer container are not looked into: it holds data, not state."""
_MOST = 100_000
"""Containers and objects that are followed besides some 40 of each module: it may refer to a whole program."""
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType)
_NOT_STATE = (type, ModuleType, *_FUNCTIONS, str, bytes, int, float, complex, bool, type(None))
_FOREIGN = frozenset(
    {"builtins", "torch", "numpy", "threading", "_thread", "logging", "functools", "weakref", "re", "typing", "abc"}
)
"""Packages whose objects keep their own state; containers, tensors and modules among them are known by type."""

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

Undo = Callable[[], object]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model and the random numbers are as before, whatever ran inside.

    Restored are, of every module: its class, attributes, containers (nested, of every kind), plain objects, tensors
    and NumPy arrays that are changed in place, buffers, hooks, and which parameters need gradients; of parameters only
    the values that a forward writes (`max_norm` of an embedding); and the generators of PyTorch, NumPy and Python.
    TorchScript keeps its state to itself.
    """
    state = _Snapshot(model)
    with same_random_numbers(model):
        try:
            yield
        finally:
            _take_back(state.undo)


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Afterwards the generators go on as if nothing had been drawn: PyTorch's on each device, NumPy's and Python's."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a forward may draw from it
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


@contextmanager
def all_or_nothing(model: nn.Module, writes: Iterable[Tensor] = ()) -> Iterator[Callable[[], None]]:
    """Where anything is raised inside, the model is what it was: every change for good is made in here.

    Put back are the module tree, classes, attributes, hooks, modes, which parameters need gradients and the gradients
    themselves; the values of those tensors that are in `writes`. No other tensor is copied. What is yielded puts all of
    it back.
    """
    undo: list[Undo] = [partial(put, tensor, tensor.detach().clone()) for tensor in writes]
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            own = vars(module)
            undo.append(partial(become, module, type(module), own))
            tables = (own, *(value for value in own.values() if isinstance(value, dict)))
            undo += [partial(_put_dict, table, list(table.items())) for table in tables]
            undo += [_of_parameter(each) for each in module._parameters.values() if each is not None]
    restore = partial(_take_back, undo)
    try:
        yield restore
    except BaseException:
        restore()
        raise


def _take_back(undo: Iterable[Undo]) -> None:
    for each in undo:
        each()


class _Snapshot:
    """How everything that is found of a model is put back: the same objects, and in them what they held."""

    def __init__(self, model: nn.Module) -> None:
        self.undo: list[Undo] = []
        self._kept: dict[int, Any] = {}  # by id, and alive, so that no id is used twice
        self._most = _MOST + 40 * sum(1 for _ in model.modules())
        self._remember(model)

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
            saved = list(value.items())
            self.undo.append(partial(_put_dict, value, saved))
            self._within([each for _, each in saved], depth)
        elif isinstance(value, tuple | frozenset):
            self._within(value, depth)
        elif isinstance(value, list | deque | set):
            copied = value.copy()
            self.undo.append(partial(_refill, value, copied))
            self._within(list(copied), depth)
        elif isinstance(value, bytearray):
            self.undo.append(partial(value.__setitem__, slice(None), value.copy()))
        elif isinstance(value, np.ndarray):
            self.undo.append(partial(_put_array, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self.undo.append(partial(value.set_state, value.get_state()))
        elif depth < _DEPTH and _package(value) not in _FOREIGN and isinstance(getattr(value, "__dict__", None), dict):
            self._remember(vars(value), depth + 1)

    def _within(self, values: Any, depth: int) -> None:
        if len(values) <= _LONGEST:
            for value in values:
                self._remember(value, depth)

    def _module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            for buffer in module.buffers():
                self._remember(buffer)
            return
        self.undo.append(partial(become, module, type(module), vars(module)))
        self._remember(vars(module))
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            self._values(module.weight)

    def _tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor):
            self.undo.append(partial(_unmaterialize, tensor, type(tensor)))
        elif isinstance(tensor, nn.Parameter):
            self.undo.append(_of_parameter(tensor))
        else:
            self._values(tensor)

    def _values(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.device.type != "meta":
            self.undo.append(partial(_put_values, tensor, tensor.detach().clone()))


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


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


def _refill(value: Any, saved: Any) -> None:
    """By the methods of the kind itself, not by what a subclass makes of them."""
    kind: Any = next(kind for kind in (list, deque, set) if isinstance(value, kind))
    kind.clear(value)
    (kind.update if kind is set else kind.extend)(value, saved)


def _put_array(array: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> None:
    if array.flags.writeable and array.shape == saved.shape:
        array[...] = saved


def _put_values(tensor: Tensor, saved: Tensor) -> None:
    """Compared first: a batch norm moves its statistics without a change of their version, and most move nothing."""
    if tensor.shape == saved.shape and not torch.equal(tensor, saved):
        put(tensor, saved)


def _of_parameter(parameter: Tensor) -> Undo:
    hooks = {name: OrderedDict(getattr(parameter, name, None) or {}) for name in _TENSOR_HOOKS}
    return partial(_put_parameter, parameter, parameter.requires_grad, parameter.grad, hooks)


def _put_parameter(parameter: Tensor, needed: bool, gradient: Tensor | None, hooks: dict[str, Any]) -> None:
    if parameter.requires_grad is not needed:
        parameter.requires_grad = needed
    if parameter.grad is not gradient:
        parameter.grad = gradient
    for name, saved in hooks.items():
        found = getattr(parameter, name, None)
        if found is not None and list(found.items()) != list(saved.items()):
            found.clear()
            found.update(saved)


def _unmaterialize(tensor: Tensor, cls: type) -> None:
    """Back to a tensor without a shape, as a lazy layer has it before its first forward."""
    if type(tensor) is not cls:
        with torch.no_grad():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.__class__ = cls


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients and full float32 precision inside; afterwards the model and the random numbers are as before."""
    with torch.inference_mode(False), torch.no_grad(), _full_precision(), unchanged(model):
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 is multiplied as float32: in TF32 or bfloat16 two right answers differ in the fourth digit."""
    backends: Any = torch.backends
    operators = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    with ExitStack() as stack:
        for operator in operators:
            if operator.fp32_precision in ("tf32", "bf16"):
                stack.callback(setattr, operator, "fp32_precision", operator.fp32_precision)
                operator.fp32_precision = "ieee"
        yield


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and in its own mode afterwards.

    The modes are set one by one: a model's own train() may do more (merge weights, wake a layer).
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", vars(module).get("training", module.training))
            module.training = False
        yield


def by_batch(layer: _BatchNorm) -> None:
    """The layer normalizes by each batch's own statistics, without other processes, and moves nothing."""
    layer.training, layer.track_running_stats = True, False
    vars(layer)["_merge"] = _nobody


def _nobody() -> None:
    """In the place of SyncBatchNorm's `_merge`: a forward that is left halfway must keep no other process waiting."""


def stand_in(layer: _BatchNorm, **tensors: Tensor) -> None:
    """The layer is in eval mode and has these parameters and buffers for now."""
    layer.training = False
    for kind in ("_parameters", "_buffers"):
        own = vars(layer)[kind]
        vars(layer)[kind] = own | {name: tensor for name, tensor in tensors.items() if name in own}


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """All in eval mode, no gradients, nothing compiled; afterwards the model is as before.

    Inside, layers may be set up otherwise: `by_batch`, `stand_in`.
    """
    with undisturbed(model), in_eval(model), eager():
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Nothing runs compiled: compiled code does not see hooks that come later."""
    with nullcontext() if compiled_class() is None else torch.compiler.set_stance("force_eager"):
        yield


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
