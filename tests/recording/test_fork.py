"""A process forks while it records: the child does not write to the Run, and the parent loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.runs.history import History
from batchnorm.runs.run import Run

PHASES = ("before start", "step", "hook", "flush", "flush of another thread", "close")
SCRIPT = """
import json, os, sys, threading
import pyarrow.parquet as parquet
import torch, batchnorm as bn
from batchnorm.runs.run import Run, RunError

root, ending, *phases = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
parent = os.getpid()
write, finish = parquet.write_table, Run.finish

class StoppedError(Exception):
    pass

def train(phase, folder):
    seen = {}

    def fork():
        if seen or os.getpid() != parent:
            return
        child = os.fork()
        if not child:
            if ending == "exits":
                sys.exit(0)
            if ending == "raises":
                raise StoppedError
            return  # the child goes on
        seen["child"] = os.waitpid(child, 0)[1]
        if phase != "before start":
            seen["status"] = Run(folder).info["status"]
            try:
                bn.watch(torch.nn.Sequential(torch.nn.BatchNorm1d(2)), folder, force=True).start()
            except RunError as error:
                seen["second writer"] = str(error)

    def forking(function):
        def forks(*arguments, **named):
            fork()
            return function(*arguments, **named)
        return forks

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        loss = model(torch.randn(6, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if phase == "step" and run.step == 2:
            fork()
        optimizer.step()
        run.log(loss=loss)

    def schedule(step):
        if phase == "hook" and step == 3:
            fork()
        return True

    run = bn.watch(model, folder, schedule=schedule)
    if phase == "before start":
        fork()
    with run:
        for _ in range(5):
            step()
        if phase == "flush":
            parquet.write_table = forking(write)
            run.flush()
        if phase == "flush of another thread":
            writes, goes_on = threading.Event(), threading.Event()
            def slow(*arguments, **named):
                writes.set()
                goes_on.wait(20)
                write(*arguments, **named)
            parquet.write_table = slow
            thread = threading.Thread(target=run.flush)
            thread.start()
            writes.wait(20)
            fork()
            if os.getpid() == parent:
                goes_on.set()
                thread.join()
        for _ in range(5):
            step()
        run.flush()
        if phase == "close":
            Run.finish = forking(finish)
    parquet.write_table, Run.finish = write, finish
    if os.getpid() != parent:
        left = [type(model[1]) is torch.nn.BatchNorm1d, "_tap" not in vars(model[1]), not model._forward_pre_hooks]
        with bn.watch(model, folder + "-child") as run:  # the child may record what it trains
            step()
        sys.exit(0 if all(left) and Run(folder + "-child").info["steps"] == 1 else 1)
    return seen

try:
    print(json.dumps({phase: train(phase, os.path.join(root, phase)) for phase in phases}))
except StoppedError:
    sys.exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["exits", "raises", "goes on"])
def test_a_forked_child_leaves_the_run_to_its_parent(ending: str, tmp_path: Path) -> None:
    phases = PHASES if ending != "goes on" else PHASES[1:]  # before the start, two that go on are two recordings
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT, str(tmp_path), ending, *phases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found) == list(phases)
    for phase, seen in found.items():
        folder = tmp_path / phase
        assert seen["child"] == 0, phase
        if phase != "before start":
            assert seen["status"] == "running", phase
            assert seen["second writer"] == f"{folder} is being recorded by another process: choose another folder"
        run = Run(folder)
        assert (run.info["status"], run.info["steps"], run.info["errors"]) == ("complete", 10, []), phase
        assert History.read(run).steps.tolist() == list(range(10)), phase
        assert run.table("units").num_rows == 10 * 3, phase
        assert run.table("log")["step"].to_pylist() == list(range(10)), phase
        assert not [entry.name for entry in folder.iterdir() if entry.suffix in (".lock", ".tmp")], phase
