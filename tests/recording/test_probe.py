"""probe() against brute force: percentiles, shares and the covariate shift."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_twin import data, network
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm as bn
from batchnorm.runs.run import RunError

PREACTIVATIONS = {"stem.1": "silu", "block.bn1": "relu", "block.bn2": "relu", "norm": "tanh"}


def preactivations(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What goes into each activation, and the layers' inputs under 'in', by running the parts one by one."""
    block = model.block
    found = {"in stem.1": model.stem[0](x)}
    found["stem.1"] = model.stem[1](found["in stem.1"])
    h = F.silu(found["stem.1"])
    found["in block.bn1"] = block.conv1(h)
    found["block.bn1"] = block.bn1(found["in block.bn1"])
    found["in block.bn2"] = block.conv2(F.relu(found["block.bn1"]))
    found["block.bn2"] = block.bn2(found["in block.bn2"]) + h
    found["in norm"] = model.up(F.relu(found["block.bn2"]))
    found["norm"] = model.norm(found["in norm"])
    found["in last"] = model.linear(torch.tanh(found["norm"]).mean((2, 3)))
    found["last"] = model.last(found["in last"])
    return found


def rows(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().movedim(1, -1).reshape(-1, tensor.shape[1]).numpy()


def derivative(act: str, z: np.ndarray) -> np.ndarray:
    leaf = torch.tensor(z, requires_grad=True)
    (slope,) = torch.autograd.grad(getattr(torch, act, None)(leaf).sum() if act != "silu" else F.silu(leaf).sum(), leaf)
    return slope.numpy()


STEEPEST = {"silu": 1.0998, "relu": 1.0, "tanh": 1.0}


@pytest.mark.parametrize("ours", ["", "converted", "fused"])
def test_a_probe_is_its_twin(ours: str, tmp_path: Path) -> None:
    model = network()
    slow = copy.deepcopy(model)
    if ours:
        bn.convert(model, fuse=ours == "fused")
    x, _ = data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with bn.watch(model, tmp_path, schedule=bn.every(1)) as run:
        columns = run.probe(x)
        assert "_tap" in model.last.__dict__
        assert not model.last._forward_hooks
        assert run.step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(columns) == {*PREACTIVATIONS, "last"}
    found = preactivations(slow, x)
    for name, got in columns.items():
        inside, z = rows(found[f"in {name}"]), rows(found[name])
        expected = np.percentile(inside, [15, 50, 85], axis=0)
        for place, percent in enumerate((15, 50, 85)):
            np.testing.assert_allclose(got[f"in_p{percent}"], expected[place], atol=1e-5)
        np.testing.assert_allclose(got["positive_in"], (inside > 0).mean(0), atol=1.5 / len(inside))
        np.testing.assert_allclose(got["positive_out"], (z > 0).mean(0), atol=1.5 / len(z))
        act = PREACTIVATIONS.get(name)
        if act is None:
            assert np.isnan(got["linear_share"]).all()
        else:
            linear = (derivative(act, z) >= 0.9 * STEEPEST[act]).mean(0)
            np.testing.assert_allclose(got["linear_share"], linear, atol=1.5 / len(z))
    table = run.table("probe")
    assert table.num_rows == 8 + 8 + 8 + 6 + 5
    assert set(table["step"].to_pylist()) == {0}


def test_a_fused_activation_and_its_residual_are_measured(tmp_path: Path) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(3, act="relu")

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.norm(x, residual)

    torch.manual_seed(0)
    model, x, residual = Inside(), torch.randn(50, 3), torch.randn(50, 3) + 1
    with bn.watch(model, tmp_path) as run:
        by_position, by_name = run.probe((x, residual)), run.probe({"x": x, "residual": residual})
    z = F.batch_norm(x, None, None, training=True) + residual
    for columns in (by_position["norm"], by_name["norm"]):
        np.testing.assert_allclose(columns["positive_out"], (z > 0).double().mean(0))
        np.testing.assert_allclose(columns["linear_share"], (z > 0).double().mean(0))


def test_noise_is_over_the_batches_of_a_list(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    batches = [torch.randn(40, 3) * scale for scale in (1.0, 2.0, 0.5)]
    with bn.watch(model, tmp_path) as run:
        columns = run.probe(batches)["0"]
        assert np.isnan(run.probe(batches[0])["0"]["noise_mean"]).all()
    means = np.stack([batch.double().mean(0).numpy() for batch in batches])
    variances = np.stack([batch.double().var(0, correction=0).numpy() for batch in batches])
    np.testing.assert_allclose(columns["noise_mean"], means.var(0, ddof=1) / variances.mean(0), rtol=1e-5)
    expected = (0.5 * np.log(variances + 1e-5)).var(0, ddof=1)
    np.testing.assert_allclose(columns["noise_log_scale"], expected, rtol=1e-5)


WEIGHTS = {"stem.1": "stem.0.weight", "block.bn1": "block.conv1.weight", "block.bn2": "block.conv2.weight"}
WEIGHTS |= {"norm": "up.weight", "last": "linear.weight"}
ORDER = ("stem.0", "stem.1", "block.conv1", "block.bn1", "block.conv2", "block.bn2", "up", "norm", "linear", "last")


@pytest.mark.parametrize("ours", ["", "fused"])
def test_the_covariate_shift_is_santurkars(ours: str, tmp_path: Path) -> None:
    """G and G' by copies of the network whose parameters are set by hand, layer by layer."""
    model = network()
    slow = copy.deepcopy(model)
    if ours:
        bn.convert(model)
    held, labels = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def gradient(state: dict[str, Tensor], weight: str) -> Tensor:
        network = copy.deepcopy(slow)
        network.load_state_dict({**network.state_dict(), **state})
        F.cross_entropy(network(held), labels).backward()
        return dict(network.named_parameters())[weight].grad

    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    with bn.watch(model, tmp_path, schedule=bn.every(1)) as run:
        run.probe(held, loss=lambda output: F.cross_entropy(output, labels))
        assert "shift" not in run.tables(), "it takes the next step to know"
        x, y = data()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
        rows = {row["layer"]: row for row in run.table("shift").to_pylist()}
    assert set(rows) == set(WEIGHTS)
    for layer, weight in WEIGHTS.items():
        below = ORDER[: ORDER.index(weight.rpartition(".")[0])]
        mixed = {name: (after if name.rpartition(".")[0] in below else now)[name] for name in now}
        one, other = gradient(now, weight), gradient(mixed, weight)
        size = float(one.norm())
        assert rows[layer]["step"] == 0
        assert rows[layer]["gradient_norm"] == pytest.approx(size, rel=1e-4)
        assert rows[layer]["shift"] == pytest.approx(float((one - other).norm()), abs=1e-4 * size)
        cosine = F.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert rows[layer]["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    assert rows["stem.1"]["shift"] == 0.0, "nothing lies below the first"
    assert rows["last"]["shift"] > 0.0


def test_a_probe_changes_nothing_that_follows(tmp_path: Path) -> None:
    losses = []
    for probed in (False, True):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        torch.manual_seed(0)
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        with bn.watch(model, tmp_path / str(probed)) as run:
            for _ in range(5):
                x = torch.randn(16, 4)
                if probed:
                    run.probe(torch.ones(3, 4) * torch.arange(3.0)[:, None], loss=lambda output: output.sum())
                loss = model(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert losses[:5] == losses[5:]


def test_a_probe_that_fails_leaves_the_model_watched(tmp_path: Path) -> None:
    model = network()
    run = bn.watch(model, tmp_path)
    with pytest.raises(RunError, match="inside the with block"):
        run.probe(data()[0])
    with run:
        with pytest.raises(RuntimeError):
            run.probe(torch.randn(2, 5, 9, 9))
        with pytest.raises(TypeError, match="a tensor of one value"):
            run.probe(data()[0], loss=lambda output: output)
        with pytest.raises(ValueError, match="empty list"):
            run.probe([])
        assert "_tap" in model.last.__dict__
        assert not any(module._forward_hooks for module in model.modules())
        assert run.step == 0
