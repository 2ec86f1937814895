"""Find the batch norms right before or after a convolution or linear layer (a map), into which they can be folded.

Two modules are a pair if the second reads the unchanged output of the first, and nothing else reads it. One run of the
model finds the pairs. It traces each module's output, by its storage, through all operations of PyTorch that read or
write it, including views, in-place operations and the model's outputs. An output that outlives the run counts as used.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchnorm.surgery._folding.trials import Pair, describe_map
from batchnorm.surgery._folding.weights import fold_weights, in_out_channels, remainder
from batchnorm.surgery._shared.activations import is_bypassable
from batchnorm.surgery._shared.calling import leaves
from batchnorm.surgery._shared.layers import FRESH, has_generated_code, names_of
from batchnorm.surgery._shared.norm import Norm

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Attributes that a subclass may define without changing its computation.
_HARMLESS = {"__init__", "extra_repr", "__doc__", "__module__", "__qualname__", "__annotations__", "__constants__"}
_HARMLESS |= {"__static_attributes__", "__firstlineno__", "__annotate__", "__annotate_func__", "__parameters__"}
_NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MAPS = tuple(FRESH)
_RETURNED = "returned by the model"

_Geometry = tuple[torch.Size, tuple[int, ...], Any]


class Link(NamedTuple):
    """The output of `first`, with `rank` dimensions, is the input of `second`; `other_use` names another reader."""

    first: nn.Module
    second: nn.Module
    other_use: str | None
    rank: int


@dataclass
class _Output:
    """A module's output: its memory, geometry and readers, each with the module whose input is all of it, if any.

    `overwritten`: by an activation in place.
    """

    module: nn.Module
    memory: Any  # a weak reference; while it exists, no other storage gets the same address
    geometry: _Geometry
    uses: list[tuple[str, nn.Module | None]] = field(default_factory=list)
    overwritten: bool = False


class RunTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Traces the calls, reads and writes of a model while `run` calls it, and finds pairs in them.

    `activations` are modules that may be the second of a `links` entry, besides batch norms and maps.
    """

    def __init__(
        self, model: nn.Module, norms: Sequence[Norm], run: Callable[[], Any], activations: Collection[nn.Module] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[nn.Module]()
        self.links: list[Link] = []
        # `read`: other code reads their parameters; `residual`: has two inputs; `masked`: has a mask or lengths.
        self.read, self.residual, self.masked = set[nn.Module](), set[nn.Module](), set[nn.Module]()
        self.outputs: dict[int, _Output] = {}
        self.activations, self.overwritten = frozenset(activations), list[_Output]()
        self.names = names_of(model)
        self.owners: dict[int, set[nn.Module]] = {}
        for module in self.names:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if isinstance(tensor, Tensor) and not isinstance(module, torch.jit.ScriptModule):
                    self.owners.setdefault(_memory(tensor), set()).add(module)
        self.layers: set[nn.Module] = {norm.layer for norm in norms}
        modules = [m for m in model.modules() if not has_generated_code(m)]
        # Modules that read only their input and parameters.
        known = self.layers | self.activations
        self.plain = {m for m in modules if (runs_base_forward(m) or m in known) and is_bypassable(m)}
        self.running: list[nn.Module] = []
        # By norm: the number of dimensions and the type of its inputs.
        self.inputs: dict[nn.Module, set[tuple[int, torch.dtype]]] = {}
        # Maps of subclasses, which may read anything: those of the model, and those that run now.
        self.subclasses = {m for m in modules if isinstance(m, _MAPS)} - self.plain
        self.inside = Counter[nn.Module]()
        with ExitStack() as stack:
            for module in modules:
                if not _returns_input(module):
                    before = module.register_forward_pre_hook(self._enter, prepend=False, with_kwargs=True)
                    after = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            with self:
                outputs = run()
            for tensor in leaves(outputs):
                self._use(tensor, _RETURNED)
            del outputs
        self._collect_links()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.running:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._use(tensor, str(func))
        return func(*args, **(kwargs or {}))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.calls[module] += 1
        if self._is_candidate(module) or not module._modules:
            first = args[0] if args else kwargs.get("input")
            if module in self.layers and isinstance(first, Tensor):
                self.inputs.setdefault(module, set()).add((first.dim(), first.dtype))
            for tensor in leaves((args, dict(kwargs))):
                self._use(tensor, type(module).__name__, module if tensor is first else None)
            if sum(value is not None for value in (*args, *kwargs.values())) > 1:
                self.residual.add(module)
            if any(kwargs.get(name) is not None for name in ("mask", "lengths")):
                self.masked.add(module)
        if module in self.plain:
            self.running.append(module)
        elif module in self.subclasses:
            self.inside[module] += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Called also if the module raised."""
        if module in self.plain:
            self.running.pop()
        elif module in self.subclasses:
            self.inside[module] -= 1
        if module in self.activations and isinstance(output, Tensor):
            # In place: what reads this memory from now on reads the activation's output.
            replaced = self.outputs.pop(_memory(output), None)
            if replaced is not None:
                replaced.overwritten = True
                self.overwritten.append(replaced)
        if self._is_candidate(module) and isinstance(output, Tensor) and output.layout == torch.strided:
            memory = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]
            self.outputs[_memory(output)] = _Output(module, memory, _geometry(output))

    def _use(self, tensor: Tensor, who: str, module: nn.Module | None = None) -> None:
        """Note that `who` reads or writes a tensor, which is the input of `module`, if any."""
        key = _memory(tensor)
        readable = self.owners.get(key, set()) & (self.plain | self.subclasses)
        self.read |= {module for module in readable if not self.inside[module]}
        output = self.outputs.get(key)
        if output is not None:
            output.uses.append((who, module if _geometry(tensor) == output.geometry else None))

    def _is_candidate(self, module: nn.Module) -> bool:
        """Whether a module may be part of a pair."""
        return isinstance(module, (*_MAPS, _BatchNorm)) or module in self.layers

    def _collect_links(self) -> None:
        """Collect the links; call it after the run's outputs are freed."""
        if any(not output.memory.expired() for output in self.outputs.values()):
            gc.collect()
        for output in (*self.outputs.values(), *self.overwritten):
            is_kept = not output.overwritten and not output.memory.expired()
            if is_kept and all(who != _RETURNED for who, _ in output.uses):
                output.uses.append(("kept after the forward", None))
            for position, (_, module) in enumerate(output.uses):
                if module is not None and (self._is_candidate(module) or module in self.activations):
                    other_use = next((who for i, (who, _) in enumerate(output.uses) if i != position), None)
                    self.links.append(Link(output.module, module, other_use, len(output.geometry[0])))

    # --- pairs --------------------------------------------------------------------------------------------------------

    def pairs(self, norm: Norm, after: bool = True) -> Iterator[Pair | str]:
        """Yield each pair of the norm, the map before it first, or why it cannot be folded; at least one item.

        With `after` False the map after it is no candidate.
        """
        why = self._why_not_norm(norm)
        if why is not None:
            yield why
            return
        layer = norm.layer
        links = [link for link in self.links if layer in link[:2]]
        links = [link for link in links if isinstance(link.first, _MAPS) or (after and isinstance(link.second, _MAPS))]
        for link in sorted(links, key=lambda link: link.first is layer):
            yield self._pair(norm, link)
        if not links:
            where = "before or after" if after else "before"
            yield f"no convolution or linear layer comes directly {where} it"

    def _pair(self, norm: Norm, link: Link) -> Pair | str:
        before = link.second is norm.layer
        module = link.first if before else link.second
        why = self._why_not_pair(norm, module, link, before)
        if why is not None:
            return f"{describe_map(module, before)} {why}"
        weights = fold_weights(module, norm, before)
        if isinstance(weights, str):
            return f"into {describe_map(module, before)}: {weights}"
        name = self.names.get(module, ["?"])[0]
        return Pair(norm, module, name, before, weights, remainder(norm, norm.layer in self.residual))

    def why_not_alone(self, norm: Norm) -> str | None:
        """Why a norm cannot be replaced alone, whatever is beside it; None if it can."""
        if norm.layer in self.residual:
            return "it is called with a residual"
        return self._why_not_norm(norm, once=False)

    def _why_not_norm(self, norm: Norm, once: bool = True) -> str | None:
        layer = norm.layer
        if layer.training:
            return "it is in training mode: call model.eval()"
        if not norm.has_statistics:
            return "it has no running statistics: it normalizes by the batch"
        if vars(layer).get("_tap") is not None:
            return "it is being recorded: end the recording first"
        if layer in self.masked:
            return "it is called with a mask or lengths: it returns 0 at padded positions, and a map does not"
        tensors = {norm.tensor_name(role): norm.tensor(role) for role in ("gamma", "beta", "mean", "var")}
        return self.why_not_module(layer, tensors, once)

    def why_not_module(self, module: nn.Module, tensors: Mapping[str, Tensor | None], once: bool = True) -> str | None:
        """Why a module cannot be part of a pair; `tensors` are those that it computes with."""
        if not is_bypassable(module):
            return "it has hooks, or a replaced forward or call"
        calls = self.calls[module]
        if calls == 0 or (once and calls > 1):
            return "it is never called" if calls == 0 else f"it is called {calls} times"
        if module in self.read:
            return "other code reads its parameters or statistics too"
        registered = {**module._parameters, **({} if isinstance(module, _MAPS) else module._buffers)}
        for name, tensor in tensors.items():
            if tensor is None and (name in registered or not hasattr(module, name)):
                continue
            if tensor is None or registered.get(name) is not tensor:
                return f"its {name} is not a parameter"
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.dtype not in _TYPES:
                return f"its {name} is not a plain floating-point tensor"
            if self.owners.get(_memory(tensor), set()) - {module}:
                return f"its {name} is shared with another module"
        return None

    def _why_not_pair(self, norm: Norm, module: nn.Module, link: Link, before: bool) -> str | None:
        if not (before or runs_base_forward(module) or set(getattr(module, "kernel_size", (1,))) == {1}):
            return "is of a subclass, which may pad its input: the norm's shift does not reach the border"
        why = self.why_not_module(module, {**module._parameters, "weight": getattr(module, "weight", None)})
        if why is not None:
            return f"cannot absorb it: {why}"
        layer, channels = norm.layer, in_out_channels(module)[before]
        if channels != norm.channels:
            return f"has {channels} units where the norm has {norm.channels} channels"
        if link.other_use is not None:
            return f"cannot absorb it: the tensor between them has another use ({link.other_use})"
        if not before and (norm.activation is None or norm.activation.act is not None or layer in self.residual):
            return "cannot absorb it: the norm applies an activation or adds a residual"
        mean = norm.tensor("mean")
        if mean is not None and mean.device != next(module.parameters()).device:
            return "is on another device"
        if isinstance(module, nn.Linear) and link.rank != 2:
            return f"has {link.rank}-d output, in which its units are not the norm's channels"
        return None


def runs_base_forward(module: nn.Module) -> bool:
    """Whether its class is a map of PyTorch, or a subclass that changes only the construction."""
    classes = type(module).__mro__
    index = next((i for i, base in enumerate(classes) if base in FRESH), None)
    return index is not None and all(vars(base).keys() <= _HARMLESS for base in classes[:index])


def _returns_input(module: nn.Module) -> bool:
    """Whether it returns its input unchanged."""
    drops = module.training and not isinstance(module, nn.Identity)
    return type(module) in _NO_OPS and is_bypassable(module) and not drops


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


def _geometry(tensor: Tensor) -> _Geometry:
    return tensor.shape, tensor.stride(), tensor.storage_offset()
