"""Steps are counted from optimizer steps, else from training forwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

import batchnorm as bn
from batchnorm.recording.watch import Recorder
from batchnorm.runs.history import History
from batchnorm.runs.run import RunError
from batchnorm.words import ClassCounts


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    """Whatever a test does, PyTorch's list of hooks on all optimizers is as it was."""
    lists = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    before = [len(each) for each in lists]
    yield
    assert [len(each) for each in lists] == before


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def forward(model: nn.Module, rows: int = 6) -> torch.Tensor:
    return model(torch.randn(rows, 4)).square().mean()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, forwards: int = 1) -> None:
    optimizer.zero_grad()
    for _ in range(forwards):
        forward(model).backward()
    optimizer.step()


def recorded(path: Path) -> list[tuple[int, int]]:
    """(step, batches) of each snapshot."""
    history = History.read(bn.Run.open(path))
    return [(step, int(n)) for step, n in zip(history.steps.tolist(), history.layers[0]["batches"][:, 0], strict=True)]


def watch(model: nn.Module, path: Path, **settings) -> Recorder:
    return bn.watch(model, path, schedule=bn.every(1), **settings)


def test_a_step_is_an_optimizers(tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, tmp_path) as run:
        for _ in range(20):
            update(model, sgd)
        assert run.step == 20
    assert recorded(tmp_path) == [(step, 1) for step in range(20)]
    assert run.info["counted"] == "optimizer"
    assert run.info["steps"] == 20


@pytest.mark.parametrize("forwards", [4, 15])
def test_accumulated_forwards_are_one_step_from_the_first_on(forwards: int, tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, tmp_path):
        for _ in range(3):
            update(model, sgd, forwards)
    assert recorded(tmp_path) == [(0, forwards), (1, forwards), (2, forwards)]


