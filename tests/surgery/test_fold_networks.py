"""Networks of transformers with random weights and perturbed statistics, stock and converted."""

from __future__ import annotations

import copy

import pytest
import torch
from folds import moved, norms, perturbed

import batchnorm as bn
from batchnorm.surgery.fold import fold

pytest.importorskip("transformers")

from batchnorm.bench.networks import MODELS

HOW = pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
NAMES = pytest.mark.parametrize(("name", "count"), [("ResNet-50", 53), ("MobileNetV2", 52), ("EfficientNet-B0", 49)])


@pytest.mark.slow
@HOW
@NAMES
@torch.no_grad()
def test_a_network_agrees_to_five_digits(name: str, count: int, converted: bool) -> None:
    torch.manual_seed(0)
    model, x = perturbed(MODELS[name].build()), torch.randn(2, 3, 64, 64)
    expected, other = model(x), copy.deepcopy(model)
    if converted:
        assert bn.convert(model).converted == count
    record = fold(model, x)
    assert (len(record.layers), record.skipped, record.rounding) == (count, (), None)
    assert record.max_error < 1e-5
    assert moved(expected, model(x)) < 1e-5
    assert norms(model) == []
    strict = fold(other, x, bound=1e-9)
    assert strict.layers == ()
    assert torch.equal(other(x), expected)


@pytest.mark.slow
@HOW
@NAMES
@torch.no_grad()
def test_a_network_that_makes_much_of_its_images_is_as_exact_as_it_was(name: str, count: int, converted: bool) -> None:
    """With statistics that fit, the images reach the output, and so does rounding: MobileNetV2's by some 3e-5."""
    torch.manual_seed(1 if name == "ResNet-50" else 2)
    model, x = MODELS[name].build(), torch.randn(8, 3, 64, 64)
    for layer in norms(model):
        layer.momentum = None
    model.train()(x)
    perturbed(model, 2)
    expected = model(x)
    assert expected.std(0).mean() / expected.abs().max() > 1e-2
    truth = copy.deepcopy(model).double()(x.double())
    if converted:
        bn.convert(model)
    record = fold(model, x)
    assert len(record.layers) == count, record
    assert (record.rounding is not None) == (record.bound > 1e-5)
    assert moved(truth, model(x).double()) < 2 * moved(truth, expected.double()) + 1e-6
