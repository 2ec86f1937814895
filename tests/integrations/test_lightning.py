"""The Lightning callback records a fit, however it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.runs.history import History

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's own
lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed", exc_type=ImportError)


def module(fails_at: int = -1) -> object:
    class Small(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
            self.gammas: list[list[float]] = []

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            if self.global_step == fails_at:
                raise ZeroDivisionError
            self.gammas.append(self.net[1].weight.tolist())
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Small()


def fit(model: object, path: Path, **settings: object) -> None:
    from batchnorm.integrations.lightning import WatchBatchNorm

    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[WatchBatchNorm(path / "run", schedule=bn.every(1))], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=path, **settings,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=6))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_fit_is_recorded(accumulated: int, tmp_path: Path) -> None:
    model = module()
    fit(model, tmp_path, accumulate_grad_batches=accumulated)
    run = bn.Run.open(tmp_path / "run")
    (layer,) = History.read(run).layers
    assert run.info["status"] == "complete"
    assert run.info["steps"] == 8 // accumulated
    assert layer.steps.tolist() == list(range(8 // accumulated))
    assert (layer["batches"] == accumulated).all()
    assert layer["gamma"].tolist() == model.gammas[::accumulated], "gamma as the step's forward used it"
    assert run.table("log").num_rows == 8
    assert "_tap" not in model.net[1].__dict__


def test_a_fit_that_fails_is_recorded_as_far_as_it_got(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(module(fails_at=3), tmp_path)
    run = bn.Run.open(tmp_path / "run")
    assert run.info["status"] == "failed"
    assert History.read(run).steps.tolist() == [0, 1, 2]
