"""Running statistics measured anew: exact whatever the split, and where torch.optim.swa_utils.update_bn is wrong."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from zoo import WITHOUT_NORMS, ZOO, Kind

import batchnorm as bn
from batchnorm.surgery.freeze import freeze
from batchnorm.surgery.recalibrate import recalibrate


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(5 * 4 * 4, 6),
        nn.BatchNorm1d(6),
    )


def images(rows: int = 24) -> Tensor:
    return torch.randn(rows, 3, 8, 8) * 2 + torch.randn(rows, 3, 1, 1) + 1


def running(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}


def state(model: nn.Module) -> list[Any]:
    """All that recalibrate may not change where it raises: the very objects, and what is in them."""
    found: list[Any] = []
    for module in model.modules():
        attributes = dict(vars(module))
        for name in ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks"):
            attributes[name] = dict(attributes[name])
        found.append((type(module), attributes))
        tensors = [pair for pair in (*module._buffers.items(), *module._parameters.items()) if pair[1] is not None]
        found += [(name, tensor.detach().clone().numpy().tobytes()) for name, tensor in tensors]
    return found


def same(found: list[Any], before: list[Any]) -> bool:
    """By identity where it is an object, by value where it is bytes."""
    for now, then in zip(found, before, strict=True):
        if isinstance(now[1], bytes):
            if now != then:
                return False
        elif (
            now[0] is not then[0]
            or now[1].keys() != then[1].keys()
            or not all(identical(a, b) for a, b in zip(now[1].values(), then[1].values(), strict=True))
        ):
            return False
    return True


def identical(a: Any, b: Any) -> bool:
    if type(a) is dict:
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return a is b or (not isinstance(a, Tensor | nn.Module) and a == b)


def pooled_by_hand(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """Layer after layer in float64, on all the data at once."""
    model = copy.deepcopy(model).double().eval()
    x = x.double()
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                values = x.transpose(0, 1).flatten(1)
                module.running_mean.copy_(values.mean(1))
                module.running_var.copy_(values.var(1, correction=1))
            x = module(x)
    return running(model)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_statistics_are_those_of_all_the_data_as_inference_sees_it(
    seed: int, converted: bool, training: bool
) -> None:
    model, x = network(seed), images()
    expected = pooled_by_hand(model, x)
    model.train(training)
    if converted:
        bn.convert(model)
    record = recalibrate(model, x.split(5))
    for name, tensor in running(model).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert {int(layer.num_batches_tracked) for layer in model if hasattr(layer, "num_batches_tracked")} == {5}
    assert (record.batches, record.passes, record.left_out, record.converged) == (5, 3, 0, None)
    assert [layer.names for layer in record.layers] == [("1",), ("5",), ("9",)]
    assert [layer.values for layer in record.layers] == [24 * 36, 24 * 16, 24]
    again = recalibrate(model, x.split(5))
    assert max(layer.moved_max for layer in again.layers) < 1e-5


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(2, 12), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_the_split_does_not_matter(cuts: list[int], seed: int) -> None:
    model = network(seed)
    x = images(sum(cuts))
    whole = copy.deepcopy(model)
    recalibrate(whole, [x])
    recalibrate(model, x.split(cuts))
    for name, tensor in running(model).items():
        torch.testing.assert_close(tensor, running(whole)[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_one_pass_normalizes_by_the_batch_and_pools_exactly(seed: int) -> None:
    """With equal batches the mean is what torch's update_bn finds; the variance is that of the pool, not the mean."""
    model, x = network(seed), images() + torch.arange(24).view(24, 1, 1, 1)
    model[3] = nn.Identity()
    theirs = copy.deepcopy(model)
    record = recalibrate(model, iter(x.split(6)), exact=False)
    update_bn(x.split(6), theirs)
    assert (record.passes, record.exact) == (1, False)
    for name in ("1.running_mean", "5.running_mean", "9.running_mean"):
        torch.testing.assert_close(running(model)[name], running(theirs)[name], rtol=1e-4, atol=1e-6)
    assert (running(model)["1.running_var"] > running(theirs)["1.running_var"]).all()
    unlike = network(seed)
    unlike[3] = nn.Identity()
    recalibrate(unlike, x.split([2, 22]), exact=False)
    assert not torch.allclose(running(unlike)["9.running_mean"], running(model)["9.running_mean"], rtol=1e-3)


