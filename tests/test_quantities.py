"""Every quantity against brute force over the actual x, y and gradients, and PyTorch's autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm import quantities as q
from batchnorm import spec

NAN, INF = math.nan, math.inf


@pytest.fixture
def batch() -> np.ndarray:
    """x (m, C): units with different means and deviations."""
    random = np.random.default_rng(11)
    return random.normal(random.normal(0, 2, 6), random.uniform(0.2, 3, 6), (40, 6))


@pytest.fixture
def learned() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(12)
    return random.normal(0, 2, 6), random.normal(0, 2, 6)


def rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt((values**2).mean(0))


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_undo_distance_is_the_rms_of_y_minus_x(batch, learned, eps: float) -> None:
    mean, var = spec.statistics(batch)
    y = spec.forward(batch, *learned, eps=eps)
    np.testing.assert_allclose(q.undo_distance(mean, var, eps, *learned), rms(y - batch), rtol=10 * eps + 1e-12)


def test_undo_distance_is_exact_with_any_eps_once_xhats_variance_is_counted(batch, learned) -> None:
    eps, (gamma, beta) = 0.7, learned
    mean, var = spec.statistics(batch)
    weighted = np.hypot((gamma - q.scale(var, eps)) * np.sqrt(var / (var + eps)), beta - mean)
    np.testing.assert_allclose(weighted, rms(spec.forward(batch, gamma, beta, eps=eps) - batch), rtol=1e-12)
    assert (q.undo_distance(mean, var, eps, gamma, beta) >= weighted).all()


def test_bare_distance_is_the_rms_of_xhat_minus_x(batch) -> None:
    mean, var = spec.statistics(batch)
    np.testing.assert_allclose(q.bare_distance(mean, var, 0.0), rms(spec.forward(batch, eps=0.0) - batch), rtol=1e-12)


def test_undo_index_compares_the_distances_from_the_identity(batch, learned) -> None:
    mean, var = spec.statistics(batch)
    y, xhat = spec.forward(batch, *learned, eps=0.0), spec.forward(batch, eps=0.0)
    expected = 1 - rms(y - batch) / rms(xhat - batch)
    np.testing.assert_allclose(q.undo_index(mean, var, 0.0, *learned), expected, rtol=1e-10)
    s = q.scale(var, 1e-5)
    np.testing.assert_array_equal(q.undo_index(mean, var, 1e-5, s, mean), 1)
    np.testing.assert_array_equal(q.undo_index(mean, var, 1e-5, np.ones(6), np.zeros(6)), 0)
    assert (q.undo_index(mean, var, 1e-5, np.full(6, 1e9), mean) < -1e6).all()
    assert np.isnan(q.undo_index([0.0], [1.0], 0.0, [2.0], [0.0])), "bare normalization is the identity"


@pytest.mark.parametrize("mean", [0.0, 0.099, -0.07])
@pytest.mark.parametrize("gamma", [1.0, -3.0, 1e6])
def test_undo_index_is_nan_where_there_is_nothing_to_undo(mean: float, gamma: float) -> None:
    """However far gamma went: a denominator near 0 would make it a huge number without a meaning (-21,764 was seen)."""
    assert np.isnan(q.undo_index([mean], [1.0], 0.0, [gamma], [0.5]))
    assert np.isfinite(q.undo_index([mean], [1.25], 0.0, [gamma], [0.5])), "s is 1.118: there is something"


def angle_by_trigonometry(x: np.ndarray, y: np.ndarray) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, float(x @ y) / (math.hypot(*x) * math.hypot(*y))))))


def test_undo_angle_is_the_angle_between_gamma_beta_and_s_mean(batch, learned) -> None:
    mean, var = spec.statistics(batch)
    s = q.scale(var, 1e-5)
    pairs = list(zip(np.stack(learned).T, np.stack([s, mean]).T, strict=True))
    expected = [angle_by_trigonometry(one, other) for one, other in pairs]
    np.testing.assert_allclose(q.undo_angle(mean, var, 1e-5, *learned), expected, atol=1e-6)
    bare = [angle_by_trigonometry(np.array([1.0, 0.0]), other) for _, other in pairs]
    np.testing.assert_allclose(q.bare_angle(mean, var, 1e-5), bare, atol=1e-6)
    np.testing.assert_array_equal(q.undo_angle(mean, var, 1e-5, s, mean), 0)
    np.testing.assert_allclose(q.undo_angle(mean, var, 1e-5, 7 * s, 7 * mean), 0, atol=1e-12)
    np.testing.assert_allclose(q.undo_angle(mean, var, 1e-5, -s, -mean), 180, atol=1e-12)
    assert np.isnan(q.undo_angle([1.0], [1.0], 0.0, [0.0], [0.0])), "no direction at all"


def test_undo_angle_is_that_between_y_and_x_in_the_plane_that_holds_both(batch, learned) -> None:
    """x = s·xhat + mean·1 and y = gamma·xhat + beta·1, and xhat and 1 are orthogonal: the cosine of samples agrees."""
    mean, var = spec.statistics(batch)
    y = spec.forward(batch, *learned, eps=0.0)
    cosine = (y * batch).sum(0) / np.sqrt((y**2).sum(0) * (batch**2).sum(0))
    np.testing.assert_allclose(q.undo_angle(mean, var, 0.0, *learned), np.degrees(np.arccos(cosine)), rtol=1e-9)


@given(
    mean=st.floats(-1e3, 1e3),
    s=st.floats(1e-3, 1e3),
    gamma=st.floats(-1e3, 1e3),
    beta=st.floats(-1e3, 1e3),
    scale=st.floats(1e-6, 1e6),
)
def test_angles_are_free_of_the_scale_of_the_weights_below(mean, s, gamma, beta, scale) -> None:
    """Weights times c > 0: mean and s times c, the same function (with eps scaled alike, exactly)."""
    for function, affine in ((q.undo_angle, ([gamma], [beta])), (q.bare_angle, ())):
        found = function([mean], [s**2], 1e-8, *affine)
        scaled = function([scale * mean], [scale**2 * s**2], scale**2 * 1e-8, *affine)
        np.testing.assert_allclose(scaled, found, rtol=1e-9, atol=1e-9)
        assert np.isnan(found).all() or (found >= 0).all() <= 180


def test_angle_ratio_needs_a_bare_angle_to_measure_by() -> None:
    np.testing.assert_array_equal(q.angle_ratio([0.0, 20.0, 90.0, 5.0], [40.0, 40.0, 30.0, 0.99]), [0, 0.5, 3, NAN])
    assert np.isnan(q.angle_ratio(NAN, 30.0))


def classes_of(*arguments, **options) -> list[str]:
    return [q.CLASSES[int(code)] for code in q.unit_class(*arguments, **options)]


def test_every_class_is_found_by_its_definition() -> None:
    mean, var = np.full(8, 3.0), np.full(8, 16.0)  # s = 4: the identity is (4, 3), bare is (1, 0), sqrt(18) apart
    way = np.array([1.0, 0.5, 0.3, 0.05, -0.05, -0.3])
    gamma = np.array([*(1 + 3 * way), 0.0, NAN])
    beta = np.array([*(3 * way), 3.0, 0.0])
    expected = ["undone", "undone", "toward", "neither", "neither", "away", "dead", "unknown"]
    assert classes_of(mean, var, 0.0, gamma, beta) == expected
    assert classes_of([0.05], [1.0], 0.0, [5.0], [5.0]) == ["nothing_to_undo"]


@pytest.mark.parametrize(("way", "name"), [(0.5 + 1e-9, "undone"), (0.5 - 1e-9, "toward"), (0.1 + 1e-9, "toward"),
                                           (0.1 - 1e-9, "neither"), (-0.1 + 1e-9, "neither"), (-0.1 - 1e-9, "away")],
)  # fmt: skip
def test_the_thresholds_of_the_classes(way: float, name: str) -> None:
    """Straight to the identity, the share of the way is the index; straight away from it, minus that share."""
    assert classes_of([3.0], [16.0], 0.0, [1 + 3 * way], [3 * way]) == [name]


def test_passing_the_identity_and_going_on_is_not_undone() -> None:
    """y is nearer to x than to xhat, and yet farther from x than xhat is: the case that was counted as undone."""
    gamma, beta = np.array([11.0]), np.array([10.0])
    assert math.hypot(11 - 4, 10 - 3) < math.hypot(11 - 1, 10), "nearer to undone than to bare"
    assert classes_of([3.0], [16.0], 0.0, gamma, beta) == ["away"]


def test_dead_is_an_output_without_deviation_against_its_layer() -> None:
    var = np.array([1.0, 1.0, 1e4, 0.0, 1.0, 1.0])
    gamma = np.array([1.0, 0.005, 1.0, 1.0, -1.0, 0.0])
    np.testing.assert_array_equal(q.dead(var, 1e-5, gamma), [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(q.dead(var, 1e-5, 1e-4 * gamma), [0, 1, 0, 1, 0, 1]), "only the proportion counts"
    np.testing.assert_array_equal(q.dead(np.ones(3), 0.0, np.full(3, 1e-9)), 0), "alike in the whole layer"
    np.testing.assert_array_equal(q.dead([1.0, NAN, -1.0], 0.0, [1.0, 1.0, 1.0]), [0, NAN, NAN])
    np.testing.assert_array_equal(q.dead([1.0, 1.0], 0.0, [1.0, 1.0], [False, True]), [0, 1])


def test_dead_is_by_layer_in_every_row() -> None:
    gamma = np.array([[1.0, 1.0, 0.001], [0.001, 0.001, 0.001]])
    np.testing.assert_array_equal(q.dead(np.ones((2, 3)), 0.0, gamma), [[0, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize(("act", "expected"), [("relu", [True, False]), ("relu6", [True, False]),
                                               ("sigmoid", [False, False]), (None, [False, False])])  # fmt: skip
def test_silent_is_a_relu_that_lets_nothing_pass(act, expected) -> None:
    np.testing.assert_array_equal(q.silent(act, [0.0, 0.25]), expected)


def slow_class(mean: float, var: float, eps: float, gamma: float, beta: float, layer_rms: float, silent: bool) -> str:
    """The table of the definitions, row by row, for one unit."""
    if not all(map(math.isfinite, (mean, var, gamma, beta))) or var < 0 or var + eps <= 0:
        return "unknown"
    s = math.sqrt(var + eps)
    deviation = abs(gamma) * math.sqrt(var / (var + eps))
    bare = math.hypot(1 - s, mean)
    if deviation == 0 or deviation < 0.01 * layer_rms or silent:
        return "dead"
    if bare < 0.1:
        return "nothing_to_undo"
    index = 1 - math.hypot(gamma - s, beta - mean) / bare
    return "undone" if index >= 0.5 else "toward" if index >= 0.1 else "neither" if index > -0.1 else "away"


def test_classes_against_the_table_read_unit_by_unit() -> None:
    random = np.random.default_rng(5)
    rows, units, eps = 40, 50, 1e-3
    mean, var = random.normal(0, 1, (rows, units)), random.gamma(1, 1, (rows, units))
    gamma, beta = random.normal(0.5, 1, (rows, units)), random.normal(0, 1, (rows, units))
    var[random.random(var.shape) < 0.05] = 0.0
    gamma[random.random(var.shape) < 0.05] *= 1e-3
    for array in (mean, var, gamma, beta):
        array[random.random(array.shape) < 0.02] = random.choice([NAN, INF, -INF])
    var[random.random(var.shape) < 0.02] = -1e-4
    mean[:, :5], var[:, :5] = 0.01, 1.0
    silent = random.random(var.shape) < 0.05
    found = q.unit_class(mean, var, eps, gamma, beta, silent)
    seen = set()
    for row in range(rows):
        with np.errstate(invalid="ignore"):
            deviations = np.abs(gamma[row]) * np.sqrt(var[row] / (var[row] + eps))
        layer_rms = math.sqrt((deviations[np.isfinite(deviations)] ** 2).mean())
        for unit in range(units):
            values = (float(a[row, unit]) for a in (mean, var))
            learned = (float(a[row, unit]) for a in (gamma, beta))
            expected = slow_class(*values, eps, *learned, layer_rms, bool(silent[row, unit]))
            assert q.CLASSES[int(found[row, unit])] == expected, (row, unit)
            seen.add(expected)
    assert seen == set(q.CLASSES), "the example should have all of them"


def test_every_class_is_defined_in_words() -> None:
    assert set(q.CLASS_DEFINITIONS) == set(q.CLASSES)


def test_positions_are_the_mean_in_deviations_before_and_after(batch, learned) -> None:
    mean, var = spec.statistics(batch)
    gamma, beta = learned
    y = spec.forward(batch, gamma, beta, eps=0.0)
    np.testing.assert_allclose(q.position_in(mean, var, 0.0), batch.mean(0) / batch.std(0), rtol=1e-12)
    np.testing.assert_allclose(np.abs(q.position_out(gamma, beta)), np.abs(y.mean(0)) / y.std(0), rtol=1e-10)
    s = q.scale(var, 1e-5)
    np.testing.assert_array_equal(q.position_out(s, mean), q.position_in(mean, var, 1e-5))
    np.testing.assert_allclose(q.position_in(3 * mean, 9 * var, 0.0), q.position_in(mean, var, 0.0), rtol=1e-14)


def test_positive_share_counts_what_a_relu_passes(batch) -> None:
    expected = [sum(1 for v in unit if max(v, 0) > 0) / len(unit) for unit in batch.T]
    np.testing.assert_allclose(q.positive_share(batch), expected, rtol=1e-15)
    assert q.positive_share([[0.0], [-0.0], [1.0], [INF]]) == 0.5
    assert np.isnan(q.positive_share([[NAN], [1.0]]))


def autograd_gradients(x: np.ndarray, eps: float, act: bool) -> tuple[np.ndarray, ...]:
    """g at y, dx, dgamma, dbeta, all from PyTorch, with gamma = s and beta = mean: where y = x, exactly."""
    mean, var = spec.statistics(x)
    leaf = torch.tensor(x, requires_grad=True)
    gamma, beta = torch.tensor(q.scale(var, eps), requires_grad=True), torch.tensor(mean, requires_grad=True)
    y = F.batch_norm(leaf, None, None, gamma, beta, True, 0.1, eps)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
    loss = ((torch.sigmoid(y) if act else y**3) * weights).sum()
    g, dx, dgamma, dbeta = torch.autograd.grad(loss, (y, leaf, gamma, beta))
    return g.numpy(), dx.numpy(), dgamma.numpy(), dbeta.numpy()


@pytest.mark.parametrize("act", [True, False])
def test_gradient_diverted_is_the_energy_that_autograd_does_not_pass_on(batch, act: bool) -> None:
    eps = 1e-12
    g, dx, dgamma, dbeta = autograd_gradients(batch, eps, act)
    energy = (g**2).sum(0)
    diverted = q.gradient_diverted(dgamma, dbeta, energy, batch.var(0), eps, len(batch))
    np.testing.assert_allclose(diverted, 1 - (dx**2).sum(0) / energy, rtol=1e-8)
    assert ((diverted > 0) & (diverted < 1)).all()


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gradient_diverted_is_the_projection_on_1_and_xhat_with_any_eps(batch, eps: float) -> None:
    g, _, dgamma, dbeta = autograd_gradients(batch, eps, True)
    xhat = spec.forward(batch, eps=eps)
    expected = []
    for unit in range(6):
        basis, _ = np.linalg.qr(np.stack([np.ones(len(g)), xhat[:, unit]], 1))
        expected.append(((basis.T @ g[:, unit]) ** 2).sum() / (g[:, unit] ** 2).sum())
    diverted = q.gradient_diverted(dgamma, dbeta, (g**2).sum(0), batch.var(0), eps, len(batch))
    np.testing.assert_allclose(diverted, expected, rtol=1e-10)


def test_gradient_diverted_reaches_both_ends_of_its_range() -> None:
    x = np.array([[1.0], [2.0], [3.0], [4.0]])
    xhat = spec.forward(x, eps=0.0)[:, 0]
    for g, expected in [(np.ones(4), 1.0), (xhat, 1.0), (3 * xhat - 2, 1.0), (np.array([1.0, -1, -1, 1]), 0.0)]:
        got = q.gradient_diverted([(g * xhat).sum()], [g.sum()], [(g**2).sum()], x.var(0), 0.0, 4)
        assert got == pytest.approx(expected, abs=1e-12)


def test_gradient_diverted_where_something_is_missing() -> None:
    assert np.isnan(q.gradient_diverted([0.0], [0.0], [0.0], [1.0], 1e-5, 4)), "no gradient arrived"
    assert q.gradient_diverted([0.0], [2.0], [4.0], [0.0], 1e-5, 4) == 0.25, "a constant input has no xhat"
    assert q.gradient_diverted([0.0], [3.0], [9.0], [0.0], 1e-5, 1) == 1.0, "one value: all of it is the mean"
    for bad in [([NAN], [1.0], [4.0], [1.0]), ([1.0], [NAN], [4.0], [1.0]), ([1.0], [1.0], [NAN], [1.0])]:
        assert np.isnan(q.gradient_diverted(*bad, 1e-5, 4))
    assert np.isnan(q.gradient_diverted([1.0], [1.0], [4.0], [NAN], 1e-5, 4)), "an unknown variance is not 0"


def test_batch_noise_is_the_variance_between_batches(batch) -> None:
    batches = batch.reshape(8, 5, 6)
    means, variances = batches.mean(1), batches.var(1)
    noise = q.batch_noise(means, variances, 0.01)
    average = means.sum(0) / 8
    by_hand = sum((m - average) ** 2 for m in means) / 7
    np.testing.assert_allclose(noise.mean, by_hand / (sum(variances) / 8), rtol=1e-12)
    logs = np.log(np.sqrt(variances + 0.01))
    np.testing.assert_allclose(noise.log_scale, sum((v - logs.mean(0)) ** 2 for v in logs) / 7, rtol=1e-12)


def test_batch_noise_of_independent_normal_values_is_1_over_m_and_half() -> None:
    x = np.random.default_rng(0).normal(3, 2, (4000, 50, 4))
    noise = q.batch_noise(x.mean(1), x.var(1), 0.0)
    np.testing.assert_allclose(noise.mean, 1 / 50, rtol=0.15)
    np.testing.assert_allclose(noise.log_scale, 1 / 100, rtol=0.15)


def test_batch_noise_of_one_batch_is_unknown_and_of_equal_ones_0() -> None:
    assert np.isnan(q.batch_noise(np.ones((1, 3)), np.ones((1, 3)), 0.0)).all()
    assert np.isnan(q.batch_noise(np.ones((0, 3)), np.ones((0, 3)), 0.0)).all()
    assert not np.any(q.batch_noise(np.ones((4, 3)), np.ones((4, 3)), 0.0))
    assert np.isnan(q.batch_noise(np.zeros((2, 1)), np.zeros((2, 1)), 0.0)).all()


def test_drift_is_how_far_the_distribution_moved_per_step() -> None:
    x = np.random.default_rng(3).normal(size=(500, 2))
    before, after = 2 * x + 1, 3 * x - 2
    moments = before.mean(0), before.std(0), after.mean(0), after.std(0)
    drift = q.drift(*moments, steps=10)
    np.testing.assert_allclose(drift.location, np.abs(after.mean(0) - before.mean(0)) / before.std(0) / 10, rtol=1e-12)
    np.testing.assert_allclose(drift.log_scale, math.log(1.5) / 10, rtol=1e-12)
    assert not np.any(q.drift(*moments[:2], *moments[:2]))


def test_drift_of_gamma_does_not_see_its_sign_and_a_lost_scale_is_infinite() -> None:
    flipped = q.drift([1.0], [2.0], [1.0], [-2.0])
    assert (flipped.location, flipped.log_scale) == (0, 0)
    vanished = q.drift([1.0], [2.0], [1.0], [0.0])
    assert vanished.log_scale == INF
    assert np.isnan(q.drift([0.0], [0.0], [0.0], [0.0])).all()


@pytest.mark.parametrize("act", list(spec.ACTIVATIONS))
def test_linear_share_is_where_autograds_slope_is_near_its_steepest(act: str) -> None:
    y = np.random.default_rng(5).normal(0, 2, (300, 3))
    apply = {"leaky_relu": lambda z: F.leaky_relu(z, 0.3)}.get(act) or getattr(F, act)

    def slope(z: np.ndarray) -> np.ndarray:
        leaf = torch.tensor(z, requires_grad=True)
        return torch.autograd.grad(apply(leaf).sum(), leaf)[0].numpy()

    steepest = slope(np.linspace(-20, 20, 400_001)).max()
    expected = (slope(y) >= 0.9 * steepest).mean(0)
    np.testing.assert_allclose(q.linear_share(y, act, 0.3), expected, rtol=1e-12)
    assert ((expected > 0) & (expected < 1)).all()


def test_linear_share_without_an_activation_is_1_and_of_unknown_values_unknown() -> None:
    assert q.linear_share([[5.0], [-100.0]], None) == 1
    assert np.isnan(q.linear_share([[NAN], [0.0]], "sigmoid"))
    assert np.isnan(q.linear_share(np.ones((0, 2)), "sigmoid")).all()
    np.testing.assert_allclose(q.linear_share(np.full((4, 1), 0.6), "sigmoid"), 1)
    np.testing.assert_allclose(q.linear_share(np.full((4, 1), 0.7), "sigmoid"), 0)


def test_every_result_has_one_value_a_unit_in_float64(batch, learned) -> None:
    mean, var = (v.astype(np.float32) for v in spec.statistics(batch))
    gamma, beta = (v.astype(np.float32) for v in learned)
    results = [
        q.scale(var, 1e-5),
        q.undo_distance(mean, var, 1e-5, gamma, beta),
        q.bare_distance(mean, var, 1e-5),
        q.undo_index(mean, var, 1e-5, gamma, beta),
        q.undo_angle(mean, var, 1e-5, gamma, beta),
        q.bare_angle(mean, var, 1e-5),
        q.angle_ratio(mean, var),
        q.unit_class(mean, var, 1e-5, gamma, beta),
        q.output_deviation(var, 1e-5, gamma),
        q.position_in(mean, var, 1e-5),
        q.position_out(gamma, beta),
        q.positive_share(batch),
        q.gradient_diverted(gamma, beta, var, var, 1e-5, 4),
        *q.batch_noise(batch, batch**2, 1e-5),
        *q.drift(mean, var, beta, gamma),
        q.linear_share(batch, "tanh"),
        q.dead(var, 1e-5, gamma),
    ]
    assert {(r.shape, r.dtype) for r in results} == {((6,), np.dtype(np.float64))}


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0])
def test_a_diverged_network_gives_nan_not_warnings_or_errors(value: float) -> None:
    v = [value]
    with np.errstate(all="raise"):
        for eps in (0.0, 1e-5):
            q.undo_index(v, v, eps, v, v)
            q.undo_angle(v, v, eps, v, v)
            q.bare_angle(v, v, eps)
            q.unit_class(v, v, eps, v, v)
            q.dead(v, eps, v)
            q.position_in(v, v, eps)
            q.batch_noise([v, v], [v, v], eps)
            q.gradient_diverted(v, v, v, v, eps, 4)
        q.position_out(v, v)
        q.drift(v, v, v, v, 1)
        for act in (None, *spec.ACTIVATIONS):
            q.linear_share([v], act)
        q.angle_ratio(v, v)
    if math.isnan(value):
        assert np.isnan([q.undo_index(v, v, 0.0, v, v), q.position_in(v, v, 0.0), q.positive_share([v])]).all()


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (17, 5), (1000, 4)])
def test_percentiles_are_numpys(shape):
    values = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_allclose(q.percentiles(values), np.percentile(values, [15, 50, 85], axis=0), rtol=1e-12)


def test_percentiles_of_nan_and_of_nothing_are_unknown():
    values = np.array([[1.0, np.nan], [2.0, 5.0], [3.0, 6.0]])
    found = q.percentiles(values)
    assert found[1, 0] == 2.0
    assert np.isnan(found[:, 1]).all()
    assert np.isnan(q.percentiles(np.zeros((0, 2)))).all()


def test_eval_gap_is_the_rms_difference_of_inference():
    rng = np.random.default_rng(1)
    x = rng.normal(1.5, 2.0, size=(400, 3))
    running_mean, running_var = rng.normal(size=3), rng.uniform(0.5, 3, 3)
    mean, var = x.mean(0), x.var(0)
    trained, evaluated = (x - mean) / np.sqrt(var), (x - running_mean) / np.sqrt(running_var)
    expected = np.sqrt(((evaluated - trained) ** 2).mean(0))
    np.testing.assert_allclose(q.eval_gap(mean, var, running_mean, running_var, 0.0), expected)
    assert (q.eval_gap(mean, var, mean, var, 1e-5) == 0).all()
    assert np.isnan(q.eval_gap(mean, var, np.nan, var, 1e-5)).all()


def test_effective_lr_is_of_the_direction():
    np.testing.assert_allclose(q.effective_lr(0.1, [1.0, 2.0, np.nan]), [0.1, 0.025, np.nan])
    assert np.isinf(q.effective_lr(0.1, [0.0])).all()
