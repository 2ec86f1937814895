"""Errors while recording are reported once and noted; the training goes on, and flushed rows stay."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.recording._recorder import writer
from batchnorm.runs.history import History
from batchnorm.runs.run import RunError
from randomness import SEED


def network(name: str = "norm") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.register_module("linear", nn.Linear(4, 3))
    model.add_module(name, nn.BatchNorm1d(3))
    model.forward = lambda x: model._modules[name](model.linear(x))
    return model


def train(model: nn.Module, steps: int = 3, run: object = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        loss = model(torch.randn(6, 4)).square().mean() + model.linear.weight.sum() * 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_second_writer_is_refused_while_the_first_records_and_after(tmp_path: Path) -> None:
    with bn.watch(network(), tmp_path):
        for force in (False, True):
            with pytest.raises(RunError, match=r"by another process|already has a Run"):
                bn.watch(network(), tmp_path, force=force).start()
    with pytest.raises(RunError, match="already has a Run"):
        bn.watch(network(), tmp_path).start()
    assert bn.Run.open(tmp_path).info["status"] == "complete"
    with bn.watch(network(), tmp_path, force=True) as run:
        pass
    assert not list(tmp_path.glob("*.lock"))
    assert run.step == 0


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, torch, batchnorm as bn\n"
        "try:\n"
        "    bn.watch(torch.nn.BatchNorm1d(2), sys.argv[1], force=True).start()\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    with bn.watch(network(), tmp_path):
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == f"RunError {tmp_path} is being recorded by another process: choose another folder\n"


def test_a_model_is_watched_once(tmp_path: Path) -> None:
    model = network()
    with bn.watch(model, tmp_path / "a"), pytest.raises(RunError, match="watched already"):
        bn.watch(model, tmp_path / "b").start()
    with bn.watch(model, tmp_path / "b"):
        pass


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("model",), TypeError, "takes a torch.nn.Module"),
        ((nn.Linear(1, 1),), ValueError, "no batch norm layer to watch in this Linear"),
        ((nn.Sequential(nn.LazyBatchNorm1d()),), ValueError, "0: lazy: run a batch"),
    ],
)
def test_models_that_cannot_be_watched_are_refused(arguments, kind, words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        bn.watch(*arguments, tmp_path)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="schedule must be a function"):
        bn.watch(network(), tmp_path, schedule=10)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        bn.watch(network(), tmp_path, optimizer="sgd")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="has no Run"):
        bn.watch(network(), tmp_path).start()
    with pytest.raises(RunError, match="cannot write to"):
        bn.watch(network(), tmp_path / "file" / "run").start()
    assert (tmp_path / "file").read_text() == "mine"


def test_subclasses_and_synchronized_layers_are_named_and_not_guessed(tmp_path: Path) -> None:
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(2), Own(2), nn.SyncBatchNorm(2))
    with bn.watch(model, tmp_path) as run:
        skipped = {each["name"]: each["why"] for each in run.info["skipped"]}
    assert skipped["1"].startswith(
        "a subclass of BatchNorm2d, whose forward equals batch norm's: write batchnorm.register_layer("
    )
    assert "batchnorm.sync" in skipped["2"]


def disk_full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_nothing_once_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    with bn.watch(model, tmp_path, schedule=bn.every(1)) as run:
        with monkeypatch.context() as patch:
            patch.setattr(pa.parquet, "write_table", disk_full)
            train(model, 2)
            with pytest.warns(RuntimeWarning, match="the training goes on without: .*No space left"):
                run.flush()
            run.flush()  # warns once
        train(model, 2)
    assert History.read(run).steps.tolist() == [0, 1, 2, 3]
    assert "No space left" in run.info["errors"][0]
    assert run.info["status"] == "complete"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_removed_folder_is_reported_once_and_not_created_again(tmp_path: Path) -> None:
    model, folder = network(), tmp_path / "run"
    with (
        pytest.warns(RuntimeWarning, match="was removed while it was being recorded") as caught,
        bn.watch(model, folder, schedule=bn.every(1)) as run,
    ):
        train(model, 1)
        shutil.rmtree(folder)
        run.flush()
        train(model, 2)
        run.flush()
    assert len(caught) == 1
    assert not folder.exists()
    assert "_tap" not in model._modules["norm"].__dict__


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_lost_permission_is_reported_once(tmp_path: Path) -> None:
    model = network()
    with (
        pytest.warns(RuntimeWarning, match="Permission denied"),
        bn.watch(model, tmp_path, schedule=bn.every(1)),
    ):
        tmp_path.chmod(0o500)
        train(model, 2)
    tmp_path.chmod(0o700)
    assert bn.Run.open(tmp_path).info["status"] == "running"


def test_rows_that_cannot_be_written_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    row = 3 * 4 * (len(writer.MEASURED) + 3)
    monkeypatch.setattr(writer, "HELD", 5 * row)
    monkeypatch.setattr(writer, "SIZE", row)
    watched = bn.watch(model, tmp_path, schedule=bn.every(1)).start()
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="No space left"):
        patch.setattr(pa.parquet, "write_table", disk_full)
        train(model, 20)
    watched.close()
    run = bn.Run.open(tmp_path)
    assert History.read(run).steps.tolist() == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("pause", [writer.PAUSE, 0.0])
def test_a_full_disk_is_tried_again_after_a_pause_and_not_at_each_step(
    pause: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no shortest pause, what the attempts take still bounds how often they come."""
    now = [time.monotonic()]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(writer, "SIZE", 1)
    monkeypatch.setattr(writer, "PAUSE", pause)
    attempts = []

    def slow_and_full(*_: object, **__: object) -> None:
        attempts.append(run.step)
        now[0] += 0.5
        disk_full()

    model = network()
    with bn.watch(model, tmp_path, schedule=bn.every(1)) as run:
        with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="No space left"):
            patch.setattr(pa.parquet, "write_table", slow_and_full)
            for _ in range(60):
                train(model, 1)
                now[0] += 1.0
        assert len(attempts) == 2, "the first takes half a second: the next comes after fifty"
        now[0] += 100.0
        train(model, 2)
        assert len(list(tmp_path.glob("units-*.parquet"))) == 2, "with room again, each is written at once"
    assert History.read(run).steps.tolist() == list(range(62))
    assert len(run.info["errors"]) == 1


