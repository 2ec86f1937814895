"""A published ResNet-20 on CIFAR-10: which data to recalibrate on, and what a metric is for.

Skipped where the checkpoint and the images are not at hand: $BATCHNORM_DATA/cifar10.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.compare import compare
from batchnorm.surgery.recalibrate import recalibrate
from batchnorm.surgery.undo import undo


def _example() -> Any:
    """examples/resnet20.py as a module."""
    spec = importlib.util.spec_from_file_location("resnet20", Path(__file__).parents[2] / "examples" / "resnet20.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["resnet20"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


resnet20 = _example()
augmented, normalized, low_contrast = resnet20.augmented, resnet20.normalized, resnet20.low_contrast
WHERE = resnet20.folder()
pytestmark = pytest.mark.skipif(WHERE is None, reason="no cifar10 data: set BATCHNORM_DATA")

Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def published() -> tuple[nn.Module, Any]:
    assert WHERE is not None
    return resnet20.load(WHERE)


def percent(images: Any, change: Change = lambda x: x, most: int = 932) -> Callable[[nn.Module], float]:
    """How many of the test images a model gets right."""
    x, labels = normalized(change(images.test[:most])), images.labels[:most]

    def metric(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((model(x).argmax(1) == labels).float().mean())

    return metric


@pytest.mark.slow
@pytest.mark.parametrize("converted", [False, True])
def test_plain_images_hurt_and_the_metric_keeps_the_old_statistics(
    published: tuple[nn.Module, Any], converted: bool
) -> None:
    """It was trained on augmented images: statistics of plain ones are of another domain."""
    model, images = copy.deepcopy(published[0]), published[1]
    if converted:
        bn.convert(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record = recalibrate(model, normalized(images.train[:500]).split(100), exact=False, metric=percent(images))
    assert record.metric_before == pytest.approx(91.63, abs=0.01)
    assert 85 < record.metric_after < 90
    assert record.kept == "before"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_images_as_in_training_do_not_hurt(published: tuple[nn.Module, Any]) -> None:
    model, images = copy.deepcopy(published[0]), published[1]
    batches = normalized(augmented(images.train[:500])).split(100)
    record = recalibrate(model, batches, exact=False, metric=percent(images))
    assert record.metric_after > 90
    assert max(layer.moved_median for layer in record.layers) < 0.1


@pytest.mark.slow
def test_a_shift_is_healed_exactly(published: tuple[nn.Module, Any]) -> None:
    """Less contrast, layer after layer: the statistics do not depend on the split."""
    model, images = copy.deepcopy(published[0]), published[1]
    metric = percent(images, low_contrast, 300)
    other = copy.deepcopy(model)
    x = normalized(low_contrast(images.train[:200]))
    record = recalibrate(model, x.split(100), metric=metric)
    assert record.metric_before < 75
    assert record.metric_after > 80
    assert (record.kept, record.passes) == ("after", 19)
    recalibrate(other, x.split([7, 93, 100]))
    for name, tensor in other.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_lost_statistics_are_restored(published: tuple[nn.Module, Any]) -> None:
    model, images = copy.deepcopy(published[0]), published[1]
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    assert {layer.reason for layer in compare(model, normalized(images.test[:64])).layers} == {"never-trained"}
    batches = normalized(augmented(images.train[:500])).split(100)
    record = recalibrate(model, batches, exact=False, metric=percent(images))
    assert record.metric_before < 15
    assert record.metric_after > 90


def test_compare_distinguishes_training_images_from_others(published: tuple[nn.Module, Any]) -> None:
    model, images = published
    alike = compare(model, normalized(augmented(images.train[:128])))
    assert alike.guilty == ()
    assert len(alike.layers) == 19
    for batch in (images.train[:128], low_contrast(images.train[:128])):
        first = compare(model, normalized(batch)).layers[0]
        assert (first.name, first.reason) == ("bn1", "other-domain")


def test_undone_it_is_the_network_without_norms(published: tuple[nn.Module, Any]) -> None:
    model, images = copy.deepcopy(published[0]), published[1]
    x = normalized(images.train[:100])
    plain = copy.deepcopy(model)
    for block in plain.modules():
        for name, child in list(block.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(block, name, nn.Identity())
    record = undo(model, x.split(50))
    assert len(record.layers) == 19
    with torch.no_grad():
        expected = plain(x)
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_adapt_helps_with_less_contrast(published: tuple[nn.Module, Any]) -> None:
    model, images = published
    before = copy.deepcopy(model.state_dict())
    alone, leaning = (resnet20.adapted(model, images, low_contrast, prior) for prior in (float("inf"), 64))
    assert alone == pytest.approx(66.09, abs=0.5)
    assert leaning > 90
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
