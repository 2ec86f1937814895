"""Find the batch norm layers that a tool changes, and those that it skips, each with the reason.

Tools change torch.nn's BatchNorm1d, 2d, 3d and SyncBatchNorm, this package's layers with one set of running statistics,
frozen layers, and those of other libraries that have a row in `batchnorm.variants.libraries`. A subclass may override
forward: it is skipped, unless the caller lists it in `also`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._contextlib
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm import layers as ours
from batchnorm.records import Skipped
from batchnorm.surgery._shared.norm import FROZEN, Norm
from batchnorm.variants import DOMAINS, EVAL_ONLY, ONE_SET
from batchnorm.variants.libraries import (
    TORCH,
    Kind,
    equals_batch_norm,
    kind_of,
    line_to_register,
    looks_like_batch_norm,
    why_not_batch,
)


def has_generated_code(module: nn.Module) -> bool:
    """Whether a module runs other code than its Python class: TorchScript or torch.fx."""
    return isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule)


def paths(model: nn.Module, prefix: str = "", above: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every name of every module, parents before children; recursive modules are entered once."""
    if model in above:
        return
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None:
            yield from paths(child, f"{prefix}.{name}" if prefix else name, (*above, model))


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of a model with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in paths(model):
        names.setdefault(module, []).append(name)
    return names


