"""Each regime against its definition in float64, gradients and running statistics included, and its special cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import batchnorm as bn
import spec_variants as defined
from batchnorm import spec
from batchnorm.variants.domains import DomainBatchNorm1d, DomainBatchNorm2d, domain
from batchnorm.variants.ghost import GhostBatchNorm1d, GhostBatchNorm2d
from batchnorm.variants.renorm import BatchRenorm1d, BatchRenorm2d

SHAPES = {"rows": (13, 5), "sequences": (6, 5, 7), "images": (7, 5, 4, 3)}
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
NOW = {"rmax_steps": (0, 0), "dmax_steps": (0, 0)}


def given(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return (torch.randn(shape, dtype=torch.float64) * 3 + 2).requires_grad_(), torch.randn(shape, dtype=torch.float64)


def set_up(layer: Any) -> Any:
    """In float64, with gamma, beta and statistics that are not their start."""
    layer = layer.double()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name or name == "weight" else -0.5))
    return layer


def arrays(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.detach().numpy() for tensor in tensors]


def agrees(layer: Any, x: torch.Tensor, y: torch.Tensor, g: torch.Tensor, expected: Any, grads: spec.Gradients) -> None:
    y.backward(g)
    np.testing.assert_allclose(y.detach().numpy(), expected, **TIGHT)
    np.testing.assert_allclose(x.grad.numpy(), grads.dx, **TIGHT)
    if layer.weight is not None:
        np.testing.assert_allclose(layer.weight.grad.numpy(), grads.dgamma, **TIGHT)
        np.testing.assert_allclose(layer.bias.grad.numpy(), grads.dbeta, **TIGHT)


def moved(layer: Any, expected: tuple[Any, Any]) -> None:
    np.testing.assert_allclose(layer.running_mean.numpy(), expected[0], **TIGHT)
    np.testing.assert_allclose(layer.running_var.numpy(), expected[1], **TIGHT)


def one_for(shape: tuple[int, ...], flat: type, images: type) -> type:
    return images if len(shape) == 4 else flat


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_masked(shape: tuple[int, ...], affine: bool, seed: int) -> None:
    x, g = given(shape, seed)
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    layer = set_up(one_for(shape, bn.BatchNorm1d, bn.BatchNorm2d)(5, affine=affine))
    before = arrays(layer.running_mean.clone(), layer.running_var.clone())
    affine_arrays = arrays(layer.weight, layer.bias)
    y = layer(x, mask=mask)
    expected = defined.masked_forward(*arrays(x, mask), *affine_arrays)
    agrees(layer, x, y, g, expected, defined.masked_backward(*arrays(g, x, mask), *affine_arrays))
    rows = np.moveaxis(x.detach().numpy(), 1, -1)[mask.numpy()]
    for found, wanted in zip(
        (layer.running_mean, layer.running_var), spec.update_running(*before, rows, 0.1), strict=True
    ):
        np.testing.assert_allclose(found.numpy(), wanted, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_mask_of_all_ones_is_batch_norm(shape: tuple[int, ...]) -> None:
    x, g = given(shape, 0)
    layer = set_up(one_for(shape, bn.BatchNorm1d, bn.BatchNorm2d)(5))
    y = layer(x, mask=torch.ones(shape[0], *shape[2:], dtype=torch.bool))
    gamma, beta = arrays(layer.weight, layer.bias)
    agrees(layer, x, y, g, spec.forward(*arrays(x), gamma, beta), spec.backward(*arrays(g, x), gamma, beta))


def test_lengths_are_a_mask_and_residual_and_act_go_with_it() -> None:
    x, _ = given((4, 5, 9), 0)
    residual = torch.randn_like(x)
    layer = set_up(bn.BatchNorm1d(5, act="relu"))
    lengths = [9, 4, 0, 7]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(layer(x, residual, lengths=lengths), layer(x, residual, mask=mask))
    y = layer(x, residual, lengths=torch.tensor(lengths))
    assert (y.movedim(1, -1)[~mask] == 0).all()
    plain = spec.forward_inference if not layer.training else spec.forward
    gamma, beta = arrays(layer.weight, layer.bias)
    rows = plain(
        x.detach().movedim(1, -1)[mask].numpy(), gamma, beta, residual=residual.movedim(1, -1)[mask].numpy(), act="relu"
    )
    np.testing.assert_allclose(y.detach().movedim(1, -1)[mask].numpy(), rows, **TIGHT)


def test_masks_hold_in_eval_mode_and_padding_cannot_pollute() -> None:
    """pytorch/pytorch#70529: statistics over padded positions are not those of the data."""
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 8, dtype=torch.float64)
    x[0, 0], x[1, 0, :2] = torch.randn(8, dtype=torch.float64) + 5, torch.randn(2, dtype=torch.float64) + 5
    values = torch.cat([x[0, 0], x[1, 0, :2]])
    stock, ours = torch.nn.BatchNorm1d(1, momentum=1.0).double(), bn.BatchNorm1d(1, momentum=1.0).double()
    stock(x)
    ours(x, lengths=[8, 2])
    assert abs(stock.running_mean.item() - values.mean().item()) > 1.5
    torch.testing.assert_close(ours.running_mean[0], values.mean())
    torch.testing.assert_close(ours.running_var[0], values.var())
    assert (ours.eval()(x, lengths=[8, 2])[1, 0, 2:] == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": torch.ones(3, 2)}, "mask must be a tensor of bool"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, r"without channels, \(3, 2\)"),
        ({"lengths": [1, 2]}, "lengths must be 3 whole numbers"),
        ({"lengths": [1, 2, 3]}, "between 0 and 2"),
        ({"lengths": [1, 2, -1]}, "between 0 and 2"),
        ({"lengths": [1, 2, 2], "residual": torch.randn(3, 4, 1)}, "residual must have the input's shape"),
        ({"lengths": [0.5, 1, 2]}, "whole numbers"),
        ({"lengths": [1, 2, 2], "mask": torch.ones(3, 2, dtype=torch.bool)}, "not both"),
        ({"lengths": [1, 0, 0]}, "more than 1 value"),
    ],
)
def test_wrong_masks_are_refused_before_anything_moves(options: Any, words: str) -> None:
    layer = bn.BatchNorm1d(4)
    with pytest.raises((TypeError, ValueError), match=words):
        layer(torch.randn(3, 4, 2), **options)
    assert (layer.running_mean == 0).all()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("rmax", "dmax"), [(1.0, 0.0), (1.5, 0.2), (3.0, 5.0)])
