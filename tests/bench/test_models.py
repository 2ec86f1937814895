"""Whole training steps, on a small network of torch.nn's layers and a stand-in for the conversion."""

import copy
from types import SimpleNamespace

import pytest
from torch import nn

import batchnorm as bn
from batchnorm.bench import models
from batchnorm.bench.models import Workload
from batchnorm.bench.networks import CLASSES, MODELS, Model


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def convert(model, fuse=True):
    """As batchnorm.convert does: in place, and it returns how many layers there were."""
    model[1] = bn.BatchNorm2d(8, act="relu" if fuse else None)
    if fuse:
        model[2] = nn.Identity()
    return SimpleNamespace(layers=[model[1]], converted=1, fused=1)


def spoil(model, fuse=True):
    """Only what is fused is wrong."""
    conversion = convert(model, fuse)
    if fuse:
        model[1].weight.data.mul_(1.01)
    return conversion


def spoil_gradient(model, fuse=True):
    conversion = convert(model, fuse)
    if fuse:
        model[0].weight.register_hook(lambda gradient: 2 * gradient)
    return conversion


SHAPE = (4, 3, 8, 8)
TINY = {"tiny": Model(network, SHAPE, SHAPE)}


def measure(change, layout="channels_last", **options):
    return models.measure(Workload("tiny", layout, SHAPE), change, rounds=3, seed=0, networks=TINY, **options)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_network_has_the_same_losses(layout):
    found = measure(convert, layout)
    assert found["loss"]["agree"] == {"ours": True, "ours unfused": True}
    assert found["excluded"] == {}
    assert found["loss"]["steps"] == len(found["losses"]["ours"]) == 3 + 2 + 1
    assert found["loss"]["noise"] < 1e-3
    assert found["layers"] == {"all": 1, "converted": 1, "fused": 1}
    assert set(found["ratios"]) == {"ours", "ours unfused"}
    assert all(set(ratio) == {"whole", "forward", "backward"} for ratio in found["ratios"].values())
    assert {name: side["rounds"] for name, side in found["contenders"].items()} == dict.fromkeys(
        ("stock", "ours", "ours unfused", "bare"), 3
    )
    assert found["gain_share"] == models.gain_share(found["ratios"]["ours"]["whole"], found["at_most"])


@pytest.mark.slow
def test_steps_in_bfloat16_agree_but_for_bfloat16s_last_digit():
    workload = Workload("tiny", "channels_last", SHAPE, "bfloat16")
    found = models.measure(workload, convert, rounds=3, seed=0, networks=TINY)
    assert found["excluded"] == {}
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
@pytest.mark.parametrize(("change", "least"), [(spoil, 1e-4), (spoil_gradient, 1e-4)])
def test_a_contender_with_other_losses_has_no_time(change, least):
    found = measure(change)
    assert found["loss"]["agree"] == {"ours": False, "ours unfused": True}
    assert found["loss"]["difference"]["ours"] > least
    assert found["excluded"]["ours"].startswith("its losses differ by ")
    assert found["gain_share"] is None
    for part in ("contenders", "ratios"):
        assert "ours" not in found[part]
        assert "ours unfused" in found[part]


@pytest.mark.slow
def test_what_torch_compile_cannot_compile_is_recorded_and_the_others_are_timed(monkeypatch):
    class Refused(nn.Conv2d):
        def forward(self, images):
            raise RuntimeError("\nno kernel for this\nand a long explanation")

    def compiled(network):
        return copy.deepcopy(network) if type(network[1]) is nn.BatchNorm2d else Refused(3, 8, 1)

    monkeypatch.setattr(models, "compiled", compiled)
    found = measure(convert, compile=True)
    assert found["excluded"] == {"ours compiled": "torch.compile failed: no kernel for this"}
    assert set(found["ratios"]) == {"ours", "ours unfused", "compile"}
    assert "ours compiled" not in found["losses"]
    assert found["loss"]["agree"]["compile"]


def test_other_contenders_must_run(monkeypatch):
    def broken(model, fuse=True):
        conversion = convert(model)
        model[0].forward = None
        return conversion

    with pytest.raises(TypeError):
        measure(broken)


def test_ctrl_c_is_seen_between_the_first_steps():
    with pytest.raises(KeyboardInterrupt):
        measure(convert, stop=lambda: True)


@pytest.mark.parametrize(
    ("ratio", "at_most", "share"),
    [(1.2, (1.3, 1.4), 0.5), (0.9, (1.05, 1.1), -1.0), (1.1, (1.0, 1.0), None), (1.1, (0.9, 1.2), None)],
)
def test_the_share_of_the_possible_gain_is_given_where_there_is_one(ratio, at_most, share):
    found = models.gain_share({"median": ratio}, dict(zip(("q1", "median"), at_most, strict=True)))
    assert found == (share if share is None else pytest.approx(share))


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

    def note(model, fuse=True):
        given.append(model)
        return convert(model, fuse)

    measure(note)
    trained, unfused, inferring = given
    assert all(p.grad is not None for p in unfused.parameters())
    assert all(p.grad is not None for p in trained.parameters())
    assert not inferring.training


@pytest.mark.slow
def test_a_fused_layer_saves_no_more_activations_memory():
    saved = measure(convert)["saved_bytes"]
    assert 0 < saved["ours"] <= saved["stock"]


def test_what_models_times():
    names = [w.name for w in models.workloads(quick=False)]
    assert names[0] == "MobileNetV2 contiguous 16x3x224x224"
    assert names[-1] == "U-Net 3-d channels_last_3d 2x1x64x64x64"
    assert len(names) == len(set(names)) == 16
    assert {w.model for w in models.workloads(quick=True)} == set(MODELS)
    assert all(w.shape == MODELS[w.model].quick for w in models.workloads(quick=True))


@pytest.mark.slow
def test_the_real_conversion_fuses_and_the_losses_stay():
    found = measure(bn.convert)
    assert found["layers"] == {"all": 1, "converted": 1, "fused": 1}
    assert found["excluded"] == {}
