"""freeze(): freeze the statistics, gamma and beta of batch norms, also in training mode; unfreeze()."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.records import Record, Skipped, format_names
from batchnorm.restoring import all_or_nothing, set_class, unwrapped
from batchnorm.surgery._folding.frozen import Applied, Applying, fold_frozen
from batchnorm.surgery._folding.on_the_fly import is_folded, mixin_of, unfold
from batchnorm.surgery._folding.trials import check_ready
from batchnorm.surgery._fusing import runtime
from batchnorm.surgery._fusing.classes import subclass, why_no_subclass
from batchnorm.surgery._shared.calling import Example, ForwardFn
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

__all__ = ["Applied", "Applying", "Freezing", "Frozen", "freeze", "unfreeze"]

# It reads `training` of every batch norm, and replaces it by a SyncBatchNorm that the next train() would unfreeze.
_CONVERT_SYNC = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]

# By role: the parameter.
_PARAMETERS = {"gamma": "weight", "beta": "bias"}

# The instance attribute with requires_grad before freezing, by parameter name; copied and pickled with the layer.
_MEMORY = "_batchnorm_required_grad"


@dataclass(frozen=True, slots=True)
class Frozen:
    """One layer of a `Freezing`.

    Attributes:
        names: all its names in the model.
        kind: its class before it was frozen.
        parts: what was frozen or unfrozen: "statistics", "gamma", "beta".
    """

    names: tuple[str, ...]
    kind: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Freezing(Record):
    """What `freeze` or `unfreeze` did.

    Attributes:
        layers: one record for each layer with anything frozen or unfrozen.
        skipped: the layers with a part that could not be, with the reason. They may be in `layers` with other parts.
        verb: "frozen" or "unfrozen".
        folding: what was folded with `fold=True`, else None.
    """

    layers: tuple[Frozen, ...]
    skipped: tuple[Skipped, ...]
    verb: str = "frozen"
    folding: Applying | None = None

    _left = "not frozen"

    def _head(self) -> list[str]:
        return [f"{plural(len(self.layers), 'batch norm layer')} {self.verb}"]

    def _rows(self) -> Iterable[tuple[str, str]]:
        return [
            (f"{layer.kind}  {', '.join(layer.parts)} {self.verb}", format_names(*layer.names)) for layer in self.layers
        ]

    def __str__(self) -> str:
        # Without arguments super() would look for the class that slots=True replaced.
        text = Record.__str__(self)
        return text if self.folding is None else f"{text}\n{self.folding}"


def freeze(
    model: nn.Module,
    statistics: bool = True,
    gamma: bool = True,
    beta: bool = True,
    also: Sequence[type[nn.Module]] = (),
    *,
    fold: bool = False,
    example: Any = None,
    forward_fn: ForwardFn | None = None,
    bound: float | None = None,
) -> Freezing:
    """Freeze batch norm layers: running statistics, gamma and beta do not change, in training mode either.

    y = act(gamma·(x - running_mean)/sqrt(running_var + eps) + beta) is what a frozen layer computes in both modes.

    Frozen statistics: the layer's class becomes a subclass whose `training` is always False. This survives train(),
    copies, pickles, state dicts (loading one sets the statistics), `convert`, `revert`, torch.compile and
    `torch.optim.swa_utils.update_bn`.

    Frozen gamma and beta: requires_grad is False, and the gradient is dropped, since an optimizer would still apply it.
    A later `requires_grad_(True)` unfreezes them. Freeze before DistributedDataParallel wraps the model, which reads
    requires_grad once. Freezing again may freeze more.

    With `fold`, a wholly frozen layer right after a convolution or linear layer (the map) is applied by that map:
    W' = scale·W and b' = scale·b + shift, with scale = gamma/sqrt(running_var + eps) and shift = beta - mean·scale, are
    computed in every forward, inside autograd. W and b keep their gradients, and forward keeps neither the norm's input
    nor anything else of the norm for backward. ReLU, and ReLU6, LeakyReLU and ELU modules after a folded layer, keep
    their output, which the next map keeps anyway; SiLU, GELU and Hardswish keep their input. Parameters, the state dict
    and optimizers do not change, and new values of gamma, beta or the statistics count from the next forward on.
    `unfreeze` restores the classes of the maps and activations.

    Pairs are found as `fold` finds them, in a run of the example in the model's mode, and in eval mode. Outputs and the
    gradients of the parameters are compared on the example; if they differ, nothing is folded. What is compared is the
    example's path through the model: do not replace one module of a pair, nor copy it alone. Hooks on the map and on
    the norm see normalized values. The map keeps W' for backward: with small batches of small images that can be more
    than the norm's input.

    Args:
        model: changed in place; nothing if an error is raised.
        statistics: freeze running_mean and running_var.
        gamma: freeze `weight`.
        beta: freeze `bias`.
        also: subclasses, to be included, that normalize as their base class does and choose between the batch's
            statistics and the running ones by `self.training`. They are not folded.
        fold: also fold wholly frozen layers into the maps before them.
        example: with `fold`, a tensor, a tuple of the model's arguments, a mapping of named ones, or anything that
            forward_fn accepts. Without one, a random input is made that fits the first convolution or linear layer.
        forward_fn: forward_fn(model, example) runs the model on the example and returns the outputs to compare.
        bound: of the largest difference of the outputs relative to their largest magnitude, by default that of
            `batchnorm.fold`; ten times as much for the gradients of each parameter.

    Returns:
        What was frozen per layer. Skipped are layers without running statistics, gamma or beta, lazy layers, and
        subclasses that are not in `also`. With `fold`, `folding` says which layers are folded, and why others are not.

    Raises TypeError if `model` is not a torch.nn.Module; ValueError if all three are False, or if `example`,
    `forward_fn` or `bound` is given without `fold`. With `fold`, raises TypeError if there is no example and the model
    runs on no random input; ValueError if the model is compiled, lazy, on the meta device or wrapped by
    DistributedDataParallel, does not run on the example, or returns nothing that can be compared.
    SyncBatchNorm.convert_sync_batchnorm and torch.jit.script raise TypeError on a frozen layer: both would unfreeze it.
    """
    wanted = _wanted("freeze", statistics, gamma, beta)
    _check_fold(fold, example, forward_fn, bound)
    norms, skipped = find("freeze", model, also)
    checked = _checked(model, example, forward_fn, bound) if fold else None
    unknown = tuple(skipped)
    folding = None
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
        if checked is not None:
            _restore_folded(model, [norm.layer for norm in norms])
            folding = fold_frozen(model, norms, unknown, checked, bound, folded_class)
    return Freezing(tuple(layers), tuple(skipped), folding=folding)


def unfreeze(model: nn.Module, statistics: bool = True, gamma: bool = True, beta: bool = True) -> Freezing:
    """Revert `freeze`: restore the layer's class, and requires_grad as before.

    `training` becomes the mode that was last set while the layer was frozen. A gamma whose requires_grad was False
    before stays so. Dropped gradients are not restored.

    Args:
        model: changed in place; nothing if an error is raised.
        statistics, gamma, beta: what to unfreeze: the running statistics, `weight` and `bias`.

    Returns:
        What was unfrozen per layer.

    Raises TypeError if `model` is not a torch.nn.Module; ValueError if all three are False.
    """
    wanted = _wanted("unfreeze", statistics, gamma, beta)
    check_module("unfreeze", model)
    norms = {module: names for module, names in names_of(model).items() if isinstance(module, _BatchNorm)}
    if not norms:
        warn_of_none()
    layers = []
    with all_or_nothing(model):
        # Of a parameter that two layers share, the first one to be frozen has the original requires_grad.
        required: dict[nn.Parameter, bool] = {}
        for layer in norms:
            for name, before in layer.__dict__.get(_MEMORY, {}).items():
                for parameter in made_of(layer, name):
                    required[parameter] = required.get(parameter, False) or before
        for layer, names in norms.items():
            parts = tuple(part for part in wanted if is_frozen(layer, part))
            for part in parts:
                _unfreeze_part(layer, part, required)
            if parts:
                _restore_folded(layer, [layer])
                layers.append(Frozen(tuple(names), type(layer).__name__, parts))
        unfold(model)
    return Freezing(tuple(layers), (), "unfrozen")


def _check_fold(fold: bool, example: Any, forward_fn: ForwardFn | None, bound: float | None) -> None:
    if not isinstance(fold, bool):
        raise TypeError(f"freeze: fold must be True or False, got {type(fold).__name__}")
    if not fold and any(value is not None for value in (example, forward_fn, bound)):
        raise ValueError("freeze: example, forward_fn and bound need fold=True")


def _checked(model: nn.Module, example: Any, forward_fn: ForwardFn | None, bound: float | None) -> Example:
    """The example. Raises TypeError or ValueError if the model cannot be run on it."""
    if unwrapped(model) is not model:
        raise ValueError(f"freeze: fold before {type(model).__name__} wraps the model: pass the model inside")
    check_ready("freeze", model, bound)
    return Example("freeze", model, example, forward_fn)


def _restore_folded(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Restore the frozen classes of folded layers, and the classes of the maps of `model`."""
    for layer in layers:
        if is_folded(layer):
            cls: Any = plain_class(layer)
            set_class(layer, frozen_class(cls))
    unfold(model)


