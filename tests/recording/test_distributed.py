"""Several processes record one Run: each writes its own parts, and they are merged by their counts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.record.history import History
from batchnorm.record.run import RunError

RANKS = 2
# Ended at once: where Python's teardown meets a thread of PyTorch's that still drops a collective's tensors, it
# aborts the process ("terminate called without an active exception"), with or without this package.
WORKER = """
import os, sys
from pathlib import Path
import numpy as np, torch, batchnorm as bn
from torch import distributed as dist, nn
from twin import Twin
rank, folder, wrong = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", rank=rank, world_size=2)
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
sys.stdout.flush()
os._exit(0)
"""


def launch(folder: Path, *arguments: str) -> list[str]:
    """What each process printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = str(Path(__file__).parent)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(folder), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    printed = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * RANKS, printed
    return printed


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")


def test_processes_write_their_own_parts_and_are_merged_by_their_counts(tmp_path: Path) -> None:
    launch(tmp_path, "")
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


def test_all_processes_fail_where_the_first_cannot_make_the_run(tmp_path: Path) -> None:
    bn.Run.create(tmp_path / "run", "study")
    printed = launch(tmp_path, "")
    assert all(text.startswith("RunError") and "already holds a Run" in text for text in printed), printed
    with pytest.raises(RunError, match="not of a watched training"):
        History.read(bn.Run.open(tmp_path / "run"))