def children_first(model: nn.Module) -> list[nn.Module]:
    """Every module once, after those inside it."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        if module not in seen:
            seen.add(module)
            for child in module._modules.values():
                if child is not None:
                    yield from visit(child)
            yield module

    return list(visit(model))


STOCK: tuple[type, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
OURS: tuple[type[Any], ...] = ONE_SET

_TOOLS = tuple(f"{Path(__file__).parents[2] / folder}{os.sep}" for folder in ("surgery", "merging"))
_INTERNAL_FILES = (*_TOOLS, torch.utils._contextlib.__file__, contextlib.__file__)  # torch.no_grad() as a decorator

# Modules that return new memory, which no other code can change.
FRESH: frozenset[type[nn.Module]] = frozenset(
    {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
)

# The class attribute of a class made by `convert` that has the original class.
ORIGINAL = "_batchnorm_original"


def warn_of_none(which: str = "batch norm layer") -> None:
    """Warn that a tool found no layer: most likely it was called with the wrong model.

    The warning names the tool and points at the caller's line, outside of this package, decorators and context
    managers.
    """
    frame, level, tool = sys._getframe(), 1, ""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL_FILES):
        if frame.f_code.co_filename.startswith(_TOOLS):
            tool = frame.f_code.co_name
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{tool} found no {which} in it", UserWarning, level)


UNTRACKED = "it has no running statistics: it normalizes by each batch, in eval mode too"

# Why a tool skips a layer: a condition of the layer and the model, and the reason in words.
_Reason = tuple[Callable[[Norm, nn.Module], bool], str]

_FROZEN: _Reason = (lambda norm, _: norm.is_frozen, "frozen: unfreeze it first")
_CONSTANT: _Reason = (
    lambda norm, _: norm.is_constant,
    "frozen by its class: its statistics, gamma and beta are constants",
)
_REPLACED: _Reason = (lambda norm, _: "forward" in vars(norm.layer), "its forward is replaced on the instance")
_ATTRIBUTES = ("num_features", "momentum", "affine", "track_running_stats", "num_batches_tracked", "weight", "bias")
# Replaced alone, it would train differently from the rest of its layer.
_PART: _Reason = (lambda norm, model: _is_part(norm, model), "it is a part of a layer of another library")
# Why this package's layers, or torch.nn.GroupNorm, do not compute what the layer computes.
_NOT_OURS: tuple[_Reason, ...] = (
    (
        lambda norm, _: norm.kind.magnitude,
        "its scale is the magnitude of gamma, plus eps: no other layer has such a scale",
    ),
    (
        lambda norm, _: norm.kind is not TORCH and (norm.kind.gamma, norm.kind.beta) != (TORCH.gamma, TORCH.beta),
        "its parameters have other names than torch.nn's",
    ),
    (
        lambda norm, _: norm.kind is not TORCH and not all(hasattr(norm.layer, name) for name in _ATTRIBUTES),
        "it has not all attributes of torch.nn's layers",
    ),
    (lambda norm, _: norm.activation is None, "no layer of this package fuses what it computes after the norm"),
)
_UNTRACKED: _Reason = (lambda norm, _: not norm.has_statistics, UNTRACKED)
_MEASURED: tuple[_Reason, ...] = (
    _CONSTANT,
    _FROZEN,
    _UNTRACKED,
    (
        lambda norm, model: model.training and not norm.layer.training,
        "in eval mode while the model trains, so frozen by its user",
    ),
    (
        lambda norm, _: (mean := norm.tensor("mean")) is not None and mean.is_meta,
        "on the meta device: load the weights first",
    ),
    (lambda norm, model: norm.kind is not TORCH and _REPLACED[0](norm, model), _REPLACED[1]),
)

REASONS: dict[str, tuple[_Reason, ...]] = {
    "fold": (
        (
            lambda norm, _: getattr(type(norm.layer), "_batchnorm_folded", False),
            "frozen, and applied by the map before it: unfreeze it first",
        ),
    ),
    "recalibrate": _MEASURED,
    "undo": _MEASURED,
    "repair": (
        *_MEASURED,
        (lambda norm, _: norm.kind is not TORCH, "of another library: its gamma and beta may have another meaning"),
    ),
    "adapt": (_CONSTANT, _FROZEN, _UNTRACKED),
    "freeze": (_CONSTANT,),
    "pool_statistics": ((_UNTRACKED[0], "no running statistics"),),
    "compare": (
        (lambda norm, _: norm.is_frozen or norm.is_constant, "frozen: the same in both modes"),
        (_UNTRACKED[0], "it has no running statistics: both modes use the batch"),
        _MEASURED[-1],
    ),
    "sync": (
        (lambda norm, _: norm.is_frozen or norm.is_constant, "frozen: it has nothing to synchronize"),
        (
            lambda norm, _: type(norm.layer) in EVAL_ONLY or norm.kind.training == "other",
            "its training statistics are not the batch's: make it a BatchNorm first",
        ),
        _PART,
        *_NOT_OURS,
    ),
    "to_group_norm": (
        (_CONSTANT[0], "frozen by its class: no sample depends on the batch already"),
        (_FROZEN[0], "frozen: no sample depends on the batch already; unfreeze it first"),
        (lambda norm, _: norm.channels < 1, "it has no channels"),
        (
            lambda norm, _: norm.channels == 1 and not isinstance(norm.layer, nn.BatchNorm2d | nn.BatchNorm3d),
            "one channel: on (N, C) input a group would have one value, which normalizes to 0",
        ),
        _REPLACED,
        _PART,
        (lambda norm, _: norm.kind.training == "other", str(why_not_batch(Kind(training="other")))),
        *_NOT_OURS,
    ),
}
"""By tool: why it skips layers."""


def _is_part(norm: Norm, model: nn.Module) -> bool:
    """Whether a layer is inside another batch norm of the model."""
    parents = norm.name.split(".")[:-1] if norm.name else []
    layers = (model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents) + 1))
    return bool(norm.name) and any(is_norm(layer) for layer in layers)


def check_module(tool: str, model: object) -> None:
    """Raises TypeError if `model` is no torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{tool} takes a torch.nn.Module, got {type(model).__name__}: pass the model itself")


def find(
    tool: str, model: nn.Module, also: Sequence[type[nn.Module]] = (), may_be_empty: bool = False
) -> tuple[list[Norm], list[Skipped]]:
    """Every batch norm layer of a model once, in order: those to change, and those to skip with the reason.

    `tool` is the calling function, with its `REASONS`. Subclasses in `also` are not skipped.

    Warns if there is no layer at all, unless it `may_be_empty`. Raises TypeError if `model` is no torch.nn.Module, or
    `also` lists what is no class of batch norms.
    """
    check_module(tool, model)
    check_also(tool, also)
    norms, skipped = [], []
    found = False
    proved: dict[type, bool] = {}
    for module, names in names_of(model).items():
        if not is_norm(module, also):
            continue
        found = True
        kind = kind_of_layer(module, also)
        why = why_not_python(module) or (None if kind is not None else _why_unknown(module, proved))
        norm = Norm(tuple(names), module, kind or TORCH)
        if why is None:
            why = next((words for applies, words in REASONS.get(tool, ()) if applies(norm, model)), None)
        if why is None:
            norms.append(norm)
        else:
            skipped.append(Skipped(names[0], str(getattr(module, "original_name", type(module).__name__)), why))
    if not found and not may_be_empty:
        warn_of_none()
    return norms, skipped


