"""pool_states: the statistics of several states are those of all their data, and what cannot be pooled is named."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study.data import load
from randomness import SEED

SIZES = (7, 2, 40, 1)


def parts(features: int = 3) -> list[Tensor]:
    generator = np.random.default_rng(SEED)
    return [torch.from_numpy(generator.normal(5 * n, n + 1.0, (n, features))) for n in SIZES]


def measured(x: Tensor) -> dict[str, Tensor]:
    """The state of a batch norm layer that saw this data; one value has no unbiased variance."""
    var = x.var(0) if len(x) > 1 else torch.full_like(x[0], 7.0)
    return {"bn.running_mean": x.mean(0), "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(len(x))}


def test_with_counts_they_are_those_of_all_values() -> None:
    data = parts()
    record = bn.pool_states([measured(x) for x in data], counts=SIZES)
    together = torch.cat(data)
    torch.testing.assert_close(record.state["bn.running_mean"], together.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(record.state["bn.running_var"], together.var(0), rtol=1e-12, atol=1e-12)
    assert int(record.state["bn.num_batches_tracked"]) == max(SIZES)
    assert "1 batch norm layer pooled over 4 states, by their counts" in str(record)


def test_counts_by_layer_and_of_numpy() -> None:
    data = parts()
    expected = bn.pool_states([measured(x) for x in data], counts=SIZES).state
    named = bn.pool_states([measured(x) for x in data], counts=[{"bn": n, "other": 3} for n in SIZES]).state
    of_numpy = bn.pool_states([measured(x) for x in data], counts=[np.int64(n) for n in SIZES]).state
    assert all(torch.equal(expected[name], named[name]) for name in expected)
    assert all(torch.equal(expected[name], of_numpy[name]) for name in expected)


def test_without_counts_the_states_have_equal_shares() -> None:
    states = [measured(x) for x in parts()]
    record = bn.pool_states(states)
    means, variances = (torch.stack([s[f"bn.running_{name}"] for s in states]) for name in ("mean", "var"))
    torch.testing.assert_close(record.state["bn.running_mean"], means.mean(0))
    torch.testing.assert_close(record.state["bn.running_var"], variances.mean(0) + means.var(0, correction=0))
    assert "without counts" in str(record)


def test_a_state_with_count_0_is_left_out_even_if_it_is_not_finite() -> None:
    data = parts()[:3]
    states = [measured(x) for x in data]
    empty = {name: torch.full_like(tensor, 99 if "num" in name else torch.nan) for name, tensor in states[0].items()}
    record = bn.pool_states([*states, empty], counts=[*SIZES[:3], 0])
    torch.testing.assert_close(record.state["bn.running_var"], torch.cat(data).var(0), rtol=1e-12, atol=1e-12)
    assert int(record.state["bn.num_batches_tracked"]) == 40


def test_means_that_are_far_from_0_lose_no_digits() -> None:
    data = [x + 1e7 for x in parts()]
    record = bn.pool_states([measured(x) for x in data], counts=SIZES)
    torch.testing.assert_close(record.state["bn.running_var"], torch.cat(data).var(0), rtol=1e-9, atol=0)


def test_the_record_says_which_layer_differs_most_and_by_how_much() -> None:
    states = [
        {"far.running_mean": torch.tensor([sign * 3.0]), "far.running_var": torch.ones(1)}
        | {"near.running_mean": torch.zeros(1), "near.running_var": torch.tensor([1 + sign * 0.5])}
        for sign in (-1, 1)
    ]
    record = bn.pool_states(states)
    assert [layer.name for layer in record.layers] == ["far", "near"]
    assert record.layers[0].mean == pytest.approx(3 / np.sqrt(10), rel=1e-4)
    assert record.layers[1].scale == pytest.approx(np.log(2) / 2, rel=1e-4)
    assert "far: means up to 0.949 deviations apart" in str(record)


def test_layers_that_stay_local() -> None:
    torch.manual_seed(SEED)
    states = [nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict() for _ in range(2)]
    record = bn.pool_states(states, keep=["2*"])
    assert list(record.state) == ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert [(layer.name, layer.why) for layer in record.skipped] == [("2", "stays local, by '2*'")]
    assert "1  layer  not pooled (stays local, by '2*'): 2" in str(record)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert model.load_state_dict(record.state, strict=False).unexpected_keys == []


def test_every_domain_is_pooled() -> None:
    torch.manual_seed(SEED)
    norms = [bn.DomainBatchNorm1d(2, domains=2) for _ in range(2)]
    for number, norm in enumerate(norms):
        with bn.domain(1):
            norm(torch.randn(8, 2) + number)
    record = bn.pool_states([nn.Sequential(norm) for norm in norms])
    expected = (norms[0].running_mean_1 + norms[1].running_mean_1) / 2
    torch.testing.assert_close(record.state["0.running_mean_1"], expected)
    assert [layer.name for layer in record.layers] == ["0 (domain 1)", "0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_pooled_in_float64(dtype: torch.dtype) -> None:
    states = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in measured(x).items()} for x in parts()]
    wide = bn.pool_states([{k: v.double() for k, v in state.items()} for state in states], counts=SIZES).state
    record = bn.pool_states(states, counts=SIZES)
    assert record.state["bn.running_var"].dtype == dtype
    torch.testing.assert_close(record.state["bn.running_var"], wide["bn.running_var"].to(dtype), rtol=0, atol=0)


def test_the_states_do_not_change_and_share_no_memory_with_the_result() -> None:
    state = measured(parts()[0])
    before = copy.deepcopy(state)
    record = bn.pool_states([state])
    for tensor in record.state.values():
        tensor.zero_()
    assert all(torch.equal(state[name], before[name]) for name in state)


def changed(**tensors: Any) -> dict[str, Tensor]:
    state = measured(parts()[0])
    for leaf, tensor in tensors.items():
        if tensor is None:
            del state[f"bn.{leaf}"]
        else:
            state[f"bn.{leaf}"] = tensor
    return state


GOOD = changed()
NAN = torch.tensor([1.0, torch.nan, 2.0])


@pytest.mark.parametrize(
    ("states", "options", "error", "words"),
    [
        ([], {}, ValueError, "pool_states needs at least one state"),
        (GOOD, {}, TypeError, "states must be a list of state dicts"),
        ([GOOD, 3], {}, TypeError, "state 1 must be a state dict"),
        ([GOOD, {}], {}, ValueError, r"state 1 has no bn\.running_mean"),
        ([{}, GOOD], {}, ValueError, r"state 0 has no bn\.running_mean"),
        ([GOOD, changed(running_var=None)], {}, ValueError, r"state 1 has no bn\.running_var"),
        ([GOOD, changed(running_mean=torch.ones(2))], {}, ValueError, r"shape \(2,\) in state 1 and \(3,\) in state 0"),
        ([changed(running_var=torch.ones(3, dtype=torch.int64))], {}, ValueError, r"type torch\.int64"),
        ([GOOD, changed(running_mean=NAN)], {}, ValueError, r"bn\.running_mean of state 1 is not finite"),
        ([GOOD, changed(running_var=NAN / 0)], {}, ValueError, r"bn\.running_var of state 1 is not finite"),
        ([GOOD, changed(running_var=-torch.ones(3))], {}, ValueError, r"bn\.running_var of state 1 is negative"),
        ([GOOD, GOOD], {"counts": [3]}, ValueError, "2 states and 1 count"),
        ([GOOD, GOOD], {"counts": 3}, TypeError, "counts must be a list"),
        ([GOOD, GOOD], {"counts": [3, 0.5]}, TypeError, r"count of state 1 must be an integer >= 0.*got 0\.5"),
        ([GOOD, GOOD], {"counts": [3, -1]}, TypeError, "got -1"),
        ([GOOD, GOOD], {"counts": [3, True]}, TypeError, "got True"),
        ([GOOD, GOOD], {"counts": [1, 0]}, ValueError, "a variance needs 2 values"),
        ([GOOD, GOOD], {"counts": [3, {"other": 4}]}, ValueError, "counts of state 1 have no layer 'bn'"),
        ([GOOD], {"keep": "bn"}, TypeError, "keep must be a list of patterns"),
        ([GOOD], {"keep": [3]}, TypeError, "keep must be a list of patterns"),
        ([GOOD], {"keep": ["head.*"]}, ValueError, r"keep has 'head\.\*', which is the name of no layer"),
    ],
)
def test_what_cannot_be_pooled_is_named(
    states: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        bn.pool_states(states, **options)


def test_a_variance_beyond_the_range_of_float16() -> None:
    states = [changed(running_mean=torch.full((3,), sign * 6e4, dtype=torch.float16)) for sign in (1, -1)]
    for state in states:
        state["bn.running_var"] = torch.ones(3, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"bn\.running_var would be 3\.6e\+09, beyond the range of float16"):
        bn.pool_states(states)


def clients() -> list[Tensor]:
    """The digits 0 and 1, 2 and 3, and so on: five clients with different classes."""
    data = load("digits")
    return [torch.from_numpy(data.train_x[data.train_y // 2 == client]).double() for client in range(5)]


def network() -> nn.Sequential:
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
        nn.BatchNorm1d(10),
    ).double()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "running" in name}


def test_digits_over_five_clients_with_different_classes() -> None:
    """Layer after layer: every client measures, the server pools, and the layer is frozen."""
    model, one = network().eval(), network().eval()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    bn.recalibrate(one, clients())
    for number, name in enumerate(names):
        locals_ = [copy.deepcopy(model) for _ in range(5)]
        records = [bn.recalibrate(local, [x]) for local, x in zip(locals_, clients(), strict=True)]
        pooled = bn.pool_states(locals_, records, keep=[*names[:number], *names[number + 1 :]])
        model.load_state_dict(pooled.state, strict=False)
        bn.freeze(model.get_submodule(name))
    expected = statistics(one)
    errors = {name: float((tensor - expected[name]).abs().max()) for name, tensor in statistics(model).items()}
    assert len(errors) == 6
    assert max(errors.values()) < 1e-12, errors


def test_the_linear_average_of_five_clients_is_not_that_of_one_process() -> None:
    """The first layer in one round; what federated averaging does is off by far more than the bound above."""
    one = network().eval()
    bn.recalibrate(one, clients())
    locals_ = [network().eval() for _ in range(5)]
    records = [bn.recalibrate(local, [x]) for local, x in zip(locals_, clients(), strict=True)]
    state = bn.pool_states(locals_, records).state
    first = "2.running_var"
    assert float((state[first] - one.state_dict()[first]).abs().max()) < 1e-12
    linear = torch.stack([local.state_dict()[first] for local in locals_]).mean(0)
    assert float((linear - one.state_dict()[first]).abs().max()) > 1e-6
    last = "9.running_var"
    assert float((state[last] - one.state_dict()[last]).abs().max()) > 1e-6, (
        "one round is exact in the first layer only"
    )