@WITHOUT_NORMS
@pytest.mark.parametrize("kind", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("converted", [False, True])
def test_any_network(kind: Kind, converted: bool) -> None:
    torch.manual_seed(1)
    model = kind.make()
    x = torch.randn(8, *kind.shape[1:]) * 2
    model(x)
    if converted:
        bn.convert(model)
    other = copy.deepcopy(model)
    record = recalibrate(model, x.split(4))
    recalibrate(other, [x])
    for name, tensor in running(model).items():
        torch.testing.assert_close(tensor, running(other)[name], rtol=1e-5, atol=1e-5)
    assert all(layer.calls == 1 for layer in record.layers)
    assert pickle.dumps(copy.deepcopy(model))


# ---------------------------------------------------------------------------------------------------------------------


def test_story_16_dropout_is_off() -> None:
    """timm#106, #224, lightning#8811: update_bn estimates with dropout on, which inference never has."""
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    x = torch.randn(4000, 4) + 3
    theirs = copy.deepcopy(model)
    update_bn([x], theirs)
    assert (theirs[1].running_var > 8).all(), "variance 1 becomes 11: half of the values are 0, the others about 6"
    recalibrate(model, [x])
    torch.testing.assert_close(model[1].running_var, x.var(0))


def test_story_16_a_metric_keeps_the_better() -> None:
    """timm#224: recalibration made it worse for its author."""
    model = network().eval()
    before = running(model)
    scores = iter([0.9, 0.8, 0.9, 0.95, 1.0, 2.0, 2.0, 1.0, 0.5, math.nan, math.nan, 0.1, 0.5, 0.5])
    modes = []

    def metric(given: nn.Module) -> Tensor:
        assert given is model
        modes.append(any(module.training for module in given.modules()))
        given.train()
        return torch.tensor(next(scores))

    record = recalibrate(model, images().split(8), metric=metric)
    assert (round(record.metric_before, 3), round(record.metric_after, 3), record.kept) == (0.9, 0.8, "before")
    assert "0.9 → 0.8: worse, so the old statistics were restored" in str(record)
    assert all(torch.equal(tensor, before[name]) for name, tensor in running(model).items())
    for lower, kept in [
        (False, "after"),
        (True, "before"),
        (True, "after"),
        (False, "before"),
        (False, "after"),
        (False, "after"),
    ]:
        record = recalibrate(model, images().split(8), metric=metric, higher_is_better=not lower)
        assert record.kept == kept
    assert modes == [False] * 14
    assert not model.training
    assert not model[1].training
    assert "no metric was given" in str(recalibrate(model, images().split(8)))


def test_story_17_batches_of_any_shape() -> None:
    """pytorch/pytorch#49082, #52055: update_bn takes a tensor or the first of a list, nothing else."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
            return self.norm(a + b)

    a, b = torch.randn(2, 10, 3).unbind()
    model = Named()
    with pytest.raises(TypeError):
        update_bn([{"a": a, "b": b}], model)
    recalibrate(model, [{"a": a, "b": b}])
    torch.testing.assert_close(model.norm.running_mean, (a + b).mean(0))
    recalibrate(model, [(a, b)], lambda m, batch: m(a=batch[0], b=batch[1] + 1))
    torch.testing.assert_close(model.norm.running_mean, (a + b + 1).mean(0))
    loader = DataLoader(TensorDataset(a, b), batch_size=5)
    recalibrate(model, loader, lambda m, batch: m(a=batch[0], b=batch[1]))
    torch.testing.assert_close(model.norm.running_mean, (a + b).mean(0))


def test_story_17_stops_when_converged() -> None:
    """composer PR#581: how many batches are enough?"""
    model = network()
    x = images(400)
    record = recalibrate(model, x.split(4), tolerance=0.2)
    assert record.converged
    assert record.batches < 100
    assert record.batches.bit_count() == 1
    stopped = running(model)
    recalibrate(model, x.split(4)[: record.batches])
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in running(model).items())
    strict = recalibrate(model, x.split(4), tolerance=1e-9)
    assert (strict.converged, strict.batches) == (False, 100)
    assert "not converged" in str(strict)


