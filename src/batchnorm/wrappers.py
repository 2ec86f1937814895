"""The model that its user knows, inside of torch.compile's and the parallel wrappers."""

from __future__ import annotations

import sys

from torch import nn

_INSIDE = ("_orig_mod", "module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the parallel wrappers: its layers have the names that their user knows.

    It runs on one device and without other processes, so that a forward can be left halfway.
    """
    wrappers: list[type] = [nn.DataParallel, nn.parallel.DistributedDataParallel]
    compiled = compiled_class()
    if compiled is not None:
        wrappers.append(compiled)
    while isinstance(model, tuple(wrappers)):
        model = next(model._modules[name] for name in _INSIDE if name in model._modules)  # type: ignore[assignment]
    return model


def compiled_class() -> type | None:
    """The class of what torch.compile returns; None where nothing can have been compiled.

    To import the compiler takes a second, and while another thread does it, its module is there without the class.
    """
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
