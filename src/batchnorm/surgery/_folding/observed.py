"""What is seen of a model while it runs an example: each module's call, and every other use of what it returned.

Memory tells: what a module returned is followed by its storage, through every operation of PyTorch's that reads or
writes it, views and in-place ones included, to the model's outputs. What is still held by someone after the run is
counted as a use as well.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchnorm.surgery._folding.pairs import (
    Link,
    Seen,
    does_nothing,
    runs_as_its_base,
    watched,
)
from batchnorm.surgery._shared.activations import bypassable
from batchnorm.surgery._shared.calling import leaves
from batchnorm.surgery._shared.layers import Norm, opaque

_Geometry = tuple[torch.Size, tuple[int, ...], Any]


@dataclass
class _Made:
    """What a module returned: the memory, how it lies there, and who read it, with the module that took it whole."""

    module: nn.Module
    memory: Any  # a weak reference to it: as long as there is one, no other memory has its number
    geometry: _Geometry
    uses: list[tuple[str, nn.Module | None]] = field(default_factory=list)


def seen_in_run(model: nn.Module, norms: tuple[Norm, ...], run: Callable[[], Any]) -> Seen:
    """What `run`, which calls the model, shows."""
    watch = _Watch(model, norms)
    handles = []
    try:
        for module in list(model.modules()):
            if opaque(module) is None and not does_nothing(module):
                handles.append(module.register_forward_pre_hook(watch.enter, prepend=False, with_kwargs=True))
                handles.append(module.register_forward_hook(watch.leave, with_kwargs=True, always_call=True))
        with watch:
            outputs = run()
        watch.returned(outputs)
        del outputs
    finally:
        for handle in handles:
            handle.remove()
    return watch.ended()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, norms: tuple[Norm, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Seen()
        self.made: dict[int, _Made] = {}
        layers = {norm.layer for norm in norms}
        modules = [module for module in model.modules() if opaque(module) is None]
        # Of these it is known that they use nothing but their input and their own parameters.
        self.plain = {m for m in modules if (runs_as_its_base(m) or m in layers) and bypassable(m)}
        self.inside: list[nn.Module] = []
        self.owners = {
            key: module
            for module in self.plain
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None and (key := _memory(tensor)) is not None
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.inside:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self.use(tensor, str(func))
        return func(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a module's forward."""
        self.seen.calls[module] += 1
        if watched(module) or not module._modules:
            first = args[0] if args else kwargs.get("input")
            for tensor in leaves((args, dict(kwargs))):
                self.use(tensor, type(module).__name__, module if tensor is first else None)
            self.seen.called_with(module, args, kwargs)
        if module in self.plain:
            self.inside.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """After it, or where it raised."""
        if module in self.plain:
            self.inside.pop()
        if watched(module) and isinstance(output, Tensor) and (key := _memory(output)) is not None:
            memory = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]
            self.made[key] = _Made(module, memory, _geometry(output))

    def use(self, tensor: Tensor, who: str, module: nn.Module | None = None) -> None:
        """Somebody reads or writes a tensor; `module` is one that has it as its input."""
        key = _memory(tensor)
        if key in self.owners:
            self.seen.read.add(self.owners[key])
        made = None if key is None else self.made.get(key)
        if made is not None:
            made.uses.append((who, module if _geometry(tensor) == made.geometry else None))

    def returned(self, outputs: Any) -> None:
        """What the model returns."""
        for tensor in leaves(outputs):
            self.use(tensor, "returned by the model")

    def ended(self) -> Seen:
        """After the run, and once its outputs are gone."""
        if any(not made.memory.expired() for made in self.made.values()):
            gc.collect()
        for made in self.made.values():
            if not made.memory.expired() and all(who != "returned by the model" for who, _ in made.uses):
                made.uses.append(("kept after the forward", None))
            for position, (_, module) in enumerate(made.uses):
                if module is not None and watched(module):
                    others = [who for i, (who, _) in enumerate(made.uses) if i != position]
                    elsewhere = others[0] if others else None
                    self.seen.links.append(Link(made.module, module, elsewhere, len(made.geometry[0])))
        return self.seen


def _memory(tensor: Tensor) -> int | None:
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None


def _geometry(tensor: Tensor) -> _Geometry:
    return tensor.shape, tensor.stride(), tensor.storage_offset()
