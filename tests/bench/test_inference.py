"""Inference of a whole network beside its conversion and its fold: the gate, and that all see the same."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.bench import models
from batchnorm.bench.models import Workload
from batchnorm.bench.networks import CLASSES, Model
from batchnorm.records import Skipped
from batchnorm.surgery.fold import Folding, fold


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def measured(convert=bn.convert, fold=fold):
    return models.measure_inference(network(), convert, torch.randn(2, 3, 8, 8), rounds=3, seed=0, fold=fold)


@pytest.mark.slow
def test_all_are_timed_and_agree():
    found = measured()
    assert found["gate"] == {"passed": True, "errors": []}
    sides = {"stock", "ours", "folded", "one primitive"}
    assert {name: side["rounds"] for name, side in found["contenders"].items()} == dict.fromkeys(sides, 3)
    assert set(found["ratio"]) == sides - {"folded"}
    assert (found["folded"], found["left"]) == (1, None)
    assert max(found["difference"].values()) < 1e-5


@pytest.mark.slow
def test_the_stock_network_is_only_read():
    stock = network()
    before = copy.deepcopy(stock.state_dict())
    models.measure_inference(stock, bn.convert, torch.randn(2, 3, 8, 8), rounds=3, seed=0)
    assert type(stock[1]) is nn.BatchNorm2d
    assert all(torch.equal(before[key], value) for key, value in stock.state_dict().items())


def spoiled(model):
    bn.convert(model)
    model[0].weight.mul_(1.01)


def wrong(model, images):
    record = fold(model, images)
    model[0].bias.add_(0.01)
    return record


def left(model, images):
    return Folding((), (Skipped("1", "BatchNorm2d", "it has hooks"),), 0.0, 0.0, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "words"),
    [
        ({"convert": spoiled}, "ours: the outputs differ by "),
        ({"fold": wrong}, "folded: the outputs differ by "),
    ],
    ids=["ours", "folded"],
)
def test_what_is_wrong_is_not_timed(sides, words):
    found = measured(**sides)
    assert not found["gate"]["passed"]
    assert [error.startswith(words) for error in found["gate"]["errors"]] == [True]
    assert "contenders" not in found


@pytest.mark.slow
def test_layers_that_no_fold_can_absorb_are_left_and_the_rest_is_timed():
    found = measured(fold=left)
    assert found["gate"]["passed"]
    assert (found["folded"], found["left"]) == (0, "it has hooks")
    assert set(found["contenders"]) == {"stock", "ours", "folded", "one primitive"}


@pytest.mark.slow
def test_it_is_part_of_what_models_measures():
    tiny = {"tiny": Model(network, (4, 3, 8, 8), (4, 3, 8, 8))}
    found = models.measure(Workload("tiny", "channels_last", (4, 3, 8, 8)), rounds=3, seed=0, networks=tiny)
    assert found["inference"]["gate"]["passed"]
    assert found["inference"]["folded"] == found["layers"]["all"] == 1