def test_story_17_unequal_batches_weigh_by_their_size() -> None:
    """[100 rows, 2 rows]: update_bn gives both half of the weight, and averages variances."""
    big, small = torch.randn(100, 3), torch.randn(2, 3) * 0.1 + 10
    rows = torch.cat([big, small])
    model = nn.Sequential(nn.BatchNorm1d(3))
    theirs = copy.deepcopy(model)
    update_bn([big, small], theirs)
    assert (theirs[0].running_mean > 4.5).all()
    assert (theirs[0].running_var < 1).all()
    recalibrate(model, [big, small])
    torch.testing.assert_close(model[0].running_mean, rows.mean(0))
    torch.testing.assert_close(model[0].running_var, rows.var(0))


def test_story_9_micro_batches_give_the_statistics_of_the_effective_batch() -> None:
    """andreped/GradientAccumulator#6, yolov5#1630: statistics of micro-batches are not those of the big batch."""
    x = torch.randn(16, 1, 3) + torch.randn(16, 8, 3) / 10
    micro = list(x)  # each of its own kind
    model = nn.Sequential(nn.BatchNorm1d(3))
    theirs = copy.deepcopy(model)
    update_bn(micro, theirs)
    assert (theirs[0].running_var < 0.1).all(), "within a micro-batch hardly anything varies"
    recalibrate(model, micro)
    torch.testing.assert_close(model[0].running_var, x.flatten(0, 1).var(0))