def test_renorm(shape: tuple[int, ...], affine: bool, rmax: float, dmax: float) -> None:
    x, g = given(shape, 1)
    layer = set_up(one_for(shape, BatchRenorm1d, BatchRenorm2d)(5, affine=affine, rmax=rmax, dmax=dmax, **NOW))
    before = arrays(layer.running_mean.clone(), layer.running_var.clone())
    r, d = defined.renorm_correction(*arrays(x), *before, rmax, dmax)
    affine_arrays = arrays(layer.weight, layer.bias)
    y = layer(x)
    expected = defined.renorm_forward(*arrays(x), r, d, *affine_arrays)
    agrees(layer, x, y, g, expected, defined.renorm_backward(*arrays(g, x), r, d, *affine_arrays))
    for found, wanted in zip(
        (layer.running_mean, layer.running_var), spec.update_running(*before, *arrays(x), 0.1), strict=True
    ):
        np.testing.assert_allclose(found.numpy(), wanted, **TIGHT)


def test_renorm_unclipped_trains_as_it_infers() -> None:
    x, _ = given((13, 5), 0)
    layer = set_up(BatchRenorm1d(5, rmax=100.0, dmax=100.0, **NOW))
    inferred = layer.eval()(x).detach()
    torch.testing.assert_close(layer.train()(x).detach(), inferred)


def test_renorm_with_limits_of_1_and_0_is_batch_norm() -> None:
    x, g = given((7, 5, 4, 3), 2)
    layer = set_up(BatchRenorm2d(5, rmax=1.0, dmax=0.0, **NOW))
    gamma, beta = arrays(layer.weight, layer.bias)
    agrees(layer, x, layer(x), g, spec.forward(*arrays(x), gamma, beta), spec.backward(*arrays(g, x), gamma, beta))


def test_renorms_limits_grow_with_the_steps() -> None:
    layer = BatchRenorm1d(2, rmax=3.0, dmax=5.0)
    limits = {}
    for step in (0, 5_000, 15_000, 22_500, 25_000, 40_000, 10**6):
        layer.num_batches_tracked.fill_(step)
        limits[step] = tuple(each.item() for each in layer.limits())
    assert limits[0] == limits[5_000] == (1.0, 0.0)
    assert limits[15_000][1] == 2.5
    assert limits[22_500][0] == 2.0
    assert limits[25_000][1] == 5.0
    assert limits[40_000] == limits[10**6] == (3.0, 5.0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [2, 3])
def test_ghost(shape: tuple[int, ...], affine: bool, size: int) -> None:
    x, g = given(shape, 3)
    layer = set_up(one_for(shape, GhostBatchNorm1d, GhostBatchNorm2d)(5, size, affine=affine))
    before = arrays(layer.running_mean.clone(), layer.running_var.clone())
    ghosts = shape[0] // size
    affine_arrays = arrays(layer.weight, layer.bias)
    y = layer(x)
    expected = defined.ghost_forward(*arrays(x), ghosts, *affine_arrays)
    agrees(layer, x, y, g, expected, defined.ghost_backward(*arrays(g, x), ghosts, *affine_arrays))
    moved(layer, defined.ghost_running(*before, *arrays(x), ghosts, 0.1))
    assert layer.num_batches_tracked == 1


def test_one_virtual_batch_is_batch_norm() -> None:
    x, g = given((7, 5, 4, 3), 2)
    layer = set_up(GhostBatchNorm2d(5, 4))
    gamma, beta = arrays(layer.weight, layer.bias)
    agrees(layer, x, layer(x), g, spec.forward(*arrays(x), gamma, beta), spec.backward(*arrays(g, x), gamma, beta))


