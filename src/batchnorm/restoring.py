"""Save a model's state and restore it: after a forward that only measures, or after an error.

A forward may have side effects: it materializes lazy layers, registers hooks, sets flags, appends to lists, fills
caches, updates buffers, draws random numbers. A partly restored model can be broken (without its flag, a hook is
registered twice), so all of the state is restored.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

_DEPTH = 4
"""How many levels of plain objects (a meter, a cache) are followed."""
_LONGEST = 10_000
"""A longer container is data, not state: its elements are not followed."""
_MOST = 100_000
"""The limit of followed objects, besides 40 per module: a model may refer to a whole program."""
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType)
_NOT_STATE = (type, ModuleType, *_FUNCTIONS, str, bytes, int, float, complex, bool, type(None))
_FOREIGN = frozenset(
    {"builtins", "torch", "numpy", "threading", "_thread", "logging", "functools", "weakref", "re", "typing", "abc"}
)
"""Packages whose objects are not followed, except containers, tensors and modules."""

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

Undo = Callable[[], object]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model and the random number generators afterwards.

    Restores, for every module: its class, attributes, containers (nested, of every kind), plain objects, tensors and
    NumPy arrays changed in place, buffers, hooks and requires_grad; for parameters only values that a forward writes
    (`max_norm` of an embedding); and the generators of PyTorch, NumPy and Python. The state of TorchScript modules,
    except buffers, is not accessible.
    """
    state = _Snapshot(model)
    with preserve_random_state(model):
        try:
            yield
        finally:
            _run_all(state.undo)


@contextmanager
def preserve_random_state(model: nn.Module) -> Iterator[None]:
    """Restore the random number generators afterwards: PyTorch's on each device, NumPy's and Python's."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - a forward may draw from it
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def all_or_nothing(model: nn.Module, writes: Iterable[Tensor] = ()) -> Iterator[Callable[[], None]]:
    """Restore the model if an error is raised inside; tools make all their changes in here.

    Restores the module tree, classes, attributes, hooks, modes, requires_grad and gradients, and the values of the
    tensors in `writes`; no other tensor is copied. Yields a function that restores all of it.
    """
    undo: list[Undo] = [partial(write, tensor, tensor.detach().clone()) for tensor in writes]
    empty: list[dict[Any, Any]] = []  # most tables of hooks: remembered without an action for each
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            attributes = vars(module)
            undo.append(partial(set_class, module, type(module), attributes))
            undo.append(_undo_of_dict(attributes))
            for value in attributes.values():
                if isinstance(value, dict):
                    undo.append(_undo_of_dict(value)) if value else empty.append(value)
            undo += [_undo_of_parameter(p) for p in module._parameters.values() if p is not None]
    undo.append(partial(_empty_again, empty))
    restore = partial(_run_all, undo)
    try:
        yield restore
    except BaseException:
        restore()
        raise


def _empty_again(tables: Iterable[dict[Any, Any]]) -> None:
    for table in tables:
        _restore_dict(table, (), ())


def _run_all(undo: Iterable[Undo]) -> None:
    for action in undo:
        action()


class _Snapshot:
    """The actions that restore a model: the same objects, with their contents."""

    def __init__(self, model: nn.Module) -> None:
        self.undo: list[Undo] = []
        self._visited: dict[int, Any] = {}  # by id; kept alive, so that ids stay unique
        self._limit = _MOST + 40 * sum(1 for _ in model.modules())
        self._save(model)

    def _save(self, value: Any, depth: int = 0) -> None:
        """Save one value and its contents."""
        if isinstance(value, _NOT_STATE) or id(value) in self._visited or len(self._visited) >= self._limit:
            return
        self._visited[id(value)] = value
        if isinstance(value, nn.Module):
            self._save_module(value)
        elif isinstance(value, Tensor):
            self._save_tensor(value)
        elif isinstance(value, dict):
            self.undo.append(_undo_of_dict(value))
            self._save_items(list(value.values()), depth)
        elif isinstance(value, tuple | frozenset):
            self._save_items(value, depth)
        elif isinstance(value, list | deque | set):
            copied = value.copy()
            self.undo.append(partial(_restore_container, value, copied))
            self._save_items(list(copied), depth)
        elif isinstance(value, bytearray):
            self.undo.append(partial(value.__setitem__, slice(None), value.copy()))
        elif isinstance(value, np.ndarray):
            self.undo.append(partial(_restore_array, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self.undo.append(partial(value.set_state, value.get_state()))
        elif depth < _DEPTH and isinstance(getattr(value, "__dict__", None), dict) and not _is_foreign(value):
            self._save(vars(value), depth + 1)

    def _save_items(self, values: Any, depth: int) -> None:
        if len(values) <= _LONGEST:
            for value in values:
                self._save(value, depth)

    def _save_module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            for buffer in module.buffers():
                self._save(buffer)
            return
        self.undo.append(partial(set_class, module, type(module), vars(module)))
        self._save(vars(module))
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            self._save_values(module.weight)

    def _save_tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor):
            self.undo.append(partial(_unmaterialize, tensor, type(tensor)))
        elif isinstance(tensor, nn.Parameter):
            self.undo.append(_undo_of_parameter(tensor))
        else:
            self._save_values(tensor)

    def _save_values(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.device.type != "meta":
            self.undo.append(partial(_restore_values, tensor, tensor.detach().clone()))


def _is_foreign(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in _FOREIGN


def set_class(module: nn.Module, cls: type, attributes: dict[str, Any] | None = None) -> None:
    """Set the module's class, and its attributes if given, without its __setattr__."""
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)
    if attributes is not None and vars(module) is not attributes:
        object.__setattr__(module, "__dict__", attributes)


