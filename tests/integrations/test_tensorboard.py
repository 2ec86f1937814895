"""TensorBoard reads back the numbers of the Run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.quantities import CLASSES
from batchnorm.runs.history import History

pytestmark = pytest.mark.filterwarnings("ignore")  # of TensorBoard's own
accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
)


def test_the_curves_of_a_run_are_written(tmp_path: Path) -> None:
    from batchnorm.integrations.tensorboard import write_events

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(model, tmp_path / "run", schedule=bn.every(1)) as run:
        for _ in range(4):
            loss = model(torch.randn(6, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
    write_events(tmp_path / "run", tmp_path / "tb")
    read = accumulators.EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    (layer,) = History.read(run).layers
    events = read.Scalars("undo_index/1")
    assert [event.step for event in events] == [0, 1, 2, 3]
    np.testing.assert_allclose([event.value for event in events], np.nanmedian(layer["undo_index"], axis=1), rtol=1e-5)
    shares = [event.value for event in read.Scalars("away/1")]
    np.testing.assert_allclose(shares, (layer["class"] == CLASSES.index("away")).mean(axis=1))
    assert len(read.Scalars("loss")) == 4
    assert {"gamma/1", "beta/1"} <= set(read.Tags()["histograms"])
