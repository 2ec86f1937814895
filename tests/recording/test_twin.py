"""Every recorded number against brute force, for all layers, layouts and ways to train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from twin import Twin

import batchnorm as bn
from batchnorm import autograd
from batchnorm.runs.history import History

STEPS = 3
NOISE = 5e-6
"""float32: a column is stored in it (6e-8), and sums of float32 products are computed in it by PyTorch's operators."""


class Block(nn.Module):
    """A residual block with a shared activation, as torchvision has them."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c, affine=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """Convolutions of each kind, a linear layer, norms with and without affine and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.SiLU())
        self.block = Block(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)
        self.linear, self.last = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.block(self.stem(x))))
        return self.last(self.linear(torch.tanh(x).mean((2, 3))))


def network(seed: int = 0, last: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(memory_format=last)


def data(last: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    return (torch.randn(12, 3, 9, 9) + 0.5).to(memory_format=last), torch.randint(0, 5, (12,))


def train(
    model: nn.Module,
    twin: Twin,
    backward: Callable[[nn.Module, Tensor, Tensor], None],
    path: Path,
    last: torch.memory_format = torch.contiguous_format,
    watched: nn.Module | None = None,
    twin_model: nn.Module | None = None,
) -> list[dict[str, dict[str, np.ndarray]]]:
    """Train and record `model`, its twin kept by the same steps (or by those of `twin_model`); the twin's columns."""
    torch.manual_seed(1)
    models = [model] if twin_model is None else [model, twin_model]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in models]
    expected = []
    with bn.watch(watched or model, path, schedule=bn.every(1), optimizer=optimizers[0]):
        for _ in range(STEPS):
            x, y = data(last)
            twin.begin()
            for each, optimizer in zip(models, optimizers, strict=True):
                backward(each, x, y)
                if each is models[-1]:
                    twin.end()
                    expected.append({name: twin.columns(name) for name in twin.layers})
                optimizer.step()
                optimizer.zero_grad()
    return expected


def plain(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()


def accumulated(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Micro-batches of unequal size."""
    for rows in (slice(0, 3), slice(3, 5), slice(5, 12)):
        (nn.functional.cross_entropy(model(x[rows]), y[rows]) / 3).backward()


def together(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Two forwards before one backward."""
    nn.functional.cross_entropy(torch.cat([model(x[:7]), model(x[7:])]), y).backward()


def autocast(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
    (1024 * loss).backward()


def recomputed(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()


def recomputed_reentrant(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=True), y).backward()


def looked_at_between(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Validation between the steps is no part of them."""
    model.eval()
    with torch.no_grad():
        model(100 + 10 * x)
    model.train()
    plain(model, x, y)


WAYS = [plain, accumulated, together, autocast, recomputed, recomputed_reentrant, looked_at_between]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def assert_twins(path: Path, expected: list[dict[str, dict[str, np.ndarray]]], noise: float = NOISE) -> None:
    history = History.read(bn.Run.open(path))
    assert history.run.info["status"] == "complete"
    assert history.run.info["errors"] == []
    assert history.steps.tolist() == list(range(len(expected)))
    assert {layer.name for layer in history.layers} == set(expected[0])
    for layer in history.layers:
        for step, columns in enumerate(each[layer.name] for each in expected):
            compared = 0
            for name, values in columns.items():
                known = np.isfinite(values)
                found = layer[name][step]
                assert np.isfinite(found[known]).all(), (layer.name, step, name, found)
                size = np.abs(values[known]).max(initial=0)
                if name == "mean":
                    size = max(size, columns["s"].max())
                if name in ("dgamma", "dbeta"):  # sums that cancel: their size is that of what is summed
                    size = np.sqrt(columns["energy"] * columns["count"]).max()
                error = np.abs(found - values)[known].max(initial=0)
                assert error <= noise * size, (layer.name, step, name, error / size)
                compared += 1
            assert compared >= 14


@pytest.mark.parametrize("ours", [False, True], ids=["torch.nn", "ours"])
@pytest.mark.parametrize("last", LAYOUTS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_number_is_its_twins(way: Callable, last: torch.memory_format, ours: bool, tmp_path: Path) -> None:
    model = network(last=last)
    if ours:
        bn.convert(model, fuse=False)
    twin = Twin(model)
    assert_twins(tmp_path, train(model, twin, way, tmp_path, last))


@pytest.mark.parametrize("last", LAYOUTS, ids=str)
@pytest.mark.parametrize("way", [plain, accumulated], ids=lambda way: way.__name__)
def test_every_number_is_its_twins_where_the_activation_is_fused(
    way: Callable, last: torch.memory_format, tmp_path: Path
) -> None:
    model = network(last=last)
    stock = copy.deepcopy(model)
    conversion = bn.convert(model)
    assert sum(layer.act is not None for layer in conversion.layers) >= 3
    expected = train(model, Twin(stock), way, tmp_path, last, twin_model=stock)
    # Two networks, which round differently on the way to each layer.
    assert_twins(tmp_path, expected, 1e-4)


def test_every_sum_is_its_twins_where_the_activation_is_fused_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the two networks part by 4e-3 at each layer: the twin is of what each layer's backward was given."""
    seen: list[tuple[np.ndarray, ...]] = []
    backward = autograd.run_backward

    def spied(kernel: Any, grad_y: Tensor, x: Tensor, statistics: Any, epilogue: Any, *rest: Any, **options: Any):
        axes = [axis for axis in range(x.dim()) if axis != 1]
        wide, given = x.double(), grad_y.double()
        eps = 1e-3 if epilogue.act == "silu" else 1e-5  # of the stem, and of the others
        gamma, beta = (None if v is None else v.detach().double() for v in (epilogue.gamma, epilogue.beta))
        z = nn.functional.batch_norm(wide, None, None, gamma, beta, True, 0.0, eps)
        with torch.enable_grad():
            z = (z if epilogue.y is None else epilogue.y.double()).detach().requires_grad_()
            y = nn.functional.silu(z) if epilogue.act == "silu" else torch.relu(z) if epilogue.act else z
        (g,) = torch.autograd.grad(y, z, given)
        xhat = nn.functional.batch_norm(wide, None, None, None, None, True, 0.0, eps)
        if epilogue.y is None and epilogue.act == "relu":  # on the kink, rounding decides
            g = torch.where(z.detach().abs() < 1e-6, given * 0, g)
        seen.append(tuple(v.sum(axes).numpy() for v in (g * xhat, g, g * g)))
        return backward(kernel, grad_y, x, statistics, epilogue, *rest, **options)

    monkeypatch.setattr(autograd, "run_backward", spied)
    model = network()
    bn.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with bn.watch(model, tmp_path, schedule=bn.every(1)) as run:
        autocast(model, *data())
        optimizer.step()
    layers = {layer.units: layer for layer in History.read(bn.Run.open(tmp_path)).layers}
    assert run.info["errors"] == []
    assert [len(dbeta) for _, dbeta, _ in seen] == [5, 6, 8, 8, 8]
    for name, place in (("dgamma", 0), ("dbeta", 1), ("energy", 2)):
        size = np.sqrt(seen[0][2] * 12).max() if name != "energy" else seen[0][2].max()
        np.testing.assert_allclose(layers[5][name][0], seen[0][place], rtol=0, atol=NOISE * size)
        of_eight = [layer[name][0] for layer in History.read(bn.Run.open(tmp_path)).layers if layer.units == 8]
        for found, (twin) in zip(reversed(of_eight), (each[place] for each in seen[2:]), strict=True):
            energy = next(each[2] for each in seen[2:] if each[place] is twin)
            size = energy.max() if name == "energy" else np.sqrt(energy * 12 * 49).max()
            np.testing.assert_allclose(found, twin, rtol=0, atol=4e-5 * size)


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True], ids=["torch.nn", "ours"])
@pytest.mark.parametrize("last", LAYOUTS, ids=str)
@pytest.mark.parametrize("way", [plain, accumulated], ids=lambda way: way.__name__)
def test_every_number_is_its_twins_under_compile(
    way: Callable, last: torch.memory_format, ours: bool, tmp_path: Path
) -> None:
    model = network(last=last)
    if not ours:  # with momentum=None torch.nn's own layer breaks the graph, watched or not
        model.last.momentum = 0.1
    stock = copy.deepcopy(model)
    if ours:
        bn.convert(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = train(compiled, Twin(stock), way, tmp_path, last, watched=model, twin_model=stock)
    assert_twins(tmp_path, expected, 1e-4)
