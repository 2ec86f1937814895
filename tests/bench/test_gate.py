"""The gate is green for what is right, and red for each way of being wrong."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from batchnorm.bench import conduct, contenders, record
from batchnorm.bench.cases import Case

CASES = [
    Case((8, 24, 6, 5), "contiguous"),
    Case((8, 24, 6, 5), "channels_last", "bfloat16", "bn+add+relu"),
    Case((4, 24, 2, 6, 5), "channels_last_3d", "float32", "bn+silu"),
    Case((300, 24), "rows", "float32", "bn"),
    Case((8, 24, 6, 5), "channels_last", "float32", "bn+add+relu", "eval"),
]


def prepared(case: Case, values: int = conduct.COMPARED):
    call = case.make(0)
    chosen = conduct.compared_channels(call, 0, values)
    conduct.zero_grad_near_kinks(call, chosen)
    return call, chosen, contenders.eager(call).outputs()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_right(case):
    call, chosen, theirs = prepared(case)
    assert conduct.errors(contenders.ours(call).outputs(), theirs, call, chosen) == []


@pytest.mark.parametrize("name", ["y", "dx", "dgamma", "dbeta", "dresidual", "running_mean", "running_var"])
def test_an_error_in_any_output_is_found(name):
    call, chosen, theirs = prepared(
        CASES[0] if name != "dresidual" else Case(CASES[0].shape, "contiguous", "float32", "bn+add+relu")
    )
    ours = dict(contenders.ours(call).outputs())
    assert conduct.errors(ours, theirs, call, chosen) == []
    wrong = ours[name].clone()
    (wrong if wrong.dim() == 1 else wrong[:, :, 2, 3].T)[7] += 1e-2
    found = conduct.errors({**ours, name: wrong}, theirs, call, chosen)
    assert len(found) == 1
    assert found[0].startswith(f"{name}: error ")


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_channel_that_nobody_wrote_is_found_where_float64_does_not_look(value):
    call, chosen, theirs = prepared(CASES[0], values=0)
    assert len(chosen) == 2
    ours = dict(contenders.ours(call).outputs())
    ours["dx"] = ours["dx"].clone()
    ours["dx"][:, 11] = value
    assert conduct.errors(ours, theirs, call, chosen) == ["dx: 1 of 24 channels differ from PyTorch's"]


def test_few_channels_are_the_first_the_last_and_others_by_the_seed():
    call = Case((2, 100, 10, 10), "contiguous").make(0)
    chosen = conduct.compared_channels(call, 1, values=1000)
    assert len(chosen) == 5
    assert chosen[0] == 0
    assert chosen[-1] == 99
    assert torch.equal(chosen, chosen.unique())
    assert torch.equal(chosen, conduct.compared_channels(call, 1, values=1000))
    assert not torch.equal(chosen, conduct.compared_channels(call, 2, values=1000))
    assert torch.equal(conduct.compared_channels(call, 1), torch.arange(100))


def test_gradients_at_a_kink_are_taken_out_of_the_chosen_channels_only():
    call = Case((64, 3, 20, 20), "channels_last", "bfloat16").make(0)
    before = call.grad_y.clone()
    conduct.zero_grad_near_kinks(call, torch.tensor([1]))
    assert (call.grad_y[:, 1] == 0).sum() > (before[:, 1] == 0).sum()
    assert torch.equal(call.grad_y[:, ::2], before[:, ::2])


@pytest.mark.slow
def test_a_red_gate_leaves_errors_and_no_times(monkeypatch):
    original = contenders.ours

    def wrong(call):
        layer = original(call)
        layer.run = lambda x: F.leaky_relu(layer.norm(x), 0.01) * 1.001
        return layer

    monkeypatch.setattr(contenders, "ours", wrong)
    result = conduct.measure(CASES[0], conduct.Settings(repeats=1), record.machine())
    assert not result["gate"]["passed"]
    assert any(error.startswith("y: error ") for error in result["gate"]["errors"])
    assert "contenders" not in result
    assert "ratios" not in result


@pytest.mark.slow
def test_a_contender_that_computes_something_else_is_not_timed(monkeypatch):
    def wrong(call, inplace=False):
        layer = original(call, inplace=inplace)
        if inplace:
            layer.run = lambda x: layer.norm(x)
        return layer

    original = contenders.eager
    monkeypatch.setattr(contenders, "eager", wrong)
    monkeypatch.setattr(contenders, "has_jax", lambda: False)
    result = conduct.measure(CASES[0], conduct.Settings(repeats=1), record.machine())
    assert list(result["contenders"]) == ["ours", "eager", "floor"]
    assert "y: 24 of 24 channels differ from PyTorch's" in result["excluded"]["in place"]
