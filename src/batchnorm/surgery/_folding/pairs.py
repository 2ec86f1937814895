"""Which batch norms stand directly before or after a convolution or linear map that can take them in.

Two modules are a pair where the first one's output is the second one's input, whole and unchanged, and nothing else
reads it. What is seen of a model comes from a run (`observed`); what is allowed is decided here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.surgery._folding.weights import MAPS, units
from batchnorm.surgery._shared.activations import bypassable
from batchnorm.surgery._shared.layers import Norm, act_of, names_of

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a subclass may define and still do what its base does.
_HARMLESS = {"__init__", "extra_repr", "__doc__", "__module__", "__qualname__", "__annotations__", "__constants__"}
_HARMLESS |= {"__static_attributes__", "__firstlineno__", "__annotate__", "__annotate_func__", "__parameters__"}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True, slots=True)
class Link:
    """The output of `first` is the input of `second`: `elsewhere` says what else has it, `rank` its dimensions."""

    first: nn.Module
    second: nn.Module
    elsewhere: str | None
    rank: int


@dataclass
class Seen:
    """Of a model: how often each module is called, what follows what, and whose parameters others read.

    `residual` are those that are called with more than their input, as this package's layers may be; `masked` those
    that are given a mask or lengths.
    """

    calls: Counter[nn.Module] = field(default_factory=Counter)
    links: list[Link] = field(default_factory=list)
    read: set[nn.Module] = field(default_factory=set)
    residual: set[nn.Module] = field(default_factory=set)
    masked: set[nn.Module] = field(default_factory=set)

    def called_with(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note what a module is given beside its input."""
        if sum(value is not None for value in (*args, *kwargs.values())) > 1:
            self.residual.add(module)
        if any(kwargs.get(name) is not None for name in ("mask", "lengths")):
            self.masked.add(module)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A batch norm and the map that can take it in, which runs right before or after it."""

    norm: Norm
    map: nn.Module
    into: str
    before: bool
    residual: bool

    @property
    def place(self) -> str:
        """The map, in words."""
        return f"the {type(self.map).__name__} {'before' if self.before else 'after'} it"

    @property
    def first(self) -> nn.Module:
        """The one of the two that runs first."""
        return self.map if self.before else self.norm.layer

    @property
    def second(self) -> nn.Module:
        """The one that reads what the first one gives."""
        return self.norm.layer if self.before else self.map


def is_map(module: nn.Module) -> bool:
    """Whether it is a convolution or a linear map, a subclass included."""
    return isinstance(module, tuple(MAPS))


def runs_as_its_base(module: nn.Module) -> bool:
    """Whether it is a map of one of PyTorch's classes, or of one that adds nothing but another way to be made."""
    cls = type(module)
    own = next((i for i, base in enumerate(cls.__mro__) if base in MAPS), None)
    return own is not None and all(vars(base).keys() <= _HARMLESS for base in cls.__mro__[:own])


def watched(module: nn.Module) -> bool:
    """Whether a module may be one of a pair."""
    return is_map(module) or isinstance(module, _BatchNorm)


def does_nothing(module: nn.Module) -> bool:
    """Whether it returns its input, in eval mode."""
    dropping = module.training and not isinstance(module, nn.Identity)
    return type(module) in _NOTHING and bypassable(module) and not dropping


class Candidates:
    """The pairs of a model, as far as they are allowed: the map before a norm is tried first, then the one after it."""

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        self.seen = seen
        self.names = names_of(model)
        self.owners = _owners(self.names)

    def of(self, norm: Norm) -> Iterator[Pair | str]:
        """Each pair with the norm in it, or the reason why it is none; at least one of the two."""
        why = self._why_not_norm(norm)
        if why is not None:
            yield why
            return
        layer = norm.layer
        found = [link for link in self.seen.links if layer in (link.first, link.second)]
        found = [link for link in found if is_map(link.first) or is_map(link.second)]
        for link in sorted(found, key=lambda link: link.first is layer):
            yield self._pair(norm, link)
        if not found:
            yield "no convolution or linear map stands directly before or after it"

    def _pair(self, norm: Norm, link: Link) -> Pair | str:
        before = link.second is norm.layer
        module = link.first if before else link.second
        name = self.names.get(module, ["?"])[0]
        why = self._why_not_map(module) or self._why_not_pair(norm, module, link, before)
        if why is not None:
            return f"the {type(module).__name__} {'before' if before else 'after'} it {why}"
        return Pair(norm, module, name, before, norm.layer in self.seen.residual)

    def _why_not_norm(self, norm: Norm) -> str | None:
        layer = norm.layer
        if layer.training:
            return "it is in training mode: call model.eval()"
        if not norm.tracked:
            return "it has no running statistics: it normalizes by the batch"
        if vars(layer).get("_tap") is not None:
            return "it is being recorded: end the recording first"
        if layer in self.seen.masked:
            return "it is called with a mask or lengths: it gives 0 at padded positions, which no map does"
        return self._why_not_module(layer, {"weight", "bias"})

    def _why_not_map(self, module: nn.Module) -> str | None:
        if not runs_as_its_base(module):
            return "is of a subclass, which may do anything with its weights"
        why = self._why_not_module(module, {"weight"})
        return None if why is None else f"cannot take it in: {why}"

    def _why_not_module(self, module: nn.Module, wanted: set[str]) -> str | None:
        if not bypassable(module):
            return "it has hooks, or a forward or call of its own"
        calls = self.seen.calls[module]
        if calls != 1:
            return "it is never called" if calls == 0 else f"it is called {calls} times"
        if module in self.seen.read:
            return "its parameters or statistics are read by others too"
        tensors = {**module._parameters, **module._buffers}
        if not wanted <= module._parameters.keys():
            return "its weight is no parameter"
        for name, tensor in tensors.items():
            if tensor is None or name == "num_batches_tracked":
                continue
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.dtype not in _TYPES:
                return f"its {name} is not a plain floating-point tensor"
            shared = self.owners[_memory(tensor)] - {module}
            if shared:
                return f"its {name} is shared with another module"
        return None

    def _why_not_pair(self, norm: Norm, module: nn.Module, link: Link, before: bool) -> str | None:
        layer = norm.layer
        inside, outside = units(module)
        channels = outside if before else inside
        if channels != layer.num_features:
            return f"has {channels} units where the norm has {layer.num_features} channels"
        if link.elsewhere is not None:
            return f"cannot take it in: what lies between them is not theirs alone ({link.elsewhere})"
        if not before and (act_of(layer) is not None or layer in self.seen.residual):
            return "cannot take it in: the norm applies an activation or adds a residual"
        device = next(module.parameters()).device
        if layer.running_mean is not None and layer.running_mean.device != device:
            return "is on another device"
        if isinstance(module, nn.Linear) and link.rank != 2:
            return f"gives {link.rank}-d output, in which its units are not the norm's channels"
        return None


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


def _owners(modules: Iterable[nn.Module]) -> dict[int, set[nn.Module]]:
    """The modules that hold parameters or buffers in one piece of memory."""
    owners: dict[int, set[nn.Module]] = {}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, Tensor) and not isinstance(module, torch.jit.ScriptModule):
                owners.setdefault(_memory(tensor), set()).add(module)
    return owners
