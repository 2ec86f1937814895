"""The batch norm layers of a model that surgery works on, and those it leaves alone, each with the reason.

Worked on are torch.nn's BatchNorm1d, 2d, 3d and SyncBatchNorm, this package's layers with one set of running
statistics, and those that `freeze` has frozen. A subclass may mean anything by its forward: it is named, not guessed,
unless the caller vouches for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm import layers as ours
from batchnorm.surgery._fusing.classes import original
from batchnorm.surgery._shared.walk import paths
from batchnorm.variants import DOMAINS, ONE_SET

STOCK: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
OURS: tuple[type[nn.Module], ...] = ONE_SET

# The class that a frozen layer's class was made from: filled by `batchnorm.surgery.freeze`.
FROZEN: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A layer, and all the names it has in the model, the first one first; empty where it is the model itself."""

    names: tuple[str, ...]
    layer: _BatchNorm

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def frozen(self) -> bool:
        """Whether its statistics are frozen by `batchnorm.freeze`."""
        return type(self.layer) in FROZEN


@dataclass(frozen=True, slots=True)
class Skipped:
    """A layer that was left as it was, and why."""

    name: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'} ({self.kind}): {self.why}"


@dataclass(frozen=True, slots=True)
class Found:
    """What `find` found: the layers in the model's order."""

    norms: tuple[Norm, ...]
    skipped: tuple[Skipped, ...]


def warn_of_none(what: str, which: str = "batch norm layer", stacklevel: int = 3) -> None:
    """The one warning of a tool that finds no layer to work on: most likely it was given another model than meant."""
    warnings.warn(f"{what} found no {which} in it", UserWarning, stacklevel)


def find(what: str, model: object, also: Sequence[type[nn.Module]] = (), may_be_empty: bool = False) -> Found:
    """Every batch norm layer of a model, each once.

    Args:
        what: the function that asks, for the message of the error.
        model: any module, a layer itself included.
        also: subclasses of torch.nn's layers that normalize as these do, which the caller vouches for.
        may_be_empty: the caller looks for other layers too, and warns itself.

    Warns where there is none at all. Raises TypeError if `model` is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} takes a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    names: dict[nn.Module, list[str]] = {}
    for name, module in paths(model):
        if isinstance(module, _BatchNorm) or "BatchNorm" in _scripted(module):
            names.setdefault(module, []).append(name)
    if not names and not may_be_empty:
        warn_of_none(what, stacklevel=4)
    norms, skipped = [], []
    for module, found in names.items():
        why = _why_not(module, tuple(also))
        if why is None:
            norms.append(Norm(tuple(found), module))  # type: ignore[arg-type]
        else:
            skipped.append(Skipped(found[0], _scripted(module) or type(module).__name__, why))
    return Found(tuple(norms), tuple(skipped))


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """A layer's class, that of before it was frozen."""
    return FROZEN.get(type(layer), type(layer))


def act_of(layer: nn.Module) -> str | None:
    """The activation that is part of the layer: of ours alone."""
    return layer.act if isinstance(layer, ours._BatchNorm) else None


def made_of(module: nn.Module, name: str) -> tuple[nn.Parameter, ...]:
    """The parameters that a module's tensor `name` is or is computed from; none where the module has no such tensor.

    Computed are pruned tensors (`weight_orig`, torch.nn.utils.prune), those of the older weight_norm and spectral_norm
    (`weight_g`, `weight_v`) and parametrized ones.
    """
    own = module._parameters.get(name)
    if own is not None:
        return (own,)
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None and name in parametrizations._modules:
        return tuple(parametrizations._modules[name].parameters(recurse=False))  # type: ignore[union-attr]
    if name in module._parameters or not isinstance(vars(module).get(name), Tensor):
        return ()
    return tuple(p for key, p in module._parameters.items() if p is not None and key.startswith(f"{name}_"))


def _scripted(module: nn.Module) -> str:
    return str(getattr(module, "original_name", "")) if isinstance(module, torch.jit.ScriptModule) else ""


def _why_not(module: nn.Module, also: tuple[type[nn.Module], ...]) -> str | None:
    cls = original(plain_class(module))
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs its own compiled code"
    if isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if cls in STOCK or cls in OURS or cls in also:
        return None
    if cls in DOMAINS:
        return "it has statistics for each of several domains: batchnorm.keep_domain makes it a batch norm of one"
    if "Parametrized" in cls.__name__:
        return "parametrized: its class is made by torch.nn.utils.parametrize"
    base = next(b for b in cls.__mro__[1:] if b.__module__.startswith("torch."))
    return f"a subclass of {base.__name__}, which may mean anything: name it in `also` if it normalizes as that does"
