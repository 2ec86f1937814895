"""adapt leans towards the batch by its definition, and leaves no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
import spec_variants
from batchnorm import spec


def layer(cls: Any, **options: Any) -> Any:
    made = cls(5, **options).double().eval()
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return made


@pytest.mark.parametrize("prior", [0, 1, 16.0, 1e6, math.inf])
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, bn.BatchNorm2d, bn.SyncBatchNorm, bn.BatchRenorm2d])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_its_definition(seed: int, cls: Any, prior: float) -> None:
    torch.manual_seed(seed)
    norm, x = layer(cls), torch.randn(7, 5, 4, 3, dtype=torch.float64) * 3 + 2
    arrays = [norm.running_mean.numpy(), norm.running_var.numpy()]
    mean, var = arrays if math.isinf(prior) else spec_variants.adapted_statistics(x.numpy(), *arrays, prior)
    wanted = spec.forward_inference(x.numpy(), mean, var, *(p.detach().numpy() for p in (norm.weight, norm.bias)))
    before = norm(x)
    with bn.adapt(norm, prior=prior) as record:
        np.testing.assert_allclose(norm(x).detach().numpy(), wanted, rtol=1e-9, atol=1e-9)
        assert record.layers == ("",)
    assert torch.equal(norm(x), before)


def test_a_prior_of_0_is_the_batch_alone_and_infinity_the_model_alone() -> None:
    torch.manual_seed(0)
    norm, x = layer(bn.BatchNorm2d, act="relu"), torch.randn(7, 5, 4, 3, dtype=torch.float64)
    with bn.adapt(norm, prior=0):
        torch.testing.assert_close(norm(x), copy.deepcopy(norm).train()(x))
    with bn.adapt(norm, prior=math.inf):
        assert torch.equal(norm(x), copy.deepcopy(norm)(x))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        bn.BatchNorm2d(5),
        nn.BatchNorm2d(5, track_running_stats=False),
    ).eval()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_it_leaves_no_trace(error: type[BaseException] | None) -> None:
    model = network()
    bn.freeze(model[3])
    if error is not None:
        model.append(nn.Identity())
        model[5].register_forward_hook(lambda *_: (_ for _ in ()).throw(error()))
    held = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    x = torch.randn(4, 3, 6, 6)
    try:
        with bn.adapt(model, prior=2) as record:
            assert record.layers == ("1",)
            assert [each.name for each in record.skipped] == ["3", "4"]
            assert "1 batch norm layer adapted, the running statistics weigh as much as 2 samples" in str(record)
            model(x)
            now = model.state_dict(keep_vars=True)
            assert all(now[name] is value for name, (value, _) in held.items())
            model(x)
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    now = model.state_dict(keep_vars=True)
    assert all(now[name] is value and torch.equal(value, copied) for name, (value, copied) in held.items())
    assert not model[1]._forward_pre_hooks
    assert not model[1]._forward_hooks


def test_gradients_go_through_as_through_constants() -> None:
    torch.manual_seed(0)
    norm, x = layer(nn.BatchNorm1d), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    with bn.adapt(norm, prior=3):
        y = norm(x)
    y.sum().backward()
    _, var = spec_variants.adapted_statistics(x.detach().numpy(), norm.running_mean, norm.running_var, 3)
    np.testing.assert_allclose(x.grad[0].numpy(), norm.weight.detach().numpy() / np.sqrt(var + norm.eps))


def test_converted_and_masked_models_adapt() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).eval()
    x = torch.randn(4, 3, 6, 6)
    with bn.adapt(model, prior=1):
        wanted = model(x)
    bn.convert(model)
    with bn.adapt(model, prior=1):
        torch.testing.assert_close(model(x), wanted)
    norm = bn.BatchNorm1d(5).eval()
    padded = torch.randn(2, 5, 4)
    with bn.adapt(norm, prior=0):
        y = norm(padded, lengths=[4, 1])
    rows = torch.cat([padded[0].T, padded[1, :, :1].T])
    torch.testing.assert_close(y[0].T, (rows[:4] - rows.mean(0)) / (rows.var(0, correction=0) + norm.eps).sqrt())


@pytest.mark.parametrize("prior", [-1, math.nan, None, "16", True])
def test_other_priors_are_refused(prior: Any) -> None:
    with pytest.raises(ValueError, match="prior must be a number of samples"), bn.adapt(network(), prior=prior):
        pass


def test_training_and_no_model_are_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"1 is in training mode.* call model.eval\(\) first"),
        bn.adapt(network().train()),
    ):
        pass
    with pytest.raises(TypeError, match=r"adapt takes a torch\.nn\.Module, got dict"), bn.adapt({}):  # type: ignore[arg-type]
        pass


def test_compiled_models_adapt() -> None:
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    x: Tensor = torch.randn(4, 3, 6, 6)
    plain = compiled(x)
    with bn.adapt(compiled, prior=1):
        adapted = compiled(x)
    with bn.adapt(model, prior=1):
        torch.testing.assert_close(adapted, model(x))
    assert not torch.allclose(adapted, plain)
    torch.testing.assert_close(compiled(x), plain)