def write(tensor: Tensor, values: Tensor | int) -> None:
    """Write in place, also to inference tensors."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values) if isinstance(values, Tensor) else tensor.fill_(values)


def _undo_of_dict(value: dict[Any, Any]) -> Undo:
    # Two tuples, and not one for each item: thousands of objects make Python's collector run.
    return partial(_restore_dict, value, tuple(value), tuple(value.values()))


def _restore_dict(value: dict[Any, Any], keys: tuple[Any, ...], items: tuple[Any, ...]) -> None:
    if len(value) == len(keys) and all(map(is_, value, keys)) and all(map(is_, value.values(), items)):
        return
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # not the overrides of a subclass
    kind.clear(value)
    for key, item in zip(keys, items, strict=True):
        kind.__setitem__(value, key, item)


def _restore_container(value: Any, saved: Any) -> None:
    kind: Any = next(kind for kind in (list, deque, set) if isinstance(value, kind))  # not a subclass
    kind.clear(value)
    (kind.update if kind is set else kind.extend)(value, saved)


def _restore_array(array: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> None:
    if array.flags.writeable and array.shape == saved.shape:
        array[...] = saved


def _restore_values(tensor: Tensor, saved: Tensor) -> None:
    """Compare, then write: a batch norm updates its statistics without a new version, and most did not change."""
    if tensor.shape == saved.shape and not torch.equal(tensor, saved):
        write(tensor, saved)


def _undo_of_parameter(parameter: Tensor) -> Undo:
    hooks = {name: OrderedDict(getattr(parameter, name)) for name in _TENSOR_HOOKS if getattr(parameter, name, None)}
    return partial(_restore_parameter, parameter, parameter.requires_grad, parameter.grad, hooks)


def _restore_parameter(parameter: Tensor, requires_grad: bool, gradient: Tensor | None, hooks: dict[str, Any]) -> None:
    if parameter.requires_grad is not requires_grad:
        parameter.requires_grad = requires_grad
    if parameter.grad is not gradient:
        parameter.grad = gradient
    for name in _TENSOR_HOOKS:
        saved, current = hooks.get(name, {}), getattr(parameter, name, None)
        if current is not None and list(current.items()) != list(saved.items()):
            current.clear()
            current.update(saved)


def _unmaterialize(tensor: Tensor, cls: type) -> None:
    """Back to a lazy tensor without a shape."""
    if type(tensor) is not cls:
        with torch.no_grad():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.__class__ = cls


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients and full float32 precision inside; the model and the generators are restored afterwards."""
    with torch.inference_mode(False), torch.no_grad(), _full_precision(), unchanged(model):
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Disable TF32 and bfloat16 products, with which two correct results differ in the fourth digit."""
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
    """Put every module in eval mode; restore each mode afterwards.

    Sets the attribute per module: a model's train() may have other effects (merge weights, enable a layer).
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", vars(module).get("training", module.training))
            module.training = False
        yield


def use_batch_statistics(layer: _BatchNorm) -> None:
    """Make the layer normalize by each batch's statistics, without other processes, and update nothing."""
    layer.training, layer.track_running_stats = True, False
    vars(layer)["_merge"] = _no_merge


def _no_merge() -> None:
    """Replaces SyncBatchNorm's `_merge`: an aborted forward must not block other processes."""


def use_tensors(layer: nn.Module, **tensors: Tensor) -> None:
    """Put the layer in eval mode with other parameters and buffers."""
    layer.training = False
    for kind in ("_parameters", "_buffers"):
        table = vars(layer)[kind]
        vars(layer)[kind] = table | {name: tensor for name, tensor in tensors.items() if name in table}


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, nothing compiled; the model is restored afterwards.

    Inside, layers may be changed by `use_batch_statistics` and `use_tensors`.
    """
    with undisturbed(model), in_eval(model), eager():
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Run nothing compiled: compiled code ignores hooks that are added later."""
    with nullcontext() if compiled_class() is None else torch.compiler.set_stance("force_eager"):
        yield


_INSIDE = ("_orig_mod", "module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the parallel wrappers, with the user's layer names.

    It runs on one device without other processes, so that a forward can be aborted.
    """
    wrappers: list[type] = [nn.DataParallel, nn.parallel.DistributedDataParallel]
    compiled = compiled_class()
    if compiled is not None:
        wrappers.append(compiled)
    while isinstance(model, tuple(wrappers)):
        model = next(model._modules[name] for name in _INSIDE if name in model._modules)  # type: ignore[assignment]
    return model


def compiled_class() -> type | None:
    """The class of compiled modules; None if the compiler is not imported, or another thread is importing it.

    Importing it here would take a second.
    """
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
