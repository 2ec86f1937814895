"""accumulate=k moves the running statistics as one batch of k parts would; checkpointing moves them once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 9, 2]])
def test_statistics_move_as_by_one_large_batch(sizes: list[int], momentum: float | None) -> None:
    """andreped/GradientAccumulator#6: with k micro-batches stock layers move k times, by k small variances."""
    torch.manual_seed(0)
    stock, whole = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    layer = bn.BatchNorm2d(3, momentum=momentum, accumulate=3)
    for _ in range(4):
        x = torch.randn(sum(sizes), 3, 2, 2) * torch.arange(1, sum(sizes) + 1).view(-1, 1, 1, 1) + 2
        whole(x)
        for part in x.split(sizes):
            stock(part)
            layer(part)
    torch.testing.assert_close(layer.running_mean, whole.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var, whole.running_var, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == whole.num_batches_tracked == 4
    assert not torch.allclose(stock.running_var, whole.running_var, rtol=1e-2)


def test_before_the_last_part_nothing_moves() -> None:
    layer = bn.BatchNorm1d(3, accumulate=2)
    layer(torch.randn(5, 3) + 4)
    assert (layer.running_mean == 0).all()
    assert layer.num_batches_tracked == 0
    layer(torch.randn(5, 3) + 4)
    assert (layer.running_mean > 0.2).all()


def test_each_part_is_normalized_by_itself() -> None:
    x = torch.randn(5, 3) * 3 + 4
    torch.testing.assert_close(bn.BatchNorm1d(3, accumulate=2)(x), nn.BatchNorm1d(3)(x))


def test_pending_batches_are_copied_and_pickled() -> None:
    layer = bn.BatchNorm1d(3, accumulate=2)
    layer(torch.randn(5, 3) + 4)
    x = torch.randn(5, 3)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for each in (layer, *others):
        each(x)
        assert torch.equal(each.running_mean, layer.running_mean)


def test_pending_batches_are_dropped_with_the_statistics() -> None:
    layer = bn.BatchNorm1d(3, accumulate=2)
    for clear in (layer.reset_running_stats, lambda: layer.load_state_dict(bn.BatchNorm1d(3).state_dict())):
        layer(torch.randn(5, 3) + 4)
        clear()
        layer(torch.randn(5, 3) + 4)
        assert layer.num_batches_tracked == 0, "one batch, which waits for another"
        layer.reset_running_stats()


def test_each_domain_accumulates_separately() -> None:
    torch.manual_seed(0)
    layer, plain = bn.DomainBatchNorm1d(3, 2, accumulate=2), bn.BatchNorm1d(3, accumulate=2)
    for _ in range(2):
        x = torch.randn(5, 3)
        layer(x)
        plain(x)
        with bn.domain(1):
            layer(torch.randn(5, 3) + 9)
    assert torch.equal(layer.running_mean, plain.running_mean)
    assert (layer.running_mean_1 > 0.5).all()
    assert layer.num_batches_tracked == layer.num_batches_tracked_1 == 1


def test_frozen_eval_and_untracked_layers_accumulate_nothing() -> None:
    for layer in (bn.BatchNorm1d(3, accumulate=2).eval(), bn.BatchNorm1d(3, accumulate=2, track_running_stats=False)):
        for _ in range(3):
            layer(torch.randn(5, 3))
        assert not layer._pending


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_it_is_the_same(momentum: float | None) -> None:
    torch.manual_seed(0)
    plain = bn.BatchNorm1d(3, momentum=momentum, accumulate=2)
    net = copy.deepcopy(plain)
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(5):
        x = torch.randn(5, 3)
        torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(net.running_var, plain.running_var)
    assert net.num_batches_tracked == plain.num_batches_tracked == 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_other_numbers_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="accumulate must be a whole number"):
        bn.BatchNorm1d(3, accumulate=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_activation_checkpointing_moves_the_statistics_once(
    reentrant: bool, accumulate: int, momentum: float | None
) -> None:
    """pytorch/pytorch#96136: the forward that backward runs again moves them a second time."""
    torch.manual_seed(0)
    stock, plain = nn.BatchNorm1d(4), bn.BatchNorm1d(4, momentum=momentum, accumulate=accumulate)
    layer = copy.deepcopy(plain)
    for _ in range(2):
        x = (torch.randn(6, 4) + 3).requires_grad_()
        y = x.detach().clone().requires_grad_()
        plain(x).square().sum().backward()
        checkpoint(layer, y, use_reentrant=reentrant).square().sum().backward()
        checkpoint(stock, x.detach().requires_grad_(), use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert torch.equal(layer.running_mean, plain.running_mean)
    assert torch.equal(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == plain.num_batches_tracked == 2 // accumulate
    assert stock.num_batches_tracked == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_with_the_checkpointing_inside_they_move_once(reentrant: bool) -> None:
    layer = bn.BatchNorm1d(4)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def forward(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, use_reentrant=reentrant)

    forward(torch.randn(6, 4, requires_grad=True)).square().sum().backward()
    assert layer.num_batches_tracked == 1


def test_renorm_is_not_recomputed() -> None:
    """What corrects the batch has moved since: another forward would be differentiated than the one that ran."""
    layer = bn.BatchRenorm1d(4)
    y = checkpoint(layer, torch.randn(6, 4, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match="leave it outside of the checkpointed function"):
        y.sum().backward()


def replica_of(layer: nn.Module) -> nn.Module:
    """What nn.DataParallel runs: another object each time, which shares the first device's buffers."""
    made = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            setattr(made, name, parameter * 1.0)
    for name, buffer in layer._buffers.items():
        made._buffers[name] = buffer
    return made


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("set_later", [False, True])
def test_replicas_of_data_parallel_accumulate_together(momentum: float | None, set_later: bool) -> None:
    torch.manual_seed(0)
    layer = bn.BatchNorm2d(3, momentum=momentum, accumulate=1 if set_later else 2)
    layer.accumulate = 2
    plain = bn.BatchNorm2d(3, momentum=momentum, accumulate=2)
    for _ in range(6):
        x = torch.randn(4, 3, 5, 5) + 3
        replica_of(layer)(x)
        plain(x)
    assert layer.num_batches_tracked == 3
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    layer.reset_running_stats()
    replica_of(layer)(torch.randn(4, 3, 5, 5) + 3)
    assert (layer.running_mean == 0).all(), "one of two"


@pytest.mark.parametrize("kind", [bn.BatchNorm2d, bn.BatchRenorm2d])
def test_a_pass_with_momentum_0_changes_nothing(kind) -> None:
    """SAM runs each batch twice, the second time at momentum 0 (davda54/sam#30)."""
    torch.manual_seed(0)
    layer, once = kind(3, accumulate=2), kind(3, accumulate=2)
    for _ in range(6):
        x = torch.randn(4, 3, 5, 5) + 3
        layer(x)
        once(x)
        layer.momentum = 0
        layer(torch.randn(4, 3, 5, 5) + 9)
        layer.momentum = 0.1
    torch.testing.assert_close(layer.state_dict(), once.state_dict())
    assert layer.num_batches_tracked == 3
    assert (layer.running_mean > 0.5).all()