def test_errors_that_differ_each_time_are_not_written_each_time(tmp_path: Path) -> None:
    def schedule(step: int) -> bool:
        raise RuntimeError(f"number {step}")

    model = network()
    with (
        pytest.warns(RuntimeWarning, match="the schedule failed at step 1: RuntimeError: number 1"),
        bn.watch(model, tmp_path, schedule=schedule) as run,
    ):
        train(model, 50)
    assert run.step == 50
    assert len(run.info["errors"]) == 20
    assert bn.Run(tmp_path).info == run.info


@pytest.mark.parametrize("place", ["Writer._units", "Writer._write"])
@pytest.mark.parametrize("error", [KeyError("gone"), RecursionError()])
def test_close_raises_nothing_and_leaves_nothing(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"batchnorm.recording._recorder.writer.{place}", fails)
    model = network()
    with (
        pytest.warns(RuntimeWarning, match="the training goes on without"),
        bn.watch(model, tmp_path, schedule=bn.every(1)) as run,
    ):
        train(model, 2)
    assert run.info["status"] == "complete"
    assert len(run.info["errors"]) == 1
    assert not list(tmp_path.glob("*.lock"))
    assert not model._forward_pre_hooks


def test_close_refuses_an_unknown_status_and_goes_on(tmp_path: Path) -> None:
    with bn.watch(network(), tmp_path) as run, pytest.raises(ValueError, match="status is one of complete"):
        run.close("done")
    assert bn.Run(tmp_path).info["status"] == "complete"