def test_story_3_a_poisoned_checkpoint_heals() -> None:
    """pytorch/pytorch#1206: one NaN batch, and the running statistics are NaN for ever."""
    model, x = network(), images()
    model(x.new_full((4, 3, 8, 8), torch.nan))
    for _ in range(100):
        model(x)
    assert model.eval()(x).isnan().all()
    record = recalibrate(model, x.split(6))
    assert model(x).isfinite().all()
    assert all(math.isnan(layer.moved_median) and layer.healed for layer in record.layers)
    assert "units were not finite" in str(record)
    other = network()
    recalibrate(other, x.split(6))
    assert all(torch.equal(tensor, running(other)[name]) for name, tensor in running(model).items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_story_3_batches_that_are_not_finite(value: float, exact: bool) -> None:
    """SparseConvNet#190: named, or left out."""
    model, x = network(), images()
    bad = x[:6].clone()
    bad[2, 1, 3, 3] = value
    batches = [x[:12], bad, x[12:]]
    before = state(model)
    with pytest.raises(ValueError, match="recalibrate: batch 1 gives layer '1' values that are not finite"):
        recalibrate(model, batches, exact=exact)
    assert same(state(model), before)
    record = recalibrate(model, batches, exact=exact, nonfinite="skip")
    assert (record.batches, record.left_out) == (2, 1)
    assert "1 batch left out" in str(record)
    clean = network()
    recalibrate(clean, x.split(12), exact=exact)
    for name, tensor in running(model).items():
        torch.testing.assert_close(tensor, running(clean)[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="every batch has values that are not finite"):
        recalibrate(model, [bad, bad], exact=exact, nonfinite="skip")


def test_story_1_statistics_that_never_were() -> None:
    """pytorch/pytorch#4741: fine in train(), terrible in eval()."""
    model, x = network(), images(200) * 30
    model[3] = nn.Identity()
    expected = model(x).detach()
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
    assert (model.eval()(x) - expected).square().mean() > 1
    recalibrate(model, x.split(50))
    assert (model(x) - expected).square().mean() < 1e-3


def test_story_4_a_batch_of_one_value_is_named() -> None:
    """mmsegmentation#272, yolov5#2885: which layer, which batch?"""
    model, x = network(), images(25)
    before = state(model)
    with pytest.raises(ValueError, match=r"recalibrate: batch 3 gives layer '9' one value per channel.*drop_last=True"):
        recalibrate(model, x.split(8))
    assert same(state(model), before)


def test_story_5_frozen_layers_stay() -> None:
    """pytorch/pytorch#86590, #66073: update_bn resets layers that their user froze with eval(), and wakes them."""
    x = images()
    theirs = network()
    theirs[1].running_mean.fill_(7)
    theirs[1].eval()
    update_bn(x.split(6), theirs)
    assert (theirs[1].running_mean != 7).all()
    model = network()
    model[1].running_mean.fill_(7)
    model[1].eval()
    freeze(model[5], gamma=False, beta=False)
    before = running(model)
    record = recalibrate(model, x.split(6))
    for name, tensor in running(model).items():
        assert torch.equal(tensor, before[name]) is (not name.startswith("9"))
    assert {skipped.name: skipped.why.split(":")[0] for skipped in record.skipped} == {
        "1": "in eval mode while the model trains, so frozen by its user",
        "5": "frozen",
    }
    assert "BatchNorm2d  left alone (in eval mode" in str(record)
    assert not model[1].training
    assert vars(model[5])["training"]
    assert model.training


def test_story_16_an_exception_leaves_update_bn_half_done() -> None:
    """Momentum stays None and the statistics are lost."""

    def raising() -> Iterator[Tensor]:
        yield images(4)
        raise OSError("disk")

    theirs = network()
    theirs(images())
    with pytest.raises(OSError, match="disk"):
        update_bn(raising(), theirs)
    assert theirs[1].momentum is None
    model = network()
    model(images())
    before = state(model)
    with pytest.raises(OSError, match="disk"):
        recalibrate(model, raising(), exact=False)
    assert same(state(model), before)


# ---------------------------------------------------------------------------------------------------------------------


class Raising:
    """Batches that can be read again, and raise at one of them in one of the passes."""

    def __init__(self, error: type[BaseException], turn: int, at: int) -> None:
        self.error, self.turn, self.at = error, turn, at

    def __iter__(self) -> Iterator[Tensor]:
        self.turn -= 1
        for index, batch in enumerate(images().split(6)):
            if self.turn < 0 and index == self.at:
                raise self.error("from the loader")
            yield batch


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_a_raising_loader_changes_nothing(
    error: type[BaseException], turn: int, training: bool, converted: bool
) -> None:
    model = network()
    model(images())
    model[5].momentum = None
    model.train(training)
    model[3].train(not training)
    if converted:
        bn.convert(model)
    before = state(model)
    with pytest.raises(error, match="from the loader"):
        recalibrate(model, Raising(error, turn, 2))
    assert same(state(model), before)


def in_the_model(model: nn.Sequential, x: Tensor) -> None:
    model[8].in_features = 3
    model[8].weight = nn.Parameter(model[8].weight[:, :3].clone())


@pytest.mark.parametrize("where", ["model", "metric before", "metric after", "storing"])
def test_any_other_failure_too(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), images()
    calls = iter([1.0, 2.0])

    def metric(given: nn.Module) -> float:
        if where == "metric before" or (where == "metric after" and next(calls) == 2.0):
            raise KeyboardInterrupt
        return 1.0

    if where == "model":
        in_the_model(model, x)
    if where == "storing":
        from batchnorm.surgery import recalibrate as module

        store = module.store

        def storing(buffers: Any, *args: Any) -> None:
            if buffers.mean is model[9].running_mean:
                raise KeyboardInterrupt
            store(buffers, *args)

        monkeypatch.setattr(module, "store", storing)
    before = state(model)
    with pytest.raises((RuntimeError, KeyboardInterrupt)) as caught:
        recalibrate(model, x.split(6), metric=metric)
    assert same(state(model), before)
    if where == "model":
        assert caught.value.__notes__ == ["recalibrate: batch 0 of pass 1"]


def test_nothing_but_the_statistics_changes() -> None:
    model, x = network(), images()
    model.count = 0

    def counting(module: nn.Module, args: object) -> None:
        model.count += 1

    model.register_forward_pre_hook(counting)
    x.requires_grad_()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    before, given = state(model), x.clone()
    recalibrate(model, x.split(6))
    assert model.count == 0
    assert torch.equal(torch.rand(1), expected), "no random number was drawn"
    assert torch.equal(x, given)
    assert not any(p.grad is not None for p in model.parameters())
    for now, then in zip(state(model), before, strict=True):
        if now[0] not in ("running_mean", "running_var", "num_batches_tracked"):
            assert same([now], [then])


class Shifting(nn.Module):
    """Writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.second = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.linear(self.first(x.add_(1).relu_())))


def test_a_model_that_writes_to_its_input() -> None:
    model, x = Shifting(), torch.randn(10, 3)
    recalibrate(model, [x])
    torch.testing.assert_close(model.first.running_mean, (x + 1).relu().mean(0))
    received = model.eval().linear(model.first((x + 1).relu()))
    torch.testing.assert_close(model.second.running_mean, received.mean(0), rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """One norm called twice, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.second = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.linear(self.first(x))))


