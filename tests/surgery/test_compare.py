"""train() against eval(): the layer to blame, and why."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_recalibrate import Own, Shared, images, network, same, state
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.quantities import eval_gap
from batchnorm.surgery.compare import REASONS, Comparison, compare
from batchnorm.surgery.freeze import freeze
from batchnorm.surgery.recalibrate import recalibrate


def settled(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    """A network whose statistics are those of its data, and long so."""
    model = network(seed)
    model[3] = nn.Identity()
    x = images(200)
    recalibrate(model, [x])
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.num_batches_tracked.fill_(1000)
    return model, x


def by_name(comparison: Comparison) -> dict[str, str]:
    return {layer.name: layer.reason for layer in comparison.layers}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("converted", [False, True])
def test_agreement(seed: int, converted: bool) -> None:
    model, x = settled(seed)
    if converted:
        bn.convert(model)
    found = compare(model, x)
    assert by_name(found) == {"1": "fine", "5": "fine", "9": "fine"}
    assert found.guilty == ()
    assert found.output_change < 0.05
    assert str(found).startswith("training and eval agree in all 3 batch norm layers; the model's output differs by ")


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers(seed: int) -> None:
    """By hand: the gap of each layer behind norms that normalize by the batch, and what became of the outputs."""
    model, x = settled(seed)
    torch.manual_seed(seed)
    for layer in (model[1], model[5], model[9]):
        layer.running_mean.add_(torch.randn(layer.num_features))
    found = {layer.name: layer for layer in compare(model, x).layers}
    train, eval_ = copy.deepcopy(model).double().train(), copy.deepcopy(model).double().eval()
    a = b = x.double()
    with torch.no_grad():
        for index, module in enumerate(train):
            if index in (1, 5, 9):
                values = a.transpose(0, 1).flatten(1)
                moments = [values.mean(1), values.var(1, correction=0), module.running_mean, module.running_var]
                gap = np.median(eval_gap(*(each.clone().numpy() for each in moments), 1e-5))
                assert found[str(index)].gap == pytest.approx(gap, rel=1e-4)
                assert found[str(index)].values == values.shape[1]
            a, b = module(a), eval_[index](b)
            if index in (1, 5, 9):
                change = (a - b).square().mean().sqrt() / a.square().mean().sqrt()
                assert found[str(index)].output_change == pytest.approx(float(change), rel=1e-3)
        assert compare(model, x).output_change == pytest.approx(float(change), rel=1e-3)
    assert [found[name].place for name in ("1", "5", "9")] == [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [4, 16, 200])
def test_what_chance_explains_is_the_root_of_1_5_over_m(m: int, seed: int) -> None:
    torch.manual_seed(seed)
    (layer,) = compare(nn.BatchNorm1d(2000), torch.randn(m, 2000)).layers
    assert layer.expected == pytest.approx(math.sqrt(1.5 / m), rel=0.15 if m > 4 else 0.4)
    assert layer.gap == pytest.approx(layer.expected, rel=0.35)


def test_alike_values_of_a_sample_count_as_one() -> None:
    x = torch.randn(50, 500, 1, 1).expand(-1, -1, 8, 8) + torch.randn(50, 500, 8, 8) / 100
    (layer,) = compare(nn.BatchNorm2d(500), x).layers
    assert layer.values == 3200
    assert layer.expected == pytest.approx(math.sqrt(1.5 / 50), rel=0.1)
    assert compare(nn.BatchNorm2d(500), x[:1]).layers[0].expected == pytest.approx(math.sqrt(1.5))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_nothing_changes(training: bool, converted: bool) -> None:
    model = network()
    model(images())
    model.train(training)
    model[5].eval()
    if converted:
        bn.convert(model)
    x = images()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    before, given = state(model), x.clone()
    compare(model, x, lambda m, batch: m(batch + torch.randn_like(batch) / 10))
    assert same(state(model), before)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(x, given)

    def raising(m: nn.Module, batch: Tensor) -> None:
        m(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(model, x, raising)
    assert same(state(model), before)


# ---------------------------------------------------------------------------------------------------------------------


def test_story_1_never_trained() -> None:
    """pytorch/pytorch#4741: trained with the statistics off, or never."""
    model, x = settled()
    model[5].reset_running_stats()
    found = compare(model, x)
    assert by_name(found) == {"5": "never-trained", "1": "fine", "9": "fine"}
    assert found.layers[0].why.startswith("running mean 0 and variance 1, as at the start: train")
    model[5].num_batches_tracked.fill_(7)
    model[5].momentum = 0.0
    assert "after 7 steps with momentum 0" in compare(model, x).layers[0].why


