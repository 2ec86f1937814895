"""average: the mean of the weights, and statistics that belong to it, in one call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import batchnorm as bn


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3), bn.BatchNorm1d(3)
    )
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1.5)
    return net


def data(seed: int = 7) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(n, 4) * 2 + n for n in (3, 9, 2)]


@pytest.mark.parametrize("weights", [None, [1, 0, 0], [1, 2, 5]])
def test_weights_are_averaged_and_statistics_measured(weights: list[float] | None) -> None:
    nets = [network(seed) for seed in range(3)]
    model = network(9)
    record = bn.average(model, [nets[0], nets[1].state_dict(), nets[2]], data(), weights=weights)
    shares = torch.tensor(weights or [1, 1, 1], dtype=torch.float64)
    for name, tensor in model.named_parameters():
        stacked = torch.stack([dict(net.named_parameters())[name].double() for net in nets])
        torch.testing.assert_close(
            tensor.double(), torch.tensordot(shares / shares.sum(), stacked, 1), rtol=1e-6, atol=1e-7
        )
    own = copy.deepcopy(model)
    bn.recalibrate(own, data())
    torch.testing.assert_close(dict(model.named_buffers()), dict(own.named_buffers()))
    assert (record.states, len(record.recalibration.layers)) == (3, 2)
    assert "averaged over 3 states" in str(record)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_story_16_averaged_models_of_torch(kind: str, use_buffers: bool) -> None:
    """timm#106, ignite#2592, lightning#8811: the average of weights with the statistics of one of them."""
    multi = get_ema_multi_avg_fn(0.5) if kind == "ema" else None
    model = network()
    averaged = AveragedModel(model, multi_avg_fn=multi, use_buffers=use_buffers)
    for seed in range(3):
        model.load_state_dict(network(seed).state_dict())
        averaged.update_parameters(model)
    wanted = copy.deepcopy(averaged.module)
    bn.recalibrate(wanted, data())
    bn.average(model, [averaged], data())
    torch.testing.assert_close(model.state_dict(), wanted.state_dict())
    bn.average(averaged, [averaged], data())
    torch.testing.assert_close(averaged.module.state_dict(), wanted.state_dict())


def test_story_17_update_bn_weighs_batches_and_not_samples() -> None:
    """pytorch/pytorch#49082: and it needs tensors or tuples where loaders give mappings."""
    norm = nn.Sequential(nn.BatchNorm1d(4))
    theirs, ours = copy.deepcopy(norm), copy.deepcopy(norm)
    values = torch.cat(data())
    update_bn(data(), theirs)
    bn.average(ours, [norm], data())
    torch.testing.assert_close(ours[0].running_var, values.var(0))
    assert not torch.allclose(theirs[0].running_var, values.var(0), rtol=0.2)
    mapped = copy.deepcopy(norm)
    bn.average(mapped, [norm], [{"input": x} for x in data()])
    torch.testing.assert_close(mapped.state_dict(), ours.state_dict())


def test_story_16_the_better_statistics_stay() -> None:
    """timm#224: there the update made it worse."""
    model, states = network(), [network(1), network(2)]
    wrong = [x * 100 for x in data()]

    def metric(net: Any) -> float:
        return -float(net[1].running_var.max())

    record = bn.average(model, states, wrong, metric=metric)
    assert record.recalibration.kept == "before"
    mean = (states[0][1].running_var + states[1][1].running_var) / 2
    torch.testing.assert_close(model[1].running_var, mean)


@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_without_batches_the_statistics_are_pooled(weights: list[float] | None) -> None:
    nets = [network(seed) for seed in range(2)]
    nets[1][1].num_batches_tracked += 5
    model, measured = network(9), network(9)
    record = bn.average(model, nets, weights=weights)
    bn.average(measured, nets, data(), weights=weights)
    for (name, tensor), other in zip(model.named_parameters(), measured.parameters(), strict=True):
        assert torch.equal(tensor, other), name
    shares = torch.tensor(weights or [1, 1], dtype=torch.float64)[:, None] / sum(weights or [1, 1])
    means, variances = (
        torch.stack([vars(net[1])["_buffers"][f"running_{name}"].double() for net in nets]) for name in ("mean", "var")
    )
    mean = (shares * means).sum(0)
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    expected = (shares * (variances + (means - mean) ** 2)).sum(0)
    torch.testing.assert_close(model[1].running_var.double(), expected, rtol=1e-6, atol=1e-6)
    assert int(model[1].num_batches_tracked) == 5
    assert record.recalibration is None
    assert "2 batch norm layers pooled over 2 states" in str(record)
    assert "pass batches to measure these" in str(record)


def test_a_state_with_share_0_does_not_count_even_if_it_is_not_finite() -> None:
    good, bad, model = network(1), network(2), network(9)
    for tensor in (*bad.parameters(), bad[1].running_mean):
        nn.init.constant_(tensor, float("nan"))
    bn.average(model, [bad, good], weights=[0, 1])
    torch.testing.assert_close(dict(model.named_parameters()), dict(good.named_parameters()))


@pytest.mark.parametrize("kind", [list, nn.ModuleList, iter])
def test_networks_without_batch_norm_need_no_batches(kind: Any) -> None:
    models = [nn.Linear(2, 2) for _ in range(3)]
    record = bn.average(models[0], kind(models))
    assert str(record) == "2 tensors averaged over 3 states"


@pytest.mark.parametrize("options", [{"metric": len}, {"exact": False}, {"forward_fn": len}])
def test_options_of_the_recalibration_need_batches(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))} is of the recalibration, which needs batches"):
        bn.average(network(), [network()], **options)


def test_statistics_that_cannot_be_pooled_leave_the_model_unchanged() -> None:
    model, bad = network(9), network(1)
    bad[1].running_var[0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1\.running_var of state 0 is not finite"):
        bn.average(model, [bad])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_import_path_of_earlier_versions() -> None:
    from batchnorm.surgery.average import Averaging, average

    assert (average, Averaging) == (bn.average, bn.Averaging)


def failing() -> Any:
    yield from data()[:1]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("states", "batches", "options", "error", "words"),
    [
        ([], data(), {}, ValueError, "at least one state"),
        ([3], data(), {}, TypeError, "state 0 must be a state dict"),
        ([{"a": 1}], data(), {}, TypeError, "state 0 must be a state dict"),
        ([network().state_dict(), {}], data(), {}, ValueError, r"state 1 is of another network: 0\.weight is missing"),
        ([nn.Linear(2, 2)], data(), {}, ValueError, r"of another network: 0\.weight is missing"),
        ([network(), network()], data(), {"weights": [1]}, ValueError, "weights must be 2 numbers"),
        ([network(), network()], data(), {"weights": [0, 0]}, ValueError, "weights must be 2 numbers"),
        ([network()], [], {}, ValueError, "there are no batches"),
        ([network()], failing(), {"exact": False}, KeyboardInterrupt, None),
    ],
)
def test_invalid_states_leave_the_model_unchanged(
    states: Any, batches: Any, options: Any, error: type[BaseException], words: str | None
) -> None:
    model = network(9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        bn.average(model, states, batches, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_takes_a_module_and_states_of_its_shapes() -> None:
    with pytest.raises(TypeError, match=r"average takes a torch\.nn\.Module, got dict"):
        bn.average({}, [], [])  # type: ignore[arg-type]
    state = network().state_dict()
    state["0.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"0\.weight has shape \(2, 2\), here \(6, 4\)"):
        bn.average(network(), [state], data())
