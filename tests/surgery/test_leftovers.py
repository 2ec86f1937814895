"""fold(leftover=...): norms without a neighbour become what exporters accept, with the same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from folds import moved, perturbed
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.fold import Affine
from libraries import InPlaceABN, filled
from randomness import SEED


class Densely(nn.Module):
    """As in DenseNet, the second norm comes after a concatenation, and the third one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.third = bn.BatchNorm2d(7, act="relu"), nn.BatchNorm2d(7, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.cat([x, self.first(self.conv(x))], 1))
        return self.third(self.third(y) + 1)


def densely() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(SEED)
    return perturbed(Densely()), torch.randn(4, 3, 6, 6)


@pytest.mark.parametrize(("how", "cls"), [("affine", Affine), ("depthwise", nn.Conv2d)])
def test_norms_without_a_neighbour_are_replaced(how: str, cls: type[nn.Module]) -> None:
    model, x = densely()
    expected = model(x)
    record = bn.fold(copy.deepcopy(model), x)
    assert [layer.name for layer in record.layers] == ["first"]
    record = bn.fold(model, x, leftover=how)
    assert [(layer.name, layer.into, layer.became) for layer in record.layers] == [
        ("first", "conv", None),
        ("second", "second", how),
        ("third", "third", how),
    ]
    assert not record.skipped
    assert str(record).startswith("1 of 3 batch norm layers folded, 2 replaced; ")
    assert moved(expected, model(x)) < 1e-5
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert [type(module) for module in model.second] == [cls, nn.ReLU]
    assert type(model.third) is cls


def test_rows_of_two_dimensions_are_affine_only() -> None:
    model, x = perturbed(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))), torch.randn(8, 3)
    expected = model(x)
    (skipped,) = bn.fold(model, x, leftover="depthwise").skipped
    assert 'use leftover="affine"' in skipped.why
    assert len(bn.fold(model, x, leftover="affine").layers) == 1
    assert moved(expected, model(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["affine", "depthwise"])
def test_other_types(dtype: torch.dtype, how: str) -> None:
    model, x = densely()
    model, x = model.to(dtype), x.to(dtype)
    expected = model(x)
    assert len(bn.fold(model, x, leftover=how).layers) == 3
    assert model(x).dtype == expected.dtype == dtype
    assert moved(expected, model(x)) < (1e-12 if dtype == torch.float64 else 6e-2)


def test_a_norm_that_writes_to_its_input() -> None:
    model, x = nn.Sequential(nn.ReLU(), filled(InPlaceABN(3))).eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = model(x.clone())
        assert len(bn.fold(model, x, leftover="affine").layers) == 1
        assert moved(expected, model(x.clone())) < 1e-5


def test_a_norm_that_cannot_be_replaced_stays_and_the_record_says_why() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unused, self.hooked = bn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.hooked.register_forward_hook(lambda *_: None)
            self.bad = nn.BatchNorm2d(3)
            with torch.no_grad():
                self.bad.running_var.fill_(-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.hooked(self.norm(x, x)) + self.bad(x).nan_to_num()

    model = Residual().eval()
    record = bn.fold(model, torch.randn(2, 3, 4, 4), leftover="affine")
    assert not record.layers
    assert {layer.name: layer.why.split(":")[0] for layer in record.skipped} == {
        "norm": "it is called with a residual",
        "unused": "it is never called",
        "hooked": "it has hooks, or a replaced forward or call",
        "bad": "running_var + eps is not positive",
    }


def test_the_model_is_restored_over_the_bound_and_other_words_raise() -> None:
    model, x = densely()
    before = model(x)
    record = bn.fold(model, x, leftover="affine", bound=1e-12)
    assert not record.layers
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="leftover must be None"):
        bn.fold(model, x, leftover="conv")
