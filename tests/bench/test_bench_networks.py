"""The networks of the bench: their outputs, their layers, and what is left of them without norms and activations."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from batchnorm.bench import models, networks
from batchnorm.bench.networks import MODELS
from batchnorm.bench.record import BenchError
from randomness import SEED

FACTS = {
    "MobileNetV2": (3_504_872, 52),
    "ResNet-18": (11_173_962, 20),
    "ResNet-50": (25_557_032, 53),
    "EfficientNet-B0": (5_288_548, 49),
    "DenseNet-121": (7_978_856, 121),
    "RegNetY-400MF": (4_344_144, 53),
    "audio": (1_465_603, 13),
    "tabular": (846_858, 4),
    "U-Net 3-d": (339_620, 10),
}
"""Parameters and batch norm layers. Those from the literature are torchvision's; ResNet-18 is that for 32² images."""

from_papers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
every = pytest.mark.parametrize("name", [pytest.param(name, marks=from_papers) for name in MODELS])


def built(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return MODELS[name].build()


def batch(name: str, count: int = 4) -> torch.Tensor:
    return torch.randn(count, *MODELS[name].quick[1:])


@every
@torch.no_grad()
def test_each_has_the_papers_size_and_sees_its_inputs(name):
    network = built(name)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    assert (sum(p.numel() for p in network.parameters()), len(norms)) == FACTS[name]
    logits = network.train()(batch(name))
    places = MODELS[name].quick[2:] if name == "U-Net 3-d" else ()
    assert logits.shape == (4, MODELS[name].classes, *places)
    assert logits.std(0).mean() > 1e-2, "logits that do not depend on the inputs compare nothing"


@from_papers
@torch.no_grad()
def test_the_pooling_of_efficientnet_is_what_it_was():
    network = built("EfficientNet-B0").eval()
    images = batch("EfficientNet-B0")
    pooled = network(images)
    network.network.efficientnet.pooler = nn.AvgPool2d(1280, ceil_mode=True)
    torch.testing.assert_close(network(images), pooled)


@every
def test_every_norm_is_converted(name):
    conversion = bn.convert(built(name))
    assert conversion.converted == len(conversion.layers) == FACTS[name][1]


class Operators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__.removesuffix("_"))
        return function(*args, **kwargs or {})


NO_LONGER = {"relu", "hardtanh", "silu", "hardswish", "leaky_relu", "native_batch_norm", "cudnn_batch_norm"}


@every
@torch.no_grad()
def test_the_bare_network_runs_neither_norms_nor_activations(name):
    with Operators() as stock:
        built(name)(batch(name, 2))
    with Operators() as bare:
        models.bare(built(name))(batch(name, 2))
    assert stock.names & NO_LONGER
    assert not bare.names & NO_LONGER
    assert {"convolution", "addmm"} & bare.names


@from_papers
def test_activations_of_transformers_are_bare_too():
    from transformers.activations import ACT2FN

    network = nn.Sequential(nn.Linear(3, 3), ACT2FN["silu"], ACT2FN["gelu_new"], nn.Hardswish(), nn.Sigmoid())
    kinds = [type(module) for module in models.bare(network)]
    assert kinds == [nn.Linear, nn.Identity, nn.Identity, nn.Identity, nn.Sigmoid]


@every
def test_the_layouts_are_those_of_the_inputs_dimensions(name):
    last = {4: ("channels_last",), 5: ("channels_last_3d",)}.get(len(MODELS[name].shape), ())
    assert MODELS[name].layouts == ("contiguous", *last)
    assert len(MODELS[name].quick) == len(MODELS[name].shape)
    assert set(MODELS[name].layouts) <= set(networks.LAYOUTS)


def test_labels_have_a_class_for_each_voxel():
    workload = models.Workload("U-Net 3-d", "channels_last_3d", MODELS["U-Net 3-d"].quick)
    network = built("U-Net 3-d")
    for inputs, labels in models._batches(workload, network, 4):
        assert labels.shape == (inputs.shape[0], *inputs.shape[2:])
        assert inputs.is_contiguous(memory_format=torch.channels_last_3d)
        assert 0 <= labels.min() <= labels.max() < 4
    assert network.training
    assert all(int(m.num_batches_tracked) == 0 for m in network.modules() if isinstance(m, nn.BatchNorm3d))


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(networks, "import_module", missing)
    with pytest.raises(BenchError, match=r'pip install "batchnorm\[bench\]"'):
        MODELS["ResNet-50"].build()
