"""`spec` against PyTorch's autograd in float64, finite differences, and computation by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from accuracy import ACTIVATIONS, KINKS, activate
from batchnorm import spec

SHAPES = [(7, 3), (4, 3, 5), (3, 2, 4, 3), (2, 3, 2, 3, 2), (1, 2, 6), (5, 1)]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Sample:
    """Random x, gradient, gamma, beta, residual and running statistics of one shape."""

    def __init__(self, shape: tuple[int, ...], affine: str = "both", residual: bool = True, act: str | None = None):
        random = np.random.default_rng(3)
        c = shape[1]
        self.x = random.normal(0.7, 2.0, shape)
        self.grad_y = random.normal(size=shape)
        self.gamma = random.normal(size=c) if affine in ("both", "gamma") else None
        self.beta = random.normal(size=c) if affine in ("both", "beta") else None
        self.residual = random.normal(size=shape) if residual else None
        self.running = random.normal(size=c), random.uniform(0.5, 2, c)
        self.how = {"eps": 0.03, "residual": self.residual, "act": act, "slope": 0.2}

    def forward(self, training: bool) -> np.ndarray:
        if training:
            return spec.forward(self.x, self.gamma, self.beta, **self.how)
        return spec.forward_inference(self.x, *self.running, self.gamma, self.beta, **self.how)

    def backward(self, training: bool) -> spec.Gradients:
        if training:
            return spec.backward(self.grad_y, self.x, self.gamma, self.beta, **self.how)
        return spec.backward_inference(self.grad_y, self.x, *self.running, self.gamma, self.beta, **self.how)

    def by_torch(self, training: bool) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """y and the gradients to x, gamma, beta and residual that PyTorch differentiates by itself."""
        inputs = (self.x, self.gamma, self.beta, self.residual)
        x, gamma, beta, residual = (None if v is None else torch.tensor(v, requires_grad=True) for v in inputs)
        running = [None, None] if training else [torch.tensor(v) for v in self.running]
        z = F.batch_norm(x, *running, gamma, beta, training, 0.1, self.how["eps"])
        z = z if residual is None else z + residual
        y = activate(z, self.how["act"], self.how["slope"])
        y.backward(torch.tensor(self.grad_y))
        return y.detach().numpy(), [None if v is None else v.grad.numpy() for v in (x, gamma, beta, residual)]


def assert_same_gradients(sample: Sample, training: bool) -> None:
    y, grads = sample.by_torch(training)
    np.testing.assert_allclose(sample.forward(training), y, **TIGHT)
    for name, ours, theirs in zip(spec.Gradients._fields, sample.backward(training), grads, strict=True):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, err_msg=name, **TIGHT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorchs_gradients(shape: tuple[int, ...], act: str | None, training: bool) -> None:
    assert_same_gradients(Sample(shape, act=act), training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("affine", ["both", "gamma", "beta", "neither"])
def test_none_means_gamma_1_and_beta_0(affine: str, residual: bool, training: bool) -> None:
    sample = Sample((4, 3, 5), affine, residual)
    assert_same_gradients(sample, training)
    y = sample.forward(training)
    sample.gamma = np.ones(3) if sample.gamma is None else sample.gamma
    sample.beta = np.zeros(3) if sample.beta is None else sample.beta
    np.testing.assert_array_equal(y, sample.forward(training))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_at_and_around_the_kinks_are_pytorchs(act: str | None) -> None:
    z = np.concatenate([np.linspace(-8, 8, 401), [k + d for k in KINKS.get(act, ()) for d in (-1e-9, 0.0, 1e-9)]])
    z = np.concatenate([z, [-800.0, -60.0, 60.0, 800.0]])
    t = torch.tensor(z, requires_grad=True)
    y = activate(t, act, 0.2)
    (derivative,) = torch.autograd.grad(y.sum(), t)
    np.testing.assert_allclose(spec.activation(z, act, 0.2), y.detach().numpy(), **TIGHT)
    np.testing.assert_allclose(spec.derivative(z, act, 0.2), derivative.numpy(), **TIGHT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["silu", "tanh", None])
def test_gradients_are_the_slopes_of_the_forward(act: str | None, training: bool) -> None:
    sample = Sample((3, 2, 3), act=act)
    dx, dgamma, dbeta, dresidual = sample.backward(training)
    pairs = (sample.x, dx), (sample.gamma, dgamma), (sample.beta, dbeta), (sample.residual, dresidual)
    step = 1e-6
    for values, gradient in pairs:
        for index in np.ndindex(values.shape):
            kept = values[index]
            loss = []
            for moved in (kept + step, kept - step):
                values[index] = moved
                loss.append((sample.forward(training) * sample.grad_y).sum())
            values[index] = kept
            assert (loss[0] - loss[1]) / (2 * step) == pytest.approx(gradient[index], rel=1e-6, abs=1e-7)


def test_the_batch_comes_out_with_mean_beta_and_deviation_gamma() -> None:
    sample = Sample((50, 3, 4), residual=False)
    y = spec.forward(sample.x, sample.gamma, sample.beta, eps=0.0)
    np.testing.assert_allclose(y.mean((0, 2)), sample.beta, **TIGHT)
    np.testing.assert_allclose(y.std((0, 2)), np.abs(sample.gamma), **TIGHT)


def test_gamma_sqrt_var_and_beta_mean_undo_it() -> None:
    x = Sample((9, 3, 4)).x
    mean, var = spec.statistics(x)
    np.testing.assert_allclose(spec.forward(x, np.sqrt(var + 0.1), mean, eps=0.1), x, **TIGHT)


def test_dx_is_orthogonal_to_1_and_xhat() -> None:
    sample = Sample((9, 3, 4), residual=False)
    dx = spec.backward(sample.grad_y, sample.x, sample.gamma, sample.beta, eps=0.0).dx
    xhat = spec.normalize(sample.x, *spec.statistics(sample.x), 0.0)
    np.testing.assert_allclose(dx.sum((0, 2)), 0, atol=1e-12)
    np.testing.assert_allclose((dx * xhat).sum((0, 2)), 0, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, -1.2])
@pytest.mark.parametrize("shape", [(7, 3), (3, 2, 4, 3), (0, 3), (4, 3, 0)])
def test_running_statistics_move_as_pytorchs(shape: tuple[int, ...], momentum: float) -> None:
    sample = Sample(shape)
    mean, var = (torch.tensor(v) for v in sample.running)
    F.batch_norm(torch.tensor(sample.x), mean, var, training=True, momentum=momentum)
    ours = spec.update_running(*sample.running, sample.x, momentum)
    np.testing.assert_allclose(ours[0], mean.numpy(), **TIGHT)
    np.testing.assert_allclose(ours[1], var.numpy(), **TIGHT)


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0)])
def test_an_empty_batch_has_no_statistics_and_gives_nothing(shape: tuple[int, ...]) -> None:
    sample = Sample(shape)
    assert np.isnan(spec.statistics(sample.x)).all()
    assert sample.forward(training=True).shape == shape
    grads = sample.backward(training=True)
    assert grads.dx.shape == shape
    assert not grads.dbeta.any()
    assert not grads.dgamma.any()


def test_running_variance_divides_by_one_less_than_the_batchs() -> None:
    x = np.array([[1.0], [3.0]])
    assert spec.statistics(x)[1] == 1.0
    assert spec.update_running([0.0], [0.0], x, 1.0)[1] == 2.0
