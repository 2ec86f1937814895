"""Which batch norms stand directly before or after a convolution or linear map that can take them in.

Two modules are a pair where the first one's output is the second one's input, whole and unchanged, and nothing else
reads it. A run of the model shows it: what a module returned is followed by its storage, through every operation of
PyTorch's that reads or writes it, views and in-place ones included, to the model's outputs. What is still held by
someone after the run is counted as a use as well.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchnorm.surgery._folding.trials import Pair, place
from batchnorm.surgery._folding.weights import folded, remainder, units
from batchnorm.surgery._shared.activations import bypassable
from batchnorm.surgery._shared.calling import leaves
from batchnorm.surgery._shared.layers import FRESH, Norm, act_of, names_of, opaque

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a subclass may define and still do what its base does.
_HARMLESS = {"__init__", "extra_repr", "__doc__", "__module__", "__qualname__", "__annotations__", "__constants__"}
_HARMLESS |= {"__static_attributes__", "__firstlineno__", "__annotate__", "__annotate_func__", "__parameters__"}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MAPS = tuple(FRESH)
_RETURNED = "returned by the model"

_Geometry = tuple[torch.Size, tuple[int, ...], Any]


class _Link(NamedTuple):
    """The output of `first` is the input of `second`: `elsewhere` says what else has it, `rank` its dimensions."""

    first: nn.Module
    second: nn.Module
    elsewhere: str | None
    rank: int


@dataclass
class _Made:
    """What a module returned: the memory, how it lies there, and who read it, with the module that took it whole."""

    module: nn.Module
    memory: Any  # a weak reference to it: as long as there is one, no other memory has its number
    geometry: _Geometry
    uses: list[tuple[str, nn.Module | None]] = field(default_factory=list)


class Observed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is seen of a model while `run` calls it, and the pairs that this allows."""

    def __init__(self, model: nn.Module, norms: Sequence[Norm], run: Callable[[], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[nn.Module]()
        self.links: list[_Link] = []
        # The modules whose parameters others read; those called with more than their input; with a mask or lengths.
        self.read, self.residual, self.masked = set[nn.Module](), set[nn.Module](), set[nn.Module]()
        self.made: dict[int, _Made] = {}
        self.names = names_of(model)
        self.owners: dict[int, set[nn.Module]] = {}
        for module in self.names:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if isinstance(tensor, Tensor) and not isinstance(module, torch.jit.ScriptModule):
                    self.owners.setdefault(_memory(tensor), set()).add(module)
        layers, modules = {norm.layer for norm in norms}, [m for m in model.modules() if not opaque(m)]
        # Of these it is known that they use nothing but their input and their own parameters.
        self.plain = {m for m in modules if (_runs_as_its_base(m) or m in layers) and bypassable(m)}
        self.inside: list[nn.Module] = []
        with ExitStack() as stack:
            for module in modules:
                if not _does_nothing(module):
                    before = module.register_forward_pre_hook(self._enter, prepend=False, with_kwargs=True)
                    after = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            with self:
                outputs = run()
            for tensor in leaves(outputs):
                self._use(tensor, _RETURNED)
            del outputs
        self._end()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.inside:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._use(tensor, str(func))
        return func(*args, **(kwargs or {}))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.calls[module] += 1
        if _watched(module) or not module._modules:
            first = args[0] if args else kwargs.get("input")
            for tensor in leaves((args, dict(kwargs))):
                self._use(tensor, type(module).__name__, module if tensor is first else None)
            if sum(value is not None for value in (*args, *kwargs.values())) > 1:
                self.residual.add(module)
            if any(kwargs.get(name) is not None for name in ("mask", "lengths")):
                self.masked.add(module)
        if module in self.plain:
            self.inside.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Also where it raised."""
        if module in self.plain:
            self.inside.pop()
        if _watched(module) and isinstance(output, Tensor) and output.layout == torch.strided:
            memory = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]
            self.made[_memory(output)] = _Made(module, memory, _geometry(output))

    def _use(self, tensor: Tensor, who: str, module: nn.Module | None = None) -> None:
        """Somebody reads or writes a tensor; `module` is one that has it as its input."""
        key = _memory(tensor)
        self.read |= self.owners.get(key, set()) & self.plain
        made = self.made.get(key)
        if made is not None:
            made.uses.append((who, module if _geometry(tensor) == made.geometry else None))

    def _end(self) -> None:
        """After the run, and once its outputs are gone."""
        if any(not made.memory.expired() for made in self.made.values()):
            gc.collect()
        for made in self.made.values():
            if not made.memory.expired() and all(who != _RETURNED for who, _ in made.uses):
                made.uses.append(("kept after the forward", None))
            for position, (_, module) in enumerate(made.uses):
                if module is not None and _watched(module):
                    elsewhere = next((who for i, (who, _) in enumerate(made.uses) if i != position), None)
                    self.links.append(_Link(made.module, module, elsewhere, len(made.geometry[0])))

    # --- what is allowed ----------------------------------------------------------------------------------------------

    def pairs(self, norm: Norm) -> Iterator[Pair | str]:
        """Each pair with the norm in it, the map before it first, or the reason why it is none; at least one."""
        why = self._why_not_norm(norm)
        if why is not None:
            yield why
            return
        layer = norm.layer
        found = [link for link in self.links if layer in link[:2]]
        found = [link for link in found if isinstance(link.first, _MAPS) or isinstance(link.second, _MAPS)]
        for link in sorted(found, key=lambda link: link.first is layer):
            yield self._pair(norm, link)
        if not found:
            yield "no convolution or linear map stands directly before or after it"

    def _pair(self, norm: Norm, link: _Link) -> Pair | str:
        before = link.second is norm.layer
        module = link.first if before else link.second
        why = self._why_not_pair(norm, module, link, before)
        if why is not None:
            return f"{place(module, before)} {why}"
        weights = folded(module, norm.layer, before)
        if isinstance(weights, str):
            return f"into {place(module, before)}: {weights}"
        name = self.names.get(module, ["?"])[0]
        return Pair(norm, module, name, before, weights, remainder(norm.layer, norm.layer in self.residual))

    def _why_not_norm(self, norm: Norm) -> str | None:
        layer = norm.layer
        if layer.training:
            return "it is in training mode: call model.eval()"
        if not norm.tracked:
            return "it has no running statistics: it normalizes by the batch"
        if vars(layer).get("_tap") is not None:
            return "it is being recorded: end the recording first"
        if layer in self.masked:
            return "it is called with a mask or lengths: it gives 0 at padded positions, which no map does"
        return self._why_not_module(layer, {"weight", "bias"})

    def _why_not_module(self, module: nn.Module, wanted: set[str]) -> str | None:
        if not bypassable(module):
            return "it has hooks, or a forward or call of its own"
        calls = self.calls[module]
        if calls != 1:
            return "it is never called" if calls == 0 else f"it is called {calls} times"
        if module in self.read:
            return "its parameters or statistics are read by others too"
        if not wanted <= module._parameters.keys():
            return "its weight is no parameter"
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or name == "num_batches_tracked":
                continue
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.dtype not in _TYPES:
                return f"its {name} is not a plain floating-point tensor"
            if self.owners.get(_memory(tensor), set()) - {module}:
                return f"its {name} is shared with another module"
        return None

    def _why_not_pair(self, norm: Norm, module: nn.Module, link: _Link, before: bool) -> str | None:
        if not _runs_as_its_base(module):
            return "is of a subclass, which may do anything with its weights"
        why = self._why_not_module(module, {"weight"})
        if why is not None:
            return f"cannot take it in: {why}"
        layer, channels = norm.layer, units(module)[before]
        if channels != layer.num_features:
            return f"has {channels} units where the norm has {layer.num_features} channels"
        if link.elsewhere is not None:
            return f"cannot take it in: what lies between them is not theirs alone ({link.elsewhere})"
        if not before and (act_of(layer) is not None or layer in self.residual):
            return "cannot take it in: the norm applies an activation or adds a residual"
        if layer.running_mean is not None and layer.running_mean.device != next(module.parameters()).device:
            return "is on another device"
        if isinstance(module, nn.Linear) and link.rank != 2:
            return f"gives {link.rank}-d output, in which its units are not the norm's channels"
        return None


def _runs_as_its_base(module: nn.Module) -> bool:
    """Whether it is a map of one of PyTorch's classes, or of one that adds nothing but another way to be made."""
    classes = type(module).__mro__
    own = next((i for i, base in enumerate(classes) if base in FRESH), None)
    return own is not None and all(vars(base).keys() <= _HARMLESS for base in classes[:own])


def _watched(module: nn.Module) -> bool:
    """Whether a module may be one of a pair."""
    return isinstance(module, (*_MAPS, _BatchNorm))


def _does_nothing(module: nn.Module) -> bool:
    """Whether it returns its input, in eval mode."""
    dropping = module.training and not isinstance(module, nn.Identity)
    return type(module) in _NOTHING and bypassable(module) and not dropping


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


def _geometry(tensor: Tensor) -> _Geometry:
    return tensor.shape, tensor.stride(), tensor.storage_offset()