def test_a_layer_called_twice_is_pooled_over_its_calls() -> None:
    """keras#8794, pytorch/pytorch#1738."""
    model, x = Shared(), torch.randn(20, 3) * 3 + 2
    record = recalibrate(model, x.split(10))
    assert [layer.calls for layer in record.layers] == [2, 1]
    assert [layer.values for layer in record.layers] == [40, 20]
    assert "called several times in a forward, pooled over its calls: first" in str(record)
    normal = [nn.functional.batch_norm(part, None, None, training=True) for part in x.split(10)]
    both = torch.cat([x, *(model.linear(part) for part in normal)])
    torch.testing.assert_close(model.first.running_mean, both.mean(0), rtol=1e-4, atol=1e-5)
    model.eval()
    received = model.first(model.linear(model.first(x)))
    torch.testing.assert_close(model.second.running_mean, received.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.second.running_var, received.var(0), rtol=1e-4, atol=1e-5)


def test_a_layer_called_twice_behind_another() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3), Shared()), torch.randn(20, 3) * 3 + 2
    record = recalibrate(model, x.split(10))
    assert [layer.values for layer in record.layers] == [20, 40, 20]
    model.eval()
    inside = model[0](x)
    normal = [nn.functional.batch_norm(part, None, None, training=True) for part in inside.split(10)]
    both = torch.cat([inside, *(model[1].linear(part) for part in normal)])
    torch.testing.assert_close(model[1].first.running_mean, both.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].first.running_var, both.var(0), rtol=1e-4, atol=1e-5)


def test_a_forward_is_left_where_the_layer_is_measured() -> None:
    model = network()
    ran: list[int] = []
    for index in (0, 4, 8):
        model[index].register_forward_hook(lambda module, args, y, index=index: ran.append(index))
    recalibrate(model, [images()])
    assert ran == [0, 4, 8, 0, 4, 0, 4, 8]


class Failing(nn.Module):
    """NaN of a batch whose first value is marked, whatever became of it: the mark is on the module."""

    marked = False

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan if self.marked else x


def test_a_batch_that_fails_deep_inside_is_left_out_for_all_layers() -> None:
    failing = Failing()
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), failing, nn.BatchNorm1d(3))
    clean = copy.deepcopy(model)
    good, bad = torch.randn(10, 3), torch.randn(10, 3) + 5

    def forward(m: nn.Module, batch: Tensor) -> None:
        failing.marked = batch.mean() > 2
        m(batch)

    record = recalibrate(model, [good, bad, good], forward, nonfinite="skip")
    assert (record.batches, record.left_out) == (2, 1)
    recalibrate(clean, [good, good])
    assert all(torch.equal(tensor, running(clean)[name]) for name, tensor in running(model).items())


def test_modules_with_a_custom_train_keep_their_mode() -> None:
    for opaque in (torch.fx.symbolic_trace(nn.Sequential(nn.Dropout(0.5))), nn.Dropout(0.5).eval()):
        model = nn.Sequential(opaque, nn.BatchNorm1d(3))
        before = [module.training for module in model.modules()]
        recalibrate(model, [torch.randn(20, 3)])
        assert [module.training for module in model.modules()] == before


class Own(nn.BatchNorm1d):
    pass


def test_skipped_layers_are_named() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), Own(3), nn.BatchNorm1d(3, affine=False)
    )
    model.unused = nn.Identity()
    x = torch.randn(10, 3)

    def forward(m: nn.Module, batch: Tensor) -> Tensor:
        return m[2](m[1](m[0](batch)))

    record = recalibrate(model, [x], forward)
    reasons = {skipped.name: skipped.why for skipped in record.skipped}
    assert reasons["1"].startswith("it has no running statistics")
    assert reasons["2"].startswith("a subclass of BatchNorm1d")
    assert reasons["3"] == "never called"
    assert [layer.names for layer in record.layers] == [("0",)]
    assert [layer.names for layer in recalibrate(model, [x], also=[Own]).layers] == [("0",), ("2",), ("3",)]
    with pytest.warns(UserWarning, match="recalibrate found no batch norm layer in it"):
        nothing = recalibrate(nn.Linear(3, 3), [x])
    assert nothing.layers == ()
    assert str(nothing) == "0 batch norm layers recalibrated"


def test_an_iterator_suffices_for_one_layer_only() -> None:
    x = images()
    record = recalibrate(nn.Sequential(nn.BatchNorm2d(3)), iter(x.split(6)))
    assert (record.passes, record.batches) == (1, 4)
    model = network()
    before = state(model)
    taken = iter(x.split(6))
    with pytest.raises(ValueError, match="pass a list or a DataLoader instead of an iterator, or exact=False"):
        recalibrate(model, taken)
    assert same(state(model), before)
    assert len(list(taken)) == 4, "nothing was read"


