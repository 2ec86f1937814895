"""Whole training steps, on a small network of torch.nn's layers and a stand-in for the conversion."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.bench import models
from batchnorm.bench.models import Workload
from batchnorm.bench.record import BenchError


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, models.CLASSES),
    )  # fmt: skip


def convert(model):
    """As batchnorm.convert does: in place, and it returns how many layers there were."""
    model[1], model[2] = bn.BatchNorm2d(8, act="relu"), nn.Identity()
    return SimpleNamespace(layers=[model[1]], converted=1, fused=1)


def spoil(model):
    conversion = convert(model)
    model[1].weight.data.mul_(1.01)
    return conversion


def measure(change, layout="channels_last"):
    return models.measure(Workload("tiny", layout, 4, 8), change, rounds=3, seed=0, networks={"tiny": network})


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_network_has_the_same_losses(layout):
    found = measure(convert, layout)
    assert found["loss"]["agree"]
    assert found["loss"]["steps"] == len(found["losses"]["ours"]) == 3 + 2
    assert found["loss"]["noise"] < 1e-3
    assert found["layers"] == {"all": 1, "converted": 1, "fused": 1}
    assert set(found["ratio"]) == {"whole", "forward", "backward"}
    assert {name: side["rounds"] for name, side in found["contenders"].items()} == {"ours": 3, "stock": 3, "bare": 3}


@pytest.mark.slow
def test_steps_in_bfloat16_agree_but_for_bfloat16s_last_digit():
    found = models.measure(
        Workload("tiny", "channels_last", 4, 8, "bfloat16"), convert, rounds=3, seed=0, networks={"tiny": network}
    )
    assert found["loss"]["agree"]
    assert found["dtype"] == "bfloat16"
    full = measure(convert)
    assert found["losses"]["stock"] != full["losses"]["stock"]


@pytest.mark.slow
def test_the_bare_network_has_no_norm_and_no_activation_and_the_stock_one_keeps_them():
    stock = network()
    kinds = [type(module) for module in models.bare(stock)]
    assert kinds == [nn.Conv2d, nn.Identity, nn.Identity, nn.Dropout, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert [type(module) for module in stock][1:3] == [nn.BatchNorm2d, nn.ReLU]
    found = measure(convert)
    assert found["at_most"]["median"] > 0
    assert "bare" not in found["losses"]


@pytest.mark.slow
def test_another_network_has_not():
    found = measure(spoil)
    assert not found["loss"]["agree"]
    assert found["loss"]["difference"] > 1e-4


def test_losses_that_are_no_numbers_never_agree():
    nan = float("nan")
    assert models._largest([1.0, nan], [1.0, 2.0]) == float("inf")
    assert not models.agree(float("inf"), float("inf"), [1.0])
    assert models.agree(1e-6, 1e-6, [7.0])
    assert not models.agree(1e-2, 1e-6, [7.0])


@pytest.mark.slow
def test_both_networks_learn_by_themselves():
    """The conversion is given a copy: the stock network's weights are not the converted one's."""
    given = []

    def note(model):
        given.append(model)
        return convert(model)

    measure(note)
    trained, inferring = given
    assert all(p.grad is not None for p in trained.parameters())
    assert not inferring.training


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    images = torch.randn(2, 3, 8, 8)
    layer = nn.Conv2d(3, 4, 1, bias=False)
    assert models.saved_bytes(layer, images) == images.nbytes
    squared = nn.Sequential(layer, nn.ReLU(), nn.ReLU())
    hidden = 2 * 4 * 8 * 8 * 4
    assert models.saved_bytes(squared, images) == images.nbytes + 2 * hidden
    twice = torch.nn.Module()
    twice.forward = lambda x: (x * x.detach()) * x
    assert models.saved_bytes(twice, images.requires_grad_()) == 2 * images.nbytes


@pytest.mark.slow
def test_a_fused_layer_saves_no_more_activations_memory():
    saved = measure(convert)["saved_bytes"]
    assert 0 < saved["ours"] <= saved["stock"]


def test_what_models_times():
    names = [w.name for w in models.workloads(quick=False)]
    assert names[0] == "ResNet-50 contiguous 16x3x224x224"
    assert len(names) == len(set(names)) == 6
    assert all(w.side < 224 for w in models.workloads(quick=True))


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(models, "import_module", missing)
    with pytest.raises(BenchError, match=r'pip install "batchnorm\[bench\]"'):
        models.NETWORKS["ResNet-50"]()


@pytest.mark.slow
def test_the_real_conversion_fuses_and_the_losses_stay():
    found = measure(bn.convert)
    assert found["layers"] == {"all": 1, "converted": 1, "fused": 1}
    assert found["loss"]["agree"]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    ("name", "parameters", "norms"),
    [("ResNet-50", 25_557_032, 53), ("MobileNetV2", 3_504_872, 52), ("EfficientNet-B0", 5_288_548, 49)],
)
def test_the_networks_are_the_papers_and_see_their_images(name, parameters, norms):
    built = models.NETWORKS[name]()
    assert sum(p.numel() for p in built.parameters()) == parameters
    assert sum(type(m) is nn.BatchNorm2d for m in built.modules()) == norms
    with torch.no_grad():
        logits = built.train()(torch.randn(4, 3, 64, 64))
    assert logits.shape == (4, models.CLASSES)
    assert logits.std(0).mean() > 1e-2, "logits that do not depend on the images compare nothing"
