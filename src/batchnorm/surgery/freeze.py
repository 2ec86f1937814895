"""freeze(): batch norms whose statistics, gamma and beta do not move, whatever train() says; unfreeze()."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.records import Record, Skipped, called
from batchnorm.restoring import all_or_nothing, become
from batchnorm.surgery._fusing import runtime
from batchnorm.surgery._fusing.classes import refused, subclass
from batchnorm.surgery._shared.layers import (
    FROZEN,
    OURS,
    STOCK,
    UNTRACKED,
    Norm,
    check_module,
    find,
    made_of,
    names_of,
    original,
    plain_class,
    warn_of_none,
)
from batchnorm.words import plural

__all__ = ["Freezing", "Frozen", "freeze", "unfreeze"]

# It reads `training` of every batch norm, to build a SyncBatchNorm in its place that the next train() would set going.
_CONVERT_SYNC = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]


# The parameters, by what the field calls them.
_PARAMETERS = {"gamma": "weight", "beta": "bias"}

# On the instance: whether each frozen parameter required a gradient before, by its name. Copies and pickles keep it.
_MEMORY = "_batchnorm_required_grad"


@dataclass(frozen=True, slots=True)
class Frozen:
    """One layer of a `Freezing`.

    Attributes:
        names: all its names in the model.
        kind: its class before it was frozen.
        parts: what was frozen or thawed: "statistics", "gamma", "beta".
    """

    names: tuple[str, ...]
    kind: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Freezing(Record):
    """What `freeze` or `unfreeze` did.

    Attributes:
        layers: one record for each layer of which something was frozen or thawed.
        skipped: the layers of which something could not be, with the reason. `layers` may have the rest of them.
        verb: "frozen" or "unfrozen".
    """

    layers: tuple[Frozen, ...]
    skipped: tuple[Skipped, ...]
    verb: str = "frozen"

    _left = "not frozen"

    def _head(self) -> list[str]:
        return [f"{plural(len(self.layers), 'batch norm layer')} {self.verb}"]

    def _rows(self) -> Iterable[tuple[str, str]]:
        return [(f"{each.kind}  {', '.join(each.parts)} {self.verb}", called(*each.names)) for each in self.layers]


def freeze(
    model: nn.Module,
    statistics: bool = True,
    gamma: bool = True,
    beta: bool = True,
    also: Sequence[type[nn.Module]] = (),
) -> Freezing:
    """Freeze batch norm layers: running statistics, gamma and beta stay as they are, in training too.

    y = act(gamma·(x - running_mean)/sqrt(running_var + eps) + beta) is what a frozen layer computes in either mode.

    Frozen statistics: the layer's `training` is False whatever train(), eval() or an assignment says, so the running
    statistics are used and kept. It stays so through copies, pickles, state dicts (their keys do not change, and
    loading one sets the statistics), `convert` and `revert`, torch.compile, and `torch.optim.swa_utils.update_bn`.
    The layer's class becomes a subclass of its own, so isinstance still finds it.

    Frozen gamma and beta: their requires_grad is False and their gradient is dropped, since an optimizer would take one
    more step with it. A later `model.requires_grad_(True)` thaws them, and so does `parameter.requires_grad = True`:
    freeze after it. Freeze before DistributedDataParallel is put around the model, which looks at requires_grad once.

    Freezing again is harmless, and may add what was not frozen before.

    Args:
        model: changed in place; all of it or, where an error is raised, nothing.
        statistics: freeze running_mean and running_var.
        gamma: freeze `weight`.
        beta: freeze `bias`.
        also: subclasses of torch.nn's layers that normalize as these do, and choose between the batch's statistics and
            the running ones by `self.training`, which the caller vouches for.

    Returns:
        What was frozen of each layer. `skipped` names the layers of which something could not be: without running
        statistics, without gamma or beta, lazy ones, subclasses that are not in `also`.

    Raises TypeError if `model` is not a torch.nn.Module, ValueError where nothing is asked for.
    SyncBatchNorm.convert_sync_batchnorm and torch.jit.script raise TypeError on a frozen layer: both would thaw it.
    """
    wanted = _wanted("freeze", statistics, gamma, beta)
    norms, skipped = find("freeze", model, also)
    required = {p: p.requires_grad for norm in norms for p in norm.layer.parameters()}
    layers = []
    with all_or_nothing(model):
        for norm in norms:
            why_not = {part: _why_not(norm, part) for part in wanted}
            parts = tuple(part for part, why in why_not.items() if why is None)
            kind = plain_class(norm.layer).__name__
            skipped += [Skipped(norm.name, kind, why) for why in why_not.values() if why is not None]
            for part in parts:
                _freeze_part(norm.layer, part, required)
            if parts:
                layers.append(Frozen(norm.names, kind, parts))
    return Freezing(tuple(layers), tuple(skipped))


def unfreeze(model: nn.Module, statistics: bool = True, gamma: bool = True, beta: bool = True) -> Freezing:
    """Take `freeze` back, as far as asked: the layer's own class, and requires_grad as it was before.

    A thawed layer's `training` is what was last asked for while it was frozen. What `freeze` did not freeze stays as it
    is: a gamma whose requires_grad was False before is left so. Gradients dropped by `freeze` are not brought back.

    Args:
        model: changed in place; all of it or, where an error is raised, nothing.
        statistics, gamma, beta: what to thaw: the running statistics, `weight` and `bias`.

    Returns:
        What was thawed of each layer. Subclasses that `freeze` was given in `also` are thawed too.

    Raises TypeError if `model` is not a torch.nn.Module, ValueError where nothing is asked for.
    """
    wanted = _wanted("unfreeze", statistics, gamma, beta)
    check_module("unfreeze", model)
    norms = {module: names for module, names in names_of(model).items() if isinstance(module, _BatchNorm)}
    if not norms:
        warn_of_none()
    names = {layer: found for layer, found in norms.items() if type(layer) in FROZEN or _MEMORY in layer.__dict__}
    layers = []
    with all_or_nothing(model):
        # A parameter that two layers share may have been frozen through one of them before the other looked.
        required: dict[nn.Parameter, bool] = {}
        for layer in names:
            for name, before in layer.__dict__.get(_MEMORY, {}).items():
                for parameter in made_of(layer, name):
                    required[parameter] = required.get(parameter, False) or before
        for layer, found in names.items():
            parts = tuple(part for part in wanted if is_frozen(layer, part))
            for part in parts:
                _thaw_part(layer, part, required)
            if parts:
                layers.append(Frozen(tuple(found), type(layer).__name__, parts))
    return Freezing(tuple(layers), (), "unfrozen")


def _wanted(what: str, statistics: bool, gamma: bool, beta: bool) -> tuple[str, ...]:
    wanted = {"statistics": statistics, "gamma": gamma, "beta": beta}
    for name, value in wanted.items():
        if not isinstance(value, bool):
            raise TypeError(f"{what}: {name} must be True or False, got {type(value).__name__}")
    if not any(wanted.values()):
        raise ValueError(f"nothing to {what}: set statistics, gamma or beta to True")
    return tuple(name for name, value in wanted.items() if value)


def _why_not(norm: Norm, part: str) -> str | None:
    """Why a part of a layer cannot be frozen."""
    layer = norm.layer
    if part != "statistics":
        return None if made_of(layer, _PARAMETERS[part]) else f"it has no {part}"
    if not norm.tracked:
        return UNTRACKED
    return None if norm.frozen else refused(original(plain_class(layer)))


def _freeze_part(layer: _BatchNorm, part: str, required: dict[nn.Parameter, bool]) -> None:
    if part == "statistics":
        if type(layer) not in FROZEN:
            become(layer, frozen_class(original(plain_class(layer))))
        return
    name = _PARAMETERS[part]
    memory: dict[str, bool] = layer.__dict__.setdefault(_MEMORY, {})
    for parameter in made_of(layer, name):
        memory[name] = memory.get(name, False) or required[parameter]
        parameter.requires_grad_(False)
        parameter.grad = None


def is_frozen(layer: _BatchNorm, part: str) -> bool:
    """Whether "statistics", "gamma" or "beta" of a layer is frozen by `freeze`."""
    return type(layer) in FROZEN if part == "statistics" else _PARAMETERS[part] in layer.__dict__.get(_MEMORY, {})


def _thaw_part(layer: _BatchNorm, part: str, required: dict[nn.Parameter, bool]) -> None:
    if part == "statistics":
        become(layer, plain_class(layer))
        return
    name = _PARAMETERS[part]
    for parameter in made_of(layer, name):
        parameter.requires_grad_(required[parameter])
    del layer.__dict__[_MEMORY][name]
    if not layer.__dict__[_MEMORY]:
        del layer.__dict__[_MEMORY]


class _Frozen:
    """What a layer of any class does differently once its statistics are frozen."""

    # Seen by those who must not import this module, such as the recording.
    _batchnorm_frozen = True

    @property
    def training(self) -> bool:
        """False: it normalizes by its running statistics and leaves them alone."""
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _CONVERT_SYNC:
            raise TypeError(
                "SyncBatchNorm.convert_sync_batchnorm would thaw this layer, whose statistics are frozen: a frozen "
                "layer has nothing to synchronize; convert first and freeze then, or unfreeze it"
            )
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    def reset_running_stats(self) -> None:
        """Nothing: they are frozen. `torch.optim.swa_utils.update_bn` calls this."""

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks this first. What it compiles has a `training` that train() sets."""
        raise TypeError(
            f"torch.jit.script would thaw {type(self).__name__}, whose statistics are frozen: "
            "use torch.export, torch.compile or torch.jit.trace, or unfreeze it"
        )


@cache
def frozen_class(cls: type[Any]) -> type[nn.Module]:
    """The subclass of a batch norm's class whose statistics do not move: one for each class, listed in `FROZEN`."""
    members: dict[str, Any] = {"__qualname__": f"Frozen{cls.__name__}"}
    if cls in runtime.LAYERS:
        members[runtime.TAIL] = runtime.hold
    frozen = subclass(cls, (_Frozen,), members, frozen_class)
    FROZEN[frozen] = cls
    return frozen


for _cls in (*STOCK, *OURS):
    frozen_class(_cls)
