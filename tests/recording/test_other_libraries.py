"""watch records the batch norms of other libraries before the activation that they apply, or says why not."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import batchnorm as bn
from batchnorm.variants.libraries import kind_of
from libraries import FROZEN, IMAGES, C, Twice, filled, images, network


@pytest.mark.parametrize("name", ["BatchNormAct2d", "BatchNormAct2d, other act", "ABN", "InPlaceABN"])
@pytest.mark.parametrize("converted", [False, True])
def test_watch_records_before_the_activation(name: str, converted: bool, tmp_path: Path) -> None:
    model = network(name).train()
    if converted:
        bn.convert(model)
    plain, x = copy.deepcopy(model), images()
    if name == "InPlaceABN":  # the stand-in writes to its input, which autograd of the convolution forbids
        model, plain, x = nn.Sequential(model[1]), nn.Sequential(plain[1]), torch.randn(6, C, 8, 8)
    with bn.watch(model, tmp_path / "run", schedule=bn.every(1)) as run:
        out = model(x.clone())
        out.square().sum().backward()
    assert type(model[-1]) is type(plain[-1])
    torch.testing.assert_close(out, plain(x.clone()), rtol=1e-4, atol=1e-5)
    layer = next(module for module in plain.modules() if kind_of(type(module)) is not None)
    kind = kind_of(type(layer))
    assert kind is not None
    z = (plain[0](x) if len(plain) > 1 else x).detach()
    xhat = F.batch_norm(z, None, None, training=True)
    shape = (1, C, 1, 1)
    y = (xhat * kind.scale(layer).reshape(shape) + layer.bias.reshape(shape)).detach().requires_grad_()
    after = kind.finish(layer, y * 1)
    (plain[2](after) if len(plain) > 1 else after).square().sum().backward()
    rows = run.table("units").to_pandas()
    np.testing.assert_allclose(rows["dbeta"], y.grad.sum((0, 2, 3)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(rows["dgamma"], (y.grad * xhat).sum((0, 2, 3)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(rows["gamma"], kind.scale(layer).detach(), rtol=1e-5)
    np.testing.assert_allclose(rows["mean"], z.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_watch_names_what_it_cannot_record(tmp_path: Path) -> None:
    skipped = [name for name in IMAGES if name in FROZEN or name in ("SplitBatchNorm2d", "SyncBatchNormAct", "mmcv")]
    model = nn.ModuleDict({str(i): IMAGES[name](C) for i, name in enumerate(skipped)} | {"norm": nn.BatchNorm2d(C)})
    run = bn.watch(model, tmp_path / "run")
    with run:
        pass
    names = {layer["name"] for layer in run.info["skipped"]}
    assert names == {str(i) for i in range(len(skipped))}


def test_also_of_watch(tmp_path: Path) -> None:
    with bn.watch(nn.Sequential(Twice(4)), tmp_path / "run", also=[Twice]) as run:
        assert [layer["class"] for layer in run.info["layers"]] == ["Twice"]


def test_a_layer_whose_parent_would_fuse_it_is_recorded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 3), filled(IMAGES["BatchNormAct2d, no act"](C)), nn.ReLU())
    assert bn.convert(model).fused == 1
    with bn.watch(model, tmp_path / "run", schedule=bn.every(1)) as run:
        model(images()).sum().backward()
    assert not run.table("units").to_pandas()["dgamma"].isna().any()