def test_ghosts_take_neither_masks_nor_accumulation() -> None:
    layer = GhostBatchNorm1d(4, 2)
    with pytest.raises(TypeError, match="takes no mask and no lengths"):
        layer(torch.randn(6, 4, 3), lengths=[3] * 6)
    with pytest.raises(ValueError, match="takes no accumulate"):
        GhostBatchNorm1d(4, 2, accumulate=2)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("kind", ["batch norm", "renorm", "ghost", "domain"])
def test_a_batch_of_one_is_refused_or_normalized_by_the_running_statistics(kind: str, shape: tuple[int, ...]) -> None:
    """mmsegmentation#272: the last batch of an epoch has one sample, and the training ends."""
    flat = len(shape) < 4
    made: Any = {
        "batch norm": lambda **o: (bn.BatchNorm1d if flat else bn.BatchNorm2d)(4, **o),
        "renorm": lambda **o: (BatchRenorm1d if flat else BatchRenorm2d)(4, **o),
        "ghost": lambda **o: (GhostBatchNorm1d if flat else GhostBatchNorm2d)(4, 2, **o),
        "domain": lambda **o: (DomainBatchNorm1d if flat else DomainBatchNorm2d)(4, 2, **o),
    }[kind]
    x, g = given(shape, 0)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        set_up(made())(x)
    layer = set_up(made(batch_of_one="running"))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    arguments = arrays(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    y = layer(x)
    agrees(layer, x, y, g, spec.forward_inference(*arguments), spec.backward_inference(g.numpy(), *arguments))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    many, _ = given((3, *shape[1:]), 1)
    layer(many)
    assert not torch.equal(layer.running_mean, before["running_mean"]), "two values or more are a batch"


def test_another_choice_for_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match='batch_of_one must be "error" or "running"'):
        bn.BatchNorm1d(4, batch_of_one="skip")


def test_masks_go_through_fx_and_lazy_layers() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.norm(x, lengths=lengths)

    net, x, lengths = Net(), torch.randn(3, 4, 5), torch.tensor([5, 2, 0])
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x, lengths), bn.BatchNorm1d(4)(x, lengths=lengths))
    torch.testing.assert_close(bn.LazyBatchNorm1d()(x, lengths=lengths), bn.BatchNorm1d(4)(x, lengths=lengths))


def test_domains_have_separate_statistics_and_share_gamma_and_beta() -> None:
    """ganhacks#9: real and generated batches through one discriminator mix their statistics."""
    x, _ = given((7, 5, 4, 3), 0)
    layer = set_up(DomainBatchNorm2d(5, 2))
    before = layer.state_dict()
    first = before["running_mean"].clone()
    with domain(1):
        layer(x)
    assert torch.equal(layer.running_mean, first)
    assert layer.num_batches_tracked_1 == 1
    assert layer.num_batches_tracked == 0
    with domain(1):
        layer.eval()
        wanted = spec.forward_inference(*arrays(x, layer.running_mean_1, layer.running_var_1, layer.weight, layer.bias))
        np.testing.assert_allclose(layer(x).detach().numpy(), wanted, **TIGHT)


def test_a_domain_ends_with_its_block() -> None:
    layer = DomainBatchNorm1d(4, 3)
    with domain(1):
        with pytest.raises(RuntimeError), domain(2):
            raise RuntimeError
        layer(torch.randn(5, 4))
    layer(torch.randn(5, 4))
    assert [layer.num_batches_tracked, layer.num_batches_tracked_1, layer.num_batches_tracked_2] == [1, 1, 0]


@pytest.mark.parametrize("number", [None, 1.0, True, "1"])
def test_a_domain_is_a_number(number: Any) -> None:
    with pytest.raises(TypeError, match="domain needs an integer"), domain(number):
        pass


def test_domains_load_a_batch_norms_checkpoint_and_give_domain_0_back() -> None:
    plain, layer = set_up(bn.BatchNorm1d(4)), DomainBatchNorm1d(4, 3).double()
    layer.load_state_dict(plain.state_dict())
    for number in (1, 2):
        assert torch.equal(getattr(layer, f"running_var_{number}"), plain.running_var)
    with pytest.raises(IndexError, match="domain 3 is out of range: this layer has 3"), domain(3):
        layer(torch.randn(4, 4, dtype=torch.float64))
    assert not bn.BatchNorm1d(4).double().load_state_dict(layer.state_dict(), strict=False).missing_keys


@pytest.mark.parametrize("make", [lambda: BatchRenorm1d(4), lambda: GhostBatchNorm1d(4, 2)])
def test_checkpoints_are_those_of_batch_norm(make: Any) -> None:
    plain, layer = set_up(bn.BatchNorm1d(4)), make().double()
    layer.load_state_dict(plain.state_dict())
    x, _ = given((5, 4), 0)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    plain.load_state_dict(layer.state_dict())