@pytest.mark.parametrize("forwards", [1, 3, 40])
def test_without_an_optimizer_a_step_is_a_training_forward(forwards: int, tmp_path: Path) -> None:
    model = network()
    with watch(model, tmp_path) as run:
        for _ in range(forwards):
            grads = torch.autograd.grad(forward(model), list(model.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(model.parameters(), grads, strict=True):
                    parameter -= 0.1 * grad
            model.eval()
            forward(model)
            model.train()
    assert recorded(tmp_path) == [(step, 1) for step in range(forwards)]
    assert run.info["counted"] == "forwards"
    assert run.info["steps"] == forwards
    gammas = History.read(run).layers[0]["gamma"]
    assert len(set(gammas[:, 0].tolist())) == forwards, "each step has the gamma that it used"


def test_accumulation_of_any_length_with_a_given_optimizer(tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, tmp_path, optimizer=sgd):
        update(model, sgd, 30)
        update(model, sgd, 2)
    assert recorded(tmp_path) == [(0, 30), (1, 2)]


def test_of_several_optimizers_the_first_counts_until_it_rests(tmp_path: Path) -> None:
    model = network()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    strangers = torch.optim.SGD(network().parameters(), lr=0.1)
    with watch(model, tmp_path) as run:
        for _ in range(3):
            update(model, first)
            second.step()
            strangers.step()
        assert run.step == 3
        for _ in range(15):
            update(model, second)
        # Ten of its steps in a row with none of the first's between, the last above included: then it counts.
        assert run.step == 3 + 6


def test_a_deleted_optimizer_is_replaced_at_once(tmp_path: Path) -> None:
    model = network()
    with watch(model, tmp_path) as run:
        for kind in (torch.optim.SGD, torch.optim.Adam):
            optimizer = kind(model.parameters(), lr=0.1)
            update(model, optimizer)
            del optimizer
        assert run.step == 2


def test_a_step_that_grad_scaler_skips_is_not_counted(tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    with watch(model, tmp_path) as run:
        for overflow in (False, True, False):
            sgd.zero_grad()
            scaler.scale(forward(model) * (float("inf") if overflow else 1.0)).backward()
            scaler.step(sgd)
            scaler.update()
        assert run.step == 2
    assert recorded(tmp_path) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SGD])
@pytest.mark.parametrize("given", [True, False])
def test_a_closure_runs_inside_its_step_with_gamma_as_it_was_before(kind: Any, given: bool, tmp_path: Path) -> None:
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    used = []

    def closure() -> torch.Tensor:
        used.append(model[1].weight.detach().clone())
        optimizer.zero_grad()
        loss = forward(model)
        loss.backward()
        return loss

    starts = []
    with watch(model, tmp_path, optimizer=optimizer if given else None) as run:
        for _ in range(3):
            starts.append(len(used))
            optimizer.step(closure)
    (layer,) = History.read(run).layers
    assert layer.steps.tolist() == [0, 1, 2]
    for step, start in enumerate(starts):
        assert layer["gamma"][step].tolist() == used[start].tolist()


def test_norms_of_weights_are_measured_now_and_then_and_rates_always(tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    with watch(model, tmp_path) as run:
        update(model, sgd)
        for step in range(1, 25):
            sgd.param_groups[0]["lr"] = 0.1 / step
            norms.append(model[0].weight.detach().norm(dim=1))
            update(model, sgd)
    (layer,) = History.read(run).layers
    known = [int(step) for step in layer.steps[(layer["weight_norm"] > 0).all(axis=1)]]
    assert known == [0, 10, 20]
    torch.testing.assert_close(torch.from_numpy(layer["weight_norm"][10]).float(), norms[9])
    assert layer["lr"][5].tolist() == pytest.approx([0.1 / 5] * 3)
    assert layer["effective_lr"][10].tolist() == pytest.approx((0.01 / norms[9].square()).tolist(), rel=1e-5)


def test_a_log_belongs_to_the_step_in_hand(tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, tmp_path) as run:
        run.log(start=0)
        for _ in range(2):
            loss = forward(model)
            run.log(before=loss)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            run.log(after=loss, rate=0.1)
        run.log(step=77, chosen=torch.tensor([3.0]))
    rows = run.table("log").to_pylist()
    found = [(row["step"], row["name"]) for row in rows]
    assert found == [
        (0, "start"), (0, "before"), (0, "after"), (0, "rate"), (1, "before"), (1, "after"), (1, "rate"), (77, "chosen")
    ]  # fmt: skip
    assert rows[-1]["value"] == 3.0
    for value in (torch.ones(2), "much", None):
        with pytest.raises(TypeError, match=r"run\.log takes numbers"):
            run.log(loss=value)


def test_the_schedule_decides_and_nothing_is_attached_between(tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with bn.watch(model, tmp_path, schedule=lambda step: step % 3 == 1, optimizer=sgd):
        for _ in range(7):
            seen.append((type(model[1]) is nn.BatchNorm1d, "_tap" in model[1].__dict__))
            update(model, sgd)
    assert seen == [(step % 3 != 1, step % 3 == 1) for step in range(7)]
    assert recorded(tmp_path) == [(1, 1), (4, 1), (6, 0)], "the last step without a batch: nothing was attached"


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(("steps", "schedule"), [(300, None), (300, bn.every(1000)), (9, lambda step: False)])
def test_the_last_recorded_step_is_the_final_model(ours: bool, steps: int, schedule, tmp_path: Path) -> None:
    """300 steps by the default schedule ended "at step 288": twelve updates before the model that was saved."""
    model = network()
    if ours:
        bn.convert(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(model, tmp_path, schedule=schedule):
        for _ in range(steps):
            update(model, sgd)
    history = History.read(bn.Run.open(tmp_path))
    assert history.steps[-1] == steps - 1
    explanation = bn.explain(model)
    for layer, row, norm in zip(history.layers, explanation.rows, [model[1]], strict=True):
        for name, tensor in (("gamma", norm.weight), ("beta", norm.bias), ("running_var", norm.running_var)):
            np.testing.assert_array_equal(layer[name][-1], tensor.detach().numpy())
        assert ClassCounts.of(layer["class"][-1]) == row.classes, "as explain says of the model"


def test_a_last_step_that_was_recorded_stays_as_it_was(tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(model, tmp_path, schedule=bn.every(2)):
        for _ in range(5):
            update(model, sgd)
    assert recorded(tmp_path) == [(0, 1), (2, 1), (4, 1)]


@pytest.mark.parametrize("ours", [False, True])
def test_the_model_is_restored(ours: bool, tmp_path: Path) -> None:
    model = network()
    if ours:
        bn.convert(model)
    before = [(type(m), dict(m.__dict__), list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    class StoppedError(Exception):
        pass

    with pytest.raises(StoppedError), watch(model, tmp_path, optimizer=sgd):
        update(model, sgd)
        forward(model)
        raise StoppedError
    after = [(type(m), dict(m.__dict__), list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()]
    assert before == after
    run = bn.Run.open(tmp_path)
    assert run.info["status"] == "failed"
    assert recorded(tmp_path) == [(0, 1)]


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_watched_model_is_not_watched(copied, ours: bool, tmp_path: Path) -> None:
    model = network()
    if ours:
        bn.convert(model)
    plain = type(model[1])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, tmp_path, optimizer=sgd) as run:
        assert "_tap" in model[1].__dict__
        ema = copied(model)
        assert type(ema[1]) is plain
        assert ema[1].__dict__.get("_tap") is None
        update(model, sgd)
        forward(ema)
        assert run.step == 1
    assert recorded(tmp_path) == [(0, 1)]
    assert model.state_dict().keys() == ema.state_dict().keys()


def test_a_keyboard_interrupt_ends_the_run_as_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), watch(network(), tmp_path):
        raise KeyboardInterrupt
    assert bn.Run.open(tmp_path).info["status"] == "interrupted"


def test_start_and_close_do_without_a_with_block(tmp_path: Path) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(model, tmp_path / "a").start()
    update(model, sgd)
    run.close()
    run.close()
    run.log(loss=1)
    assert recorded(tmp_path / "a") == [(0, 1)]
    with pytest.raises(RunError, match="started before"):
        run.start()


def test_watching_torch_nns_layers_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    states = []
    for watched in (False, True):
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(3)
        run = watch(model, tmp_path).start() if watched else None
        for _ in range(10):
            update(model, sgd, 2)
        if run is not None:
            run.close()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("ours", [False, True], ids=["torch.nn", "ours"])
def test_a_recording_keeps_no_tensor_alive(ours: bool, tmp_path: Path) -> None:
    """Memory over a step as PyTorch's profiler counts it: its peak, and what is left after backward."""
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())])
    if ours:
        bn.convert(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    run = watch(model, tmp_path, optimizer=sgd)
    for watched in (False, True):
        if watched:
            run.start()
        for _ in range(2):  # the first is for what is lazy
            with torch.profiler.profile(profile_memory=True) as profiler:
                loss = model(torch.randn(512, 64)).square().mean()
                loss.backward()
            del loss
            sgd.step()
            sgd.zero_grad()
        found.append(in_use(profiler))
    run.close()
    activation = 512 * 64 * 4
    assert found[0][0] > 12 * activation
    for without, recorded in zip(*found, strict=True):
        assert recorded <= without + activation / 4, "vectors of 64 numbers, and no activation"


def in_use(profiler: Any) -> tuple[int, int]:
    """Bytes: the most, and at the end."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sums = [*accumulate(event.nbytes() for event in events)]
    return max(sums), sums[-1]
