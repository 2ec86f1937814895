"""How a GPU is timed and its kernels tuned, by stand-ins: calls replayed, caches written over, constants restored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import gpu_tune
from batchnorm.bench import conduct, contenders, record, table, timing
from batchnorm.bench.cases import Case
from batchnorm.bench.conduct import Settings
from batchnorm.bench.contenders import Contender, ForwardOnly
from batchnorm.bench.record import BenchError
from batchnorm.kernels.gpu import plan

SMALL = Case((4, 8, 6, 6), "contiguous")


def played(contender: Contender) -> Contender:
    """A contender as a graph has it: one call does both."""

    def forward() -> None:
        y = contender.forward()
        if contender.backward is not None:
            contender.backward(y)

    return ForwardOnly(forward)


@pytest.mark.parametrize("train", [True, False])
def test_a_call_is_recorded_once_and_replayed(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            log.append("wait")

    @contextmanager
    def within(what: object) -> Iterator[None]:
        log.append("begin")
        yield
        log.append("end")

    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    cuda = SimpleNamespace(
        Stream=Stream, current_stream=Stream, stream=within, CUDAGraph=lambda: graph, graph=within
    )  # fmt: skip
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    one = SimpleNamespace(
        forward=lambda: log.append("forward"), backward=(lambda y: log.append("backward")) if train else None
    )
    recorded = timing.replayed(one)
    call = ["forward", "backward"] if train else ["forward"]
    assert log == ["wait", "begin", *call * timing.WARM, "end", "wait", "begin", *call, "end"]
    log.clear()
    recorded.forward()
    assert recorded.backward is None
    assert log == ["replay"]


@pytest.mark.slow
def test_replayed_cases_have_whole_times_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "replayed", played)
    monkeypatch.setattr(Settings, "replayed", True)
    monkeypatch.setattr(Settings, "rotates", False)
    result = conduct.measure(SMALL, Settings("quick", repeats=3), record.machine())
    assert result["gate"]["passed"]
    assert set(result["ratios"]["eager"]) == set(result["floors"]) == {"whole"}
    result = table._group("a title", [result])
    assert "x fwd" not in result.columns
    assert len(result.rows[0]) == len(result.columns)


def test_calls_are_replayed_unless_they_are_to_be_called() -> None:
    assert Settings(device="cuda").replayed
    assert not Settings(device="cuda", called=True).replayed
    assert not Settings().replayed
    with pytest.raises(BenchError, match="called=True needs device='cuda'"):
        conduct.check(Settings(called=True))


@pytest.mark.slow
def test_the_cache_is_written_over_before_each_call() -> None:
    log: list[str] = []
    one = SimpleNamespace(forward=lambda: log.append("call"), backward=lambda y: None)
    timing.interleaved(
        {"one": one}, seconds=0, rounds=1, seed=0, before=lambda contender: log.append("cold")
    )  # fmt: skip
    assert log == ["cold", "call"] * (len(log) // 2)
    assert len(log) >= 6
    assert timing.cold_cache("cpu")(one) is None


def test_every_variant_names_constants_that_there_are_and_leaves_them() -> None:
    before = {name: getattr(plan, name) for different in gpu_tune.VARIANTS.values() for name in different}
    planned = plan.plan_passes(1000, 64, 1, 2, 132)
    for different in gpu_tune.VARIANTS.values():
        with pytest.raises(KeyboardInterrupt), gpu_tune.constants(different):
            assert all(getattr(plan, name) == value for name, value in different.items())
            assert different or plan.plan_passes(1000, 64, 1, 2, 132) == planned
            raise KeyboardInterrupt
    assert {name: getattr(plan, name) for name in before} == before
    assert plan.plan_passes(1000, 64, 1, 2, 132) == planned


def test_each_variant_changes_the_cut_of_a_case() -> None:
    def cuts() -> list[object]:
        found: list[object] = []
        for case in gpu_tune.CASES:
            n, c, *sides = case.shape
            slices, span = (n * sides[0] * sides[1], 1) if case.layout == "channels_last" else (n, sides[0] * sides[1])
            shape = slices, c, span, case.itemsize, 132
            found += [
                plan.plan_passes(*shape),
                plan.plan_resident(*shape, 2, True),
                plan.plan_rounds(*shape, 50 << 20, 2),
            ]
        return [*found, plan.STAGES]

    usual = cuts()
    for name, different in gpu_tune.VARIANTS.items():
        with gpu_tune.constants(different):
            assert (cuts() == usual) is (name == gpu_tune.DEFAULT), name


def test_variants_are_held_to_pytorch_and_timed_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, number = contenders.ours, iter(range(100))

    def sometimes_wrong(call: object) -> contenders.Layer:
        layer = ours(call)
        if next(number) == 1:
            outputs = layer.outputs
            layer.outputs = lambda: {**outputs(), "y": torch.zeros(SMALL.shape)}
        return layer

    monkeypatch.setattr(contenders, "ours", sometimes_wrong)
    result = gpu_tune.measure(SMALL, played, time.perf_counter_ns, lambda contender: None, "cpu")
    names = list(gpu_tune.VARIANTS)
    assert list(result["wrong"]) == [names[1]]
    assert set(result["ratios"]) == {"floor", *names} - {names[1]}
    assert result["ratios"][gpu_tune.DEFAULT]["median"] == 1.0
    gpu_tune._show(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_tune.main([]) == 2
    assert "sees no GPU here" in capsys.readouterr().out