class Exhausted:
    def __init__(self, batches: Any) -> None:
        self.batches = iter(batches)

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no batches"),
        (Exhausted(images().split(6)), "there were 4 batches in the first pass and only 0 in a later one"),
        ([images(1)[:, :, :5, :5]], "one value per channel"),
    ],
    ids=["empty", "exhausted", "one value"],
)
def test_too_little_data(batches: Any, message: str) -> None:
    model = nn.Sequential(*network()[:7], nn.Conv2d(5, 2, 1), nn.BatchNorm2d(2))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        recalibrate(model, batches)
    assert same(state(model), before)


def test_an_empty_batch_brings_nothing() -> None:
    layer, x = nn.BatchNorm1d(3), torch.randn(10, 3)
    recalibrate(layer, [x, x[:0]])
    torch.testing.assert_close(layer.running_mean, x.mean(0))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"tolerance": 0}, ValueError, "tolerance must be a number above 0"),
        ({"tolerance": "tight"}, ValueError, "tolerance must be a number above 0"),
        ({"metric": 0.5}, TypeError, "metric must be a function of the model, got float"),
        ({"metric": lambda model: "good"}, TypeError, "metric must return a number, got str"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be 'raise' or 'skip'"),
        ({"forward_fn": 3}, TypeError, "forward_fn must be a function"),
        ({"model": Tensor()}, TypeError, r"recalibrate takes a torch.nn.Module, got Tensor"),
        ({"batches": images(2)}, TypeError, r"for a single batch pass \[batch\]"),
    ],
)
def test_mistakes(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    before = state(model)
    with pytest.raises(error, match=message):
        recalibrate(**({"model": model, "batches": [images(4)]} | wrong))
    assert same(state(model), before)


def test_half_precision_statistics_that_overflow_are_named() -> None:
    """huggingface/coreai-torch PR#54: running_var above 65504 is infinite in float16."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).half()
    x = torch.randn(10, 3).half() * 400
    before = state(model)
    with pytest.raises(ValueError, match=r"running_var of layer '0' would be .*, beyond the range of float16"):
        recalibrate(model, [x])
    assert same(state(model), before)
    recalibrate(model, [x / 10])
    torch.testing.assert_close(model[0].running_var, (x / 10).float().var(0).half())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), images().to(dtype)
    recalibrate(model, x.split(6))
    y = model.eval()[:1](x).double()
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)).to(dtype), rtol=0.01, atol=0.01)


def test_statistics_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = network()
        recalibrate(model, images().split(6))
    before = running(model)
    recalibrate(model, images().split(6))
    assert not torch.equal(before["1.running_mean"], running(model)["1.running_mean"])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, x = network(), images()
    expected = network()
    recalibrate(expected, x.split(6))
    wrapped = wrap(model)
    record = recalibrate(wrapped, x.split(6))
    assert [layer.names for layer in record.layers] == [("1",), ("5",), ("9",)]
    assert all(torch.equal(tensor, running(expected)[name]) for name, tensor in running(model).items())


def test_a_model_that_is_compiled_inside() -> None:
    """Compiled code does not see hooks: it would seem that no layer is ever called."""
    model, x = network(), images()
    model[4].compile(backend="eager")
    model.compile(backend="eager")
    model.eval()(x[:6])
    record = recalibrate(model, x.split(6))
    assert len(record.layers) == 3
    expected = network()
    recalibrate(expected, x.split(6))
    assert all(torch.equal(tensor, running(expected)[name]) for name, tensor in running(model).items())


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    recalibrate(network(), images().split(6), progress=True)
    assert "recalibrate: pass 3 of 3" in capsys.readouterr().err
    recalibrate(network(), images().split(6))
    recalibrate(network(), images().split(6), progress=False)
    assert capsys.readouterr().err == ""


def test_the_record_is_short() -> None:
    text = str(recalibrate(network(), images().split(6)))
    first, *rows = text.splitlines()
    assert first == "3 batch norm layers recalibrated on 4 batches in 3 passes"
    assert rows[0].startswith("   2  BatchNorm2d  moved by ")
    assert rows[1].startswith("   1  BatchNorm1d  moved by ")
    assert len(rows) == 3
