"""The modules of a model: each once and children first, or with every name that it is found under."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def opaque(module: nn.Module) -> str | None:
    """Why the Python class of a module is not what runs; None for an ordinary module."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs its own compiled code"
    if isinstance(module, torch.fx.GraphModule):
        return "a torch.fx graph has its own code"
    return None


def paths(model: nn.Module, prefix: str = "", above: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every name of every module, the parents' before their children's; a module inside itself is not entered again."""
    if model in above:
        return
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None:
            yield from paths(child, f"{prefix}.{name}" if prefix else name, (*above, model))


def children_first(model: nn.Module) -> list[nn.Module]:
    """Every module once, after those inside it."""
    seen: set[nn.Module] = set()
    ordered: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if module not in seen:
            seen.add(module)
            for child in module._modules.values():
                if child is not None:
                    visit(child)
            ordered.append(module)

    visit(model)
    return ordered
