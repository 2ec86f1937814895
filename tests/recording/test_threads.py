"""Watched trainings in several threads do not disturb each other."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import batchnorm as bn
from batchnorm.recording._recorder.attach import _OWNERS
from batchnorm.runs.history import History


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads take turns between almost all instructions."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


def network(width: int = 8) -> nn.Module:
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(width, width), nn.BatchNorm1d(width))])


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss = model(torch.randn(4, model[0].in_features)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def in_threads(train: Any, count: int) -> None:
    """train(number) in `count` threads at once; what one of them raises is raised here."""
    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            train(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    if failed:
        raise failed[0]


@pytest.mark.usefixtures("switching_often")
@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside a hook of somebody else"])
def test_eight_threads_with_two_watched_trainings_each(others: bool, tmp_path: Path) -> None:
    """Short recordings start and close while those of other threads step."""
    torch.optim.SGD(network().parameters(), lr=0.1)  # PyTorch's first optimizer imports the compiler
    lists = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    before = [list(each) for each in lists]
    ours = [register(lambda *_: None) for register in (register_optimizer_step_pre_hook,) if others]
    ours += [register(lambda *_: None) for register in (register_optimizer_step_post_hook,) if others]
    logged: dict[Path, list[float]] = {}

    def train(number: int) -> None:
        for part in range(4):
            models = [network(4 + number), network(4 + number)]
            rates = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
            paths = [tmp_path / f"{number}-{part}-{which}" for which in range(2)]
            with (
                bn.watch(models[0], paths[0], schedule=bn.every(1)) as first,
                bn.watch(models[1], paths[1], schedule=bn.every(1)) as second,
            ):
                for _ in range(2 + part):
                    for run, model, optimizer in zip((first, second), models, rates, strict=True):
                        loss = step(model, optimizer)
                        run.log(loss=loss)
                        logged.setdefault(run.path, []).append(float(loss.detach()))

    in_threads(train, 8)
    for handle in ours:
        handle.remove()
    with bn.watch(network(), tmp_path / "last"):  # the last to close leaves no hook, now that it is alone
        pass
    assert [list(each) for each in lists] == before
    assert len(logged) == 8 * 4 * 2
    assert len(_OWNERS) == 0
    for path, losses in logged.items():
        run = bn.Run(path)
        assert (run.info["status"], run.info["steps"], run.info["errors"]) == ("complete", len(losses), [])
        assert History.read(run).steps.tolist() == list(range(len(losses)))
        assert run.table("log")["value"].to_pylist() == losses


def test_an_optimizer_that_cannot_be_counted_steps_all_the_same(tmp_path: Path) -> None:
    """Of another training in the process, that the recording has nothing to do with."""

    class Odd(torch.optim.SGD):
        __hash__ = None  # type: ignore[assignment]

    model, other = network(), network()
    odd, sgd = Odd(other.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(RuntimeWarning, match="the training goes on without: unhashable type"),
        bn.watch(model, tmp_path, schedule=bn.every(1)) as run,
    ):
        for _ in range(3):
            before = other[0].weight.detach().clone()
            step(other, odd)
            assert not torch.equal(before, other[0].weight)
            step(model, sgd)
    assert run.info["steps"] == 3
    assert len(run.info["errors"]) == 1


def test_watch_works_while_another_thread_imports_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is being imported is in sys.modules, with the names of its first lines only."""
    name = "torch._dynamo.eval_frame"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for wrapped in (network(), nn.DataParallel(network())):
        with bn.watch(wrapped, tmp_path / type(wrapped).__name__, schedule=bn.every(1)) as run:
            wrapped(torch.randn(4, 8)).sum().backward()
            run.probe(torch.randn(4, 8))
        assert [layer["name"] for layer in run.info["layers"]] == ["1", "3", "5"]


def test_recordings_without_a_path_each_get_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the same second, before any of them starts and while others start."""
    monkeypatch.chdir(tmp_path)
    runs = [bn.watch(network()) for _ in range(6)]
    in_threads(lambda number: runs[number].start(), 6)
    for run in runs:
        run.close()
    assert len({run.path for run in runs}) == 6
    assert all(bn.Run(run.path).info["status"] == "complete" for run in runs)
