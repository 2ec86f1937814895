"""Several processes record one Run: each writes its parts, and readers merge them by their counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.runs.history import History
from batchnorm.runs.run import RunError
from processes import succeed

RANKS = 2
WORKER = """
import os, sys
from pathlib import Path
import numpy as np, torch, batchnorm as bn
from torch import distributed as dist, nn
from twin import Twin
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
twin = Twin(model)
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
torch.manual_seed(1 + rank)
try:
    with bn.watch(parallel, folder / "run", schedule=bn.every(1)) as run:
        for step in range(3):
            twin.begin()
            x = torch.randn(5 + 4 * rank, 4) + rank
            loss = parallel(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            twin.end()
            kept = twin.kept["1"][0]
            np.savez(folder / f"kept-{rank}-{step}", x=kept.x, g=kept.gradients[0], gamma=twin.used["1"][0])
            optimizer.step()
except Exception as error:
    print(type(error).__name__, error)
dist.destroy_process_group()
"""


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")


@pytest.mark.slow
def test_processes_write_their_own_parts_and_are_merged_by_their_counts(tmp_path: Path) -> None:
    succeed(WORKER, RANKS, str(tmp_path), folder=tmp_path)
    run = bn.Run.open(tmp_path / "run")
    assert run.info["processes"] == RANKS
    assert run.info["status"] == "complete"
    assert run.ranks("units") == [0, 1]
    assert [layer["name"] for layer in run.info["layers"]] == ["1"], "as the user knows it, without DDP's prefix"
    (layer,) = History.read(run).layers
    assert layer.steps.tolist() == [0, 1, 2]
    for step in range(3):
        kept = [np.load(tmp_path / f"kept-{rank}-{step}.npz") for rank in range(RANKS)]
        x = np.concatenate([each["x"] for each in kept])
        assert layer["count"][step].tolist() == [len(x)] * 6
        np.testing.assert_allclose(layer["mean"][step], x.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer["var"][step], x.var(0), rtol=1e-5)
        np.testing.assert_allclose(layer["gamma"][step], kept[0]["gamma"], rtol=1e-6)
        np.testing.assert_allclose(layer["dbeta"][step], sum(each["g"].sum(0) for each in kept), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(layer["energy"][step], sum((each["g"] ** 2).sum(0) for each in kept), rtol=1e-5)
        means, variances = (np.stack([getattr(each["x"], f)(0) for each in kept]) for f in ("mean", "var"))
        np.testing.assert_allclose(layer["noise_mean"][step], means.var(0, ddof=1) / variances.mean(0), rtol=1e-4)
        assert ((layer["gradient_diverted"][step] >= 0) & (layer["gradient_diverted"][step] <= 1 + 1e-6)).all()


@pytest.mark.slow
def test_all_processes_fail_where_the_first_cannot_make_the_run(tmp_path: Path) -> None:
    bn.Run.create(tmp_path / "run", "study")
    printed = succeed(WORKER, RANKS, str(tmp_path), folder=tmp_path)
    assert all(text.startswith("RunError") and "already has a Run" in text for text in printed), printed
    with pytest.raises(RunError, match="not a watched training"):
        History.read(bn.Run.open(tmp_path / "run"))


@pytest.mark.slow
def test_all_processes_record_into_the_folder_that_the_first_made(tmp_path: Path) -> None:
    """By default it is named after the time, which processes need not read alike, and numbered where it is there."""
    (tmp_path / "runs" / "watch-0").mkdir(parents=True)
    script = WORKER.replace('folder / "run", ', "").replace(
        "torch.manual_seed(0)",
        """
import batchnorm.recording.watch
batchnorm.recording.watch.default_path = lambda: Path("runs") / f"watch-{rank}"
os.chdir(folder)
torch.manual_seed(0)""",
        1,
    )
    succeed(script, RANKS, str(tmp_path), folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["watch-0", "watch-0-2"]
    run = bn.Run.open(tmp_path / "runs" / "watch-0-2")
    assert run.info["status"] == "complete"
    assert run.ranks("units") == [0, 1]