@pytest.mark.parametrize("first", ["old", "new"])
def test_a_recording_that_was_removed_keeps_out_of_the_next_one_there(first: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    models = {"old": network("old"), "new": network("new")}
    runs = {"old": bn.watch(models["old"], folder, schedule=bn.every(1)).start()}
    train(models["old"], 3)
    runs["old"].flush()
    shutil.rmtree(folder)
    runs["new"] = bn.watch(models["new"], folder, schedule=bn.every(1)).start()
    with pytest.warns(RuntimeWarning, match="was replaced by another Run while it was being recorded"):
        for name in ("old", "new"):
            train(models[name], 4)
            runs[name].log(**{name: 1.0})
            runs[name].flush()
    with pytest.raises(RunError, match="was replaced by another Run"):
        runs["old"].table("units")
    for name in (first, *(name for name in runs if name != first)):
        runs[name].close()
        if name == "old" and first == "old":
            with pytest.raises(RunError, match="by another process"):
                bn.watch(network(), folder, force=True).start()
    run = bn.Run(folder)
    assert (run.info["status"], run.info["steps"], run.info["errors"]) == ("complete", 4, [])
    assert [layer["name"] for layer in run.info["layers"]] == ["new"]
    assert run.table("units")["layer"].unique().to_pylist() == ["new"]
    assert run.table("units").num_rows == 4 * 3
    assert run.table("log")["name"].to_pylist() == ["new"]
    assert not list(folder.glob("*.lock"))


def test_a_schedule_that_fails_ends_the_recording_and_not_the_training(tmp_path: Path) -> None:
    model = network()
    with (
        pytest.warns(RuntimeWarning, match="the schedule failed at step 2: ZeroDivisionError"),
        bn.watch(model, tmp_path, schedule=lambda step: 1 / (2 - step) > 0) as run,
    ):
        train(model, 5)
    assert run.step == 5
    assert run.info["errors"] == ["the schedule failed at step 2: ZeroDivisionError: division by zero"]


def test_a_fault_of_the_recorder_is_not_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monkeypatch.setattr("batchnorm.recording._recorder.attach.sums", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning, match="division by zero"), bn.watch(model, tmp_path) as run:
        train(model, 3)
    assert run.step == 3
    assert run.info["status"] == "complete"


HOSTILE = [
    '"; DROP TABLE units; --',
    "a/b\\c",
    "<script>document['title']='gone'</script>",
    "层\u202e名 🙂",
    "\ud800 alone",
    "x" * 10_000,
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:12]))
def test_a_layer_may_have_any_name(name: str, tmp_path: Path) -> None:
    model = network(name)
    with bn.watch(model, tmp_path / "run", schedule=bn.every(1)) as run:
        train(model, 2)
        run.log(**{name: 1.0})
        run.probe(torch.randn(6, 4))
    assert run.info["errors"] == []
    (layer,) = History.read(run).layers
    assert layer.name == name
    written = name.encode("utf-8", "replace").decode()
    assert run.table("units")["layer"].unique().to_pylist() == [written]
    assert run.table("probe")["layer"].unique().to_pylist() == [written]
    assert run.table("log")["name"].unique().to_pylist() == [written]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


CHILD = """
import sys, time, torch, batchnorm as bn
from batchnorm.recording._recorder import writer
writer.AGE = 0.0
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with bn.watch(model, sys.argv[1], schedule=bn.every(1)) as run:
    while True:
        loss = model(torch.randn(6, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        if run.step % 5 == 0:
            run.flush()
            print(run.step, flush=True)
"""


def record_and_kill(folder: Path, delay: float) -> int:
    """Record in a child process, kill it `delay` seconds after its first flush; the steps that it had flushed."""
    with subprocess.Popen([sys.executable, "-c", CHILD, folder], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        output = child.stdout.readline()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        output += child.stdout.read()
    lines = output[: output.rindex("\n")]  # without a last line that may be incomplete
    return int(lines.splitlines()[-1])


@pytest.mark.slow
def test_a_killed_recording_opens_and_has_the_flushed_rows(tmp_path: Path) -> None:
    """A short form of `make soak`, which kills a hundred times: TIMES=100."""
    times = int(os.environ.get("BATCHNORM_KILLS", "3"))
    delays = np.random.default_rng(SEED).uniform(0.0, 0.4, times)
    for number, delay in enumerate(delays):
        folder = tmp_path / str(number)
        flushed = record_and_kill(folder, delay)
        run = bn.Run.open(folder)
        history = History.read(run)
        steps = history.steps.tolist()
        assert run.info["status"] == "running"
        assert steps == list(range(len(steps)))
        assert len(steps) >= flushed, f"BATCHNORM_SEED={SEED}: killed after {delay:.4f} s, flushed {flushed}"
        assert np.isfinite(history.layers[0]["undo_distance"]).all()
        assert run.table("log").num_rows >= flushed
        with bn.watch(network(), folder, force=True):
            pass
        assert json.loads((folder / "run.json").read_text())["status"] == "complete"