def check_also(tool: str, also: Sequence[type[nn.Module]]) -> None:
    """Raise TypeError if `also` lists anything but classes that may be batch norms."""
    for cls in also:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or issubclass(cls, tuple(FRESH)):
            name = cls.__name__ if isinstance(cls, type) else repr(cls)
            raise TypeError(f"{tool}: also takes classes of batch norm layers, and {name} is not one")


def is_norm(module: nn.Module, also: Sequence[type[nn.Module]] = ()) -> bool:
    """Whether a module is a batch norm, known or not."""
    if isinstance(module, torch.jit.ScriptModule):
        return is_scripted_norm(module)
    known = isinstance(module, _BatchNorm) or kind_of_layer(module, also) is not None
    return known or looks_like_batch_norm(module)


def kind_of_layer(module: nn.Module, also: Sequence[type[nn.Module]] = ()) -> Kind | None:
    """The kind of a layer; None if its class is unknown, and not in `also`."""
    cls = original(plain_class(module))
    if cls in STOCK or cls in OURS:
        return TORCH
    return kind_of(cls, also)


def original(cls: type) -> type:
    """The class before `convert` replaced it, or the class itself."""
    return vars(cls).get(ORIGINAL, cls)  # type: ignore[no-any-return]


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """A layer's class before it was frozen."""
    return FROZEN.get(type(layer), type(layer))


def act_of(layer: nn.Module) -> str | None:
    """The fused activation of a layer of this package."""
    return layer.act if isinstance(layer, ours._BatchNorm) else None


def made_of(module: nn.Module, name: str) -> tuple[nn.Parameter, ...]:
    """The parameters that a module's tensor `name` is, or is computed from; empty if the module has no such tensor.

    Computed tensors: pruned (`weight_orig`), of the older weight_norm and spectral_norm (`weight_g`, `weight_v`), and
    parametrized.
    """
    parameter = module._parameters.get(name)
    if parameter is not None:
        return (parameter,)
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None and name in parametrizations._modules:
        return tuple(parametrizations._modules[name].parameters(recurse=False))  # type: ignore[union-attr]
    if name in module._parameters or not isinstance(vars(module).get(name), Tensor):
        return ()
    return tuple(p for key, p in module._parameters.items() if p is not None and key.startswith(f"{name}_"))


def why_not_python(module: nn.Module) -> str | None:
    """Why a layer's class cannot be changed: TorchScript or lazy; None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs its own compiled code"
    if isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    return None


def is_scripted_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm compiled by TorchScript."""
    return isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in str(getattr(module, "original_name", ""))


def describe_subclass(cls: type) -> str:
    """Why an unknown class is skipped, in words."""
    if "Parametrized" in cls.__name__:
        return "parametrized: its class is made by torch.nn.utils.parametrize"
    return f"a subclass of {next(base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith('torch.'))}"


def _why_unknown(module: nn.Module, proved: dict[type, bool]) -> str:
    """Why a layer of an unknown class is skipped, and what to write; `proved` has what is known of each class."""
    cls = original(plain_class(module))
    if cls in DOMAINS:
        return "it has statistics of several domains: batchnorm.keep_domain makes it a batch norm of one"
    why = describe_subclass(cls)
    if why.startswith("parametrized"):
        return why
    if cls not in proved:
        proved[cls] = equals_batch_norm(module)
    if proved[cls]:
        line = line_to_register(cls)
        return f"{why}, whose forward equals batch norm's on random input: write {line}, or list it in `also`"
    return f"{why}, which may compute something else: list it in `also` if it normalizes as its base does"
