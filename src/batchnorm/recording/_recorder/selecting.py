"""Which layers of a model a recording watches, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.recording._recorder.observed import OBSERVED, STOCK
from batchnorm.variants import DOMAINS, ONE_SET
from batchnorm.variants.libraries import (
    TORCH,
    Kind,
    equals_batch_norm,
    kind_of,
    line_to_register,
    looks_like_batch_norm,
    why_not_batch,
)


def is_norm(module: nn.Module, also: Sequence[type[nn.Module]]) -> bool:
    """Whether a module is a batch norm, known or not."""
    if isinstance(module, torch.jit.ScriptModule):
        return isinstance(module, _BatchNorm)
    return isinstance(module, _BatchNorm) or kind_of_layer(module, also) is not None or looks_like_batch_norm(module)


def kind_of_layer(module: nn.Module, also: Sequence[type[nn.Module]]) -> Kind | None:
    """The kind of a layer; None if its class is unknown, and not in `also`."""
    cls = type(module)
    if cls in OBSERVED or cls in STOCK or cls in ONE_SET:
        return TORCH
    return kind_of(vars(cls).get("_batchnorm_original", cls), also)  # the class before `convert`


def skip_reason(module: nn.Module, kind: Kind | None) -> str | None:
    """Why a layer cannot be recorded; None if it can."""
    cls = type(module)
    if getattr(cls, "_batchnorm_folded", False):
        return "frozen and folded: the convolution or linear layer before it applies it through its weights"
    if getattr(cls, "_batchnorm_frozen", False):
        return "frozen: it does not normalize by the batch's statistics"
    if kind is not None and kind.training == "batch":
        return None
    if kind is not None and kind.training == "processes":
        return f"{cls.__name__} cannot be recorded; convert the model with batchnorm.sync(model)"
    if kind is not None:
        return why_not_batch(kind)
    if isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if isinstance(module, nn.SyncBatchNorm):
        return "torch.nn.SyncBatchNorm cannot be recorded; convert the model with batchnorm.sync(model)"
    if cls in DOMAINS:
        return "it has statistics for several domains, and a recording stores those of one"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs its own compiled code"
    why = f"a subclass of {next(b.__name__ for b in cls.__mro__[1:] if b.__module__.startswith('torch.'))}"
    if "Parametrized" in cls.__name__ or not equals_batch_norm(module):
        return why
    return f"{why}, whose forward equals batch norm's: write {line_to_register(cls)}"