def _wanted(tool: str, statistics: bool, gamma: bool, beta: bool) -> tuple[str, ...]:
    wanted = {"statistics": statistics, "gamma": gamma, "beta": beta}
    for name, value in wanted.items():
        if not isinstance(value, bool):
            raise TypeError(f"{tool}: {name} must be True or False, got {type(value).__name__}")
    if not any(wanted.values()):
        raise ValueError(f"nothing to {tool}: set statistics, gamma or beta to True")
    return tuple(name for name, value in wanted.items() if value)


def _why_not(norm: Norm, part: str) -> str | None:
    layer = norm.layer
    if part != "statistics":
        return None if made_of(layer, _PARAMETERS[part]) else f"it has no {part}"
    if not norm.has_statistics:
        return UNTRACKED
    return None if norm.is_frozen else why_no_subclass(original(plain_class(layer)))


def _freeze_part(layer: _BatchNorm, part: str, required: dict[nn.Parameter, bool]) -> None:
    if part == "statistics":
        set_class(layer, type(layer) if type(layer) in FROZEN else frozen_class(original(type(layer))))
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


def _unfreeze_part(layer: _BatchNorm, part: str, required: dict[nn.Parameter, bool]) -> None:
    if part == "statistics":
        set_class(layer, plain_class(layer))
        return
    name = _PARAMETERS[part]
    for parameter in made_of(layer, name):
        parameter.requires_grad_(required[parameter])
    del layer.__dict__[_MEMORY][name]
    if not layer.__dict__[_MEMORY]:
        del layer.__dict__[_MEMORY]


