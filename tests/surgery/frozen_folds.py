"""What the tests of freeze(fold=True) share: a network, and comparing it frozen and folded, outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from folds import perturbed
from torch import Tensor, nn

import batchnorm as bn
from randomness import SEED

FLAVOURS = pytest.mark.parametrize("flavour", ["stock", "ours", "converted", "converted later"])


def network(act: nn.Module | None = None, flavour: str = "stock") -> nn.Sequential:
    """Two convolutions with norms, in float64; the activation's output is the next convolution's input."""
    torch.manual_seed(SEED)
    norm = bn.BatchNorm2d if flavour == "ours" else nn.BatchNorm2d
    act = nn.ReLU() if act is None else act
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), norm(6), act),
        *(nn.Conv2d(6, 4, 3, groups=2, bias=False), norm(4), copy.deepcopy(act)),
        *(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 2)),
    )
    perturbed(model.double(), SEED)
    if flavour == "converted":
        bn.convert(model)
    return model.train()


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(shape or (4, 3, 5, 5), generator=generator, dtype=torch.float64)


def folded(model: nn.Module, example: Any = None, flavour: str = "") -> Any:
    """Fold every layer of the model; the record of what was folded."""
    record = bn.freeze(model, fold=True, example=images() if example is None else example).folding
    assert record is not None
    assert record.skipped == (), record
    if flavour == "converted later":
        bn.convert(model)
    return record


def step(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters that learn."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    y = model(*inputs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED)).to(y)
    wanted = [*inputs, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, weight)]


def assert_same(model: nn.Module, folded: nn.Module, *inputs: Tensor, tolerance: float = 1e-10) -> None:
    for old, new in zip(step(model, *inputs), step(folded, *inputs), strict=True):
        assert old.dtype == new.dtype
        assert float((old - new).abs().max()) <= tolerance * float(old.abs().max())


def frozen_and_folded(make: Callable[[], nn.Module], flavour: str = "", *example: Tensor) -> tuple[nn.Module, Any]:
    """A frozen model, and the same one folded."""
    model, other = make(), make()
    bn.freeze(model)
    folded(other, example or None, flavour)
    return model, other