def test_story_1_too_few_steps() -> None:
    """pytorch/pytorch#5406: momentum 0.1 leaves a third of the start after ten steps."""
    model = nn.Sequential(nn.BatchNorm1d(50))
    x = torch.randn(500, 50) / 20 + 5
    for part in x.split(50):
        model(part)
    (layer,) = compare(model, x).layers
    assert layer.reason == "too-few-steps"
    assert "after 10 steps with momentum 0.1, 35% of the start (mean 0, variance 1) is left" in layer.why
    for _ in range(10):
        for part in x.split(50):
            model(part)
    (layer,) = compare(model, x).layers
    assert layer.reason == "fine"


def test_few_steps_are_not_the_reason_without_an_effect() -> None:
    """Recalibrated on a few batches, the count is low and nothing of the start is left."""
    model, x = settled()
    recalibrate(model, [x])
    found = compare(model, x + 5)
    assert found.layers[0].reason == "other-domain"
    converted = nn.BatchNorm1d(3)  # from another framework, which counts no steps
    converted.running_mean.fill_(3)
    assert compare(converted, torch.randn(300, 3)).layers[0].reason == "other-domain"


def test_story_2_tiny_batches() -> None:
    """pytorch/pytorch#100048: with two values a channel the outputs in eval are 0.7071 of those in training."""
    torch.manual_seed(0)
    population = torch.randn(100_000, 20)
    layer = nn.BatchNorm1d(20)
    recalibrate(layer, [population])
    layer.num_batches_tracked.fill_(10_000)
    pairs = population.view(-1, 2, 20)
    rms_batch = pairs.var(1, correction=0).mean(0).sqrt()
    assert (rms_batch / layer.running_var.sqrt()).mean() == pytest.approx(0.7071, abs=0.01)
    (found,) = compare(layer, pairs[0]).layers
    assert found.reason == "small-batch"
    assert "2 values per channel in 2 samples are too few to decide" in found.why
    assert "sqrt((m - 1)/m) = 0.7071 of training's" in found.why
    assert compare(layer, population[:1000]).layers[0].reason == "fine"


def test_story_3_statistics_that_are_not_finite() -> None:
    """pytorch/pytorch#1206."""
    model, x = settled()
    model[9].running_var[2] = math.nan
    model[5].running_var[0] = -1.0
    found = compare(model, x)
    assert by_name(found) == {"5": "non-finite", "9": "non-finite", "1": "fine"}
    assert found.layers[0].why == "running statistics of 1 of 5 units are not finite or negative: recalibrate"
    assert math.isnan(found.output_change)
    assert "non-finite: " in str(found)


def test_story_1_data_of_another_kind() -> None:
    """Normalized otherwise than in training: the first layer differs already."""
    model, x = settled()
    found = compare(model, x * 3 + 2)
    assert found.layers[0].name == "1"
    assert found.layers[0].reason == "other-domain"
    assert found.layers[0].gap > 0.5
    assert "from the first layer on" in found.layers[0].why
    assert found.output_change > 0.3


def test_story_1_weights_that_moved_on() -> None:
    """Loaded, averaged or trained on with the statistics of before."""
    model, x = settled()
    with torch.no_grad():
        model[4].weight.mul_(2)
    found = compare(model, x)
    assert by_name(found) == {"5": "stale", "1": "fine", "9": "fine"}
    assert "the first layer agrees: the weights changed" in found.layers[0].why
    recalibrate(model, [x])
    assert compare(model, x).guilty == ()


# ---------------------------------------------------------------------------------------------------------------------


