"""The four arms: equal weights at step 0, and `undone` is the same function as `none`."""

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.layers import BatchNorm1d
from batchnorm.study.networks import ARMS, HIDDEN, build


@pytest.fixture
def x(blobs):
    return torch.from_numpy(blobs.train_x)


def arms(x, act, seed=0):
    return {arm: build(arm, x.shape[1], 4, act, seed, x) for arm in ARMS}


@pytest.mark.parametrize("act", ["sigmoid", "relu"])
def test_all_arms_of_a_seed_have_the_same_weights_and_other_seeds_others(x, act):
    networks = arms(x, act)
    weights = [[linear.weight for linear in [*n.linears, n.output]] for n in networks.values()]
    for others in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], others, strict=True))
    assert not torch.equal(build("none", x.shape[1], 4, act, 1, x).output.weight, weights[0][-1])


@pytest.mark.parametrize("act", ["sigmoid", "relu"])
def test_undone_equals_none_in_inference_but_not_in_training(x, act):
    networks = arms(x, act)
    none, undone = networks["none"].eval(), networks["undone"].eval()
    assert (none(x) - undone(x)).abs().max() < 1e-5
    small = x[:60]
    assert (none(small) - undone.hidden(small)[1]).abs().max() > 1e-3, "batch by batch there must be a difference"


def test_undone_holds_the_whole_training_sets_statistics(x):
    network = build("undone", x.shape[1], 4, "sigmoid", 0, x)
    rows = x.double()
    for linear, norm in zip(network.linears, network.batch_norms(), strict=True):
        values = rows @ linear.weight.double().T
        np.testing.assert_allclose(norm.running_mean, values.mean(0).detach(), atol=1e-6)
        np.testing.assert_allclose(norm.running_var, values.var(0, correction=0).detach(), rtol=1e-5)
        torch.testing.assert_close(norm.bias, norm.running_mean, rtol=0, atol=0, check_dtype=False, msg=None)
        np.testing.assert_allclose(norm.weight.detach(), (norm.running_var + norm.eps).sqrt(), rtol=1e-6)
        rows = torch.sigmoid(values)
        assert norm.training
        assert int(norm.num_batches_tracked) == 0


def test_the_arms_differ_only_in_their_batch_norm(x):
    networks = arms(x, "sigmoid")
    assert all(isinstance(norm, nn.Identity) for norm in networks["none"].norms)
    assert all(norm.weight is None and norm.bias is None for norm in networks["fixed"].batch_norms())
    for norm in networks["learned"].batch_norms():
        assert isinstance(norm, BatchNorm1d)
        assert torch.equal(norm.weight, torch.ones(norm.num_features))
        assert torch.equal(norm.bias, torch.zeros(norm.num_features))


@pytest.mark.parametrize("arm", ARMS)
def test_looking_gives_the_training_forward_and_moves_no_buffer(x, arm):
    network = build(arm, x.shape[1], 4, "relu", 0, x)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hidden, logits = network.hidden(x[:60])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [layer.x.shape[1] for layer in hidden] == list(HIDDEN)
    torch.testing.assert_close(logits, network(x[:60]))


def test_weights_have_the_stated_deviations(x):
    wide = torch.zeros(2, 784)
    sigmoid, relu = (build("none", 784, 10, act, 0, wide) for act in ("sigmoid", "relu"))
    assert abs(float(sigmoid.linears[0].weight.detach().std()) - 0.1) < 0.001
    assert abs(float(relu.linears[0].weight.detach().std()) - (2 / 784) ** 0.5) < 0.001
    assert all(not linear.bias.any() for linear in sigmoid.linears)


def test_an_unknown_arm_is_refused(x):
    with pytest.raises(ValueError, match="use one of none, learned, fixed, undone"):
        build("undon", x.shape[1], 4, "relu", 0, x)
