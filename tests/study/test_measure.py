"""The numbers of a snapshot against computation by hand."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from batchnorm import quantities as q
from batchnorm.kernels.contract import GradSums, Pass, Tap
from batchnorm.study import measure
from batchnorm.study.networks import EPS, build


@pytest.fixture
def rows(blobs):
    return torch.from_numpy(blobs.train_x)


def test_score_is_cross_entropy_and_accuracy_in_inference_mode(blobs, rows):
    network = build("learned", 12, 4, "sigmoid", 0, rows)
    x, y = torch.from_numpy(blobs.test_x), torch.from_numpy(blobs.test_y)
    score = measure.score(network, x, y)
    logits = network.eval()(x)
    assert score.loss == pytest.approx(float(cross_entropy(logits, y).detach()))
    assert score.accuracy == np.mean(logits.argmax(1).numpy() == blobs.test_y)
    network.train()
    assert not torch.allclose(network(x), score.logits), "in training mode the logits are others"


def test_scoring_leaves_the_network_in_training_and_its_buffers_alone(blobs, rows):
    network = build("learned", 12, 4, "sigmoid", 0, rows)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measure.score(network, rows, torch.from_numpy(blobs.train_y))
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("arm", ["none", "learned", "fixed", "undone"])
@pytest.mark.parametrize("act", ["sigmoid", "relu"])
def test_state_columns_are_the_quantities_of_the_actual_activations(rows, arm, act):
    network = build(arm, 12, 4, act, 0, rows)
    noises = measure.noise(network, rows.split(60))
    for layer, noise in zip(measure.states(network, rows), noises, strict=True):
        columns = measure.state_columns(layer, noise, act)
        x, y = layer.x.double().numpy(), layer.y.double().numpy()
        np.testing.assert_allclose(columns["mean"], x.mean(0))
        np.testing.assert_allclose(columns["s"], np.sqrt(x.var(0) + EPS))
        np.testing.assert_allclose(columns["positive_in"], (x > 0).mean(0))
        np.testing.assert_allclose(columns["positive_out"], (y > 0).mean(0))
        np.testing.assert_allclose(columns["out_p85"], np.percentile(y, 85, axis=0))
        if arm == "none":
            assert np.isnan(columns["undo_index"]).all()
            np.testing.assert_array_equal(columns["out_p15"], columns["in_p15"])
        else:
            rms = np.sqrt(((y - x) ** 2).mean(0))
            np.testing.assert_allclose(columns["undo_distance"], rms, rtol=1e-2, atol=1e-4)
            flat = y.std(0) < 0.01 * np.sqrt((y.std(0) ** 2).mean())
            silent = (y <= 0).all(0) if act == "relu" else np.zeros(len(flat), bool)
            np.testing.assert_array_equal(columns["class"] == "dead", flat | silent)
            np.testing.assert_array_equal(columns["dead"], flat | silent)
        if arm == "fixed":
            np.testing.assert_allclose(columns["undo_index"][np.isfinite(columns["undo_index"])], 0, atol=1e-12)
            np.testing.assert_allclose(columns["undo_angle"], columns["bare_angle"])
            assert set(columns["class"]) <= {"neither", "nothing_to_undo"}
        if arm == "undone":
            assert set(columns["class"]) <= {"undone", "nothing_to_undo", "dead"}


def test_noise_is_of_the_actual_batches(rows):
    network = build("learned", 12, 4, "sigmoid", 0, rows)
    batches = rows.split(60)
    noise = measure.noise(network, batches)
    x = [network.hidden(batch)[0][2].x.detach().double().numpy() for batch in batches]
    means, variances = np.array([b.mean(0) for b in x]), np.array([b.var(0) for b in x])
    np.testing.assert_allclose(noise[2].mean, means.var(0, ddof=1) / variances.mean(0))


def test_step_columns_read_the_taps():
    c = torch.ones(3)
    tap = Tap([Pass(60, c, c, [GradSums(dbeta=3 * c, dgamma=2 * c, energy=40 * c)])])
    columns = measure.step_columns(tap)
    expected = q.gradient_diverted(np.full(3, 2.0), np.full(3, 3.0), np.full(3, 40.0), np.ones(3), EPS, 60)
    np.testing.assert_allclose(columns["gradient_diverted"], expected)
    with pytest.raises(ValueError, match="not enough values"):
        measure.step_columns(Tap())


def test_drift_columns_are_per_step_and_unknown_without_batch_norm(rows):
    network = build("learned", 12, 4, "sigmoid", 0, rows)
    before = measure.states(network, rows)
    var = before[0].x.double().numpy().var(0)
    norm = next(network.batch_norms())
    with torch.no_grad():
        network.linears[0].weight.mul_(1.5)
        norm.weight.mul_(2)
        norm.bias.add_(0.25)
    first = measure.drift_columns(before[0], measure.states(network, rows)[0])
    expected = 0.5 * np.log((1.5**2 * var + EPS) / (var + EPS))
    np.testing.assert_allclose(first["drift_in_log_scale"], expected, rtol=1e-5)
    np.testing.assert_allclose(first["drift_out_log_scale"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(first["drift_out_location"], 0.25, rtol=1e-6)
    bare = measure.states(build("none", 12, 4, "sigmoid", 0, rows), rows)[0]
    assert np.isnan(measure.drift_columns(bare, bare)["drift_out_location"]).all()