def test_layers_that_differ_come_first() -> None:
    layers = [nn.BatchNorm1d(200) for _ in range(6)]
    model = nn.Sequential(*layers)
    x = torch.randn(400, 200)
    recalibrate(model, [x])
    layers[5].running_mean.fill_(math.inf)
    layers[4].reset_running_stats()
    layers[3].running_mean.fill_(1)
    layers[2].running_mean.fill_(2)
    found = compare(model, x)
    assert [layer.name for layer in found.layers][:4] == ["5", "4", "2", "3"]
    assert [layer.reason for layer in found.layers] == sorted(
        (layer.reason for layer in found.layers), key=REASONS.index
    )
    assert [layer.name for layer in found.guilty] == ["5", "4", "2", "3"]
    rows = str(found).splitlines()
    assert rows[0].startswith("4 of 6 batch norm layers differ between training and eval; the model's output differs")
    assert "   2  stale: 2, 3" in rows
    assert rows[rows.index("   2  stale: 2, 3") + 1].startswith("      2: the typical unit is 2 deviations off")


def test_skipped_layers_are_named() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), Own(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    )
    freeze(model[3])
    x = torch.randn(20, 3)
    found = compare(model, x, lambda m, batch: m[:4](batch))
    assert {skipped.name: skipped.why.split(":")[0] for skipped in found.skipped} == {
        "1": "it has no running statistics",
        "2": "a subclass of BatchNorm1d, whose forward equals batch norm's on random input",
        "3": "frozen",
        "4": "never called",
    }
    assert "not compared (frozen: the same in both modes): 3" in str(found)
    assert [layer.name for layer in compare(model, x, also=[Own]).layers if layer.name == "2"]
    with pytest.warns(UserWarning, match="compare found no batch norm layer in it"):
        nothing = compare(nn.Linear(3, 3), x)
    assert str(nothing).startswith("no batch norm layers to compare; the model's output differs by 0%")


def test_both_forwards_draw_the_same_random_numbers() -> None:
    layer = nn.BatchNorm1d(50)
    torch.manual_seed(0)
    x = torch.randn(1000, 50)
    assert compare(layer, x, lambda m, batch: m(batch + torch.randn_like(batch))).layers[0].output_change < 0.5


def test_a_layer_called_twice() -> None:
    model, x = Shared(), torch.randn(200, 3) * 3 + 2
    found = {layer.name: layer for layer in compare(model, x).layers}
    assert found["first"].values == 400
    assert found["second"].values == 200


def test_a_model_that_writes_to_its_input_and_outputs_of_any_kind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"y": [self.norm(x.add_(1)).relu_()], "n": torch.tensor(3), "text": "text"}

    model, x = Model(), torch.randn(500, 3)
    recalibrate(model, [x])
    model.norm.num_batches_tracked.fill_(100)
    assert compare(model, {"x": x}).output_change < 0.01
    assert compare(model, x, lambda m, batch: str(m(batch))).output_change is None


@pytest.mark.parametrize(
    ("model", "batch", "error", "message"),
    [
        (Tensor(), torch.ones(3, 3), TypeError, "compare takes a torch.nn.Module, got Tensor"),
        (nn.BatchNorm1d(3), torch.ones(1, 3), ValueError, "compare: the batch gives the layer one value per channel"),
        (nn.BatchNorm1d(3), torch.full((5, 3), math.nan), ValueError, "receives values that are not finite"),
        (nn.BatchNorm1d(3), "text", TypeError, r"pass forward_fn\(model, batch\)"),
    ],
)
def test_mistakes(model: Any, batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare(model, batch)


@pytest.mark.parametrize("constant", [5, 6, 7, 8])
def test_layers_whose_inputs_are_mostly_constant(constant: int) -> None:
    """As below pruned filters: sampling explains nothing of a unit that does not vary, and no zero is divided by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[0].weight[:constant] = 0
    x = torch.randn(64, 3, 6, 6)
    recalibrate(model, [x])
    model[1].num_batches_tracked.fill_(1000)
    (layer,) = compare(model, x).layers
    assert layer.reason == "fine"
    assert layer.gap < 0.01
    assert (layer.expected > 0) == (constant < 8)
    model[1].running_mean.add_(3.0)
    (layer,) = compare(model, x).layers
    assert layer.reason == "other-domain"
    assert math.isfinite(layer.gap)


def test_a_constant_batch() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate(model, [torch.randn(8, 3, 4, 4)])
    (layer,) = compare(model, torch.ones(8, 3, 4, 4)).layers
    assert layer.expected == 0
    assert layer.reason in REASONS