class _Frozen:
    """Mixin of layers with frozen statistics."""

    # For modules that must not import this one, such as the recording.
    _batchnorm_frozen = True

    @property
    def training(self) -> bool:
        """Always False: the layer normalizes by its running statistics and does not update them."""
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _CONVERT_SYNC:
            raise TypeError(
                "SyncBatchNorm.convert_sync_batchnorm would unfreeze this layer, whose statistics are frozen: a frozen "
                "layer has nothing to synchronize; convert first and freeze then, or unfreeze it"
            )
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    def reset_running_stats(self) -> None:
        """Do nothing; `torch.optim.swa_utils.update_bn` calls this."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which calls this first: its code has a `training` that train() sets."""
        raise TypeError(
            f"torch.jit.script would unfreeze {type(self).__name__}, whose statistics are frozen: "
            "use torch.export, torch.compile or torch.jit.trace, or unfreeze it"
        )


@cache
def frozen_class(cls: type[Any]) -> type[nn.Module]:
    """The subclass with frozen statistics of a batch norm's class, listed in `FROZEN`."""
    members: dict[str, Any] = {"__qualname__": f"Frozen{cls.__name__}"}
    if cls in runtime.LAYERS:
        members[runtime.TAIL] = runtime.defer_layer
    frozen = subclass(cls, (_Frozen,), members, frozen_class)
    FROZEN[frozen] = cls
    return frozen


@cache
def folded_class(cls: type[Any]) -> type[nn.Module]:
    """The subclass of a batch norm's class that is frozen, and that the map before it applies; listed in `FROZEN`."""
    members: dict[str, Any] = {"__qualname__": f"Folded{cls.__name__}"}
    if cls in runtime.LAYERS:
        members[runtime.TAIL] = runtime.defer_layer
    folded = subclass(cls, (mixin_of(cls), _Frozen), members, folded_class)
    FROZEN[folded] = cls
    return folded


for _cls in (*STOCK, *OURS):
    frozen_class(_cls)
    folded_class(_cls)
