"""Calls rotate through copies of their tensors: how many there are, and that every contender uses the one it takes."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from batchnorm.bench import conduct, contenders, record, rotation, timing
from batchnorm.bench.cases import Case
from batchnorm.bench.conduct import Settings
from batchnorm.bench.rotation import Room, Rotation

MIB = 1 << 20
SMALL = Case((4, 6, 5, 3), "contiguous", variant="bn+add+relu")


@pytest.mark.parametrize(
    ("last_level", "memory", "wanted", "most"),
    [
        (8 * MIB, 64 << 30, 64 * MIB, 1024 * MIB),
        (48 * MIB, 64 << 30, 96 * MIB, 1024 * MIB),
        (48 * MIB, None, 96 * MIB, 1024 * MIB),
        (800 * MIB, 64 << 30, 1024 * MIB, 1024 * MIB),
        (8 * MIB, 256 * MIB, 32 * MIB, 32 * MIB),
    ],
)
def test_copies_exceed_the_cache_twice_and_leave_most_of_the_memory(
    last_level: int, memory: int | None, wanted: int, most: int
) -> None:
    assert Room.of(last_level, memory) == Room(wanted, most)


@pytest.mark.parametrize(
    ("shape", "mode", "copies"),
    [
        ((1024, 1024), "train", 8),  # 8 MiB each
        ((1024, 1024), "eval", 16),  # grad_y is x
        ((4096, 1024), "train", 2),
        ((20480, 1024), "train", 2),  # one alone exceeds the cache, but the next call would find the end of it there
        ((100 << 10, 1024), "train", 1),  # two would exceed the room
        ((2, 8), "train", rotation.MOST_COPIES),
    ],
)
def test_the_number_of_copies(shape: tuple[int, ...], mode: str, copies: int) -> None:
    x = torch.empty(shape, device="meta")
    call = replace(SMALL.make(0), x=x, grad_y=x, residual=None, training=mode == "train")
    room = Room(64 * MIB, 1024 * MIB)
    assert room.copies(call) == copies
    assert room.holds(call) is (rotation.tensor_bytes(call) < 64 * MIB)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_copies_have_the_values_and_strides_in_other_memory(mode: str) -> None:
    case = Case((4, 6, 5, 3), "channels_last", "bfloat16", "bn+add+relu", mode)
    calls = Rotation(case.make(0), 3).calls
    for name in ("x", "grad_y", "residual"):
        tensors = [getattr(call, name) for call in calls]
        assert all(torch.equal(one, tensors[0]) and one.stride() == tensors[0].stride() for one in tensors)
        assert len({one.data_ptr() for one in tensors}) == 3
    assert all((call.grad_y is call.x) is (mode == "eval") for call in calls)
    assert rotation.tensor_bytes(calls[0]) == (3 if case.train else 2) * case.tensor_bytes
    assert calls[1].gamma is calls[0].gamma


def test_each_call_takes_the_next_copy_and_all_return_to_the_first() -> None:
    turning = Rotation(SMALL.make(0), 3)
    first, second, third = turning.calls
    taken: list[object] = []
    one, other = SimpleNamespace(take=taken.append), SimpleNamespace(take=taken.append)
    for contender in (one, other, one, one):
        turning.turn(contender)
    assert [call is expected for call, expected in zip(taken, (second, third, first, second), strict=True)] == [
        True
    ] * 4
    gone = weakref.ref(third.x)
    taken.clear()
    del second, third
    turning.stop([one, other])
    gc.collect()
    assert gone() is None
    assert [call is first for call in taken] == [True, True]


CONTENDERS = {
    "ours": contenders.ours,
    "eager": contenders.eager,
    "in place": lambda call: contenders.eager(call, inplace=True),
    "jax": lambda call: contenders.Jax(call, channels_last=False),
}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_contender_computes_with_the_tensors_it_took(name: str, mode: str) -> None:
    if name == "jax" and not contenders.has_jax():
        pytest.skip("JAX is not installed")
    case = replace(SMALL, mode=mode)
    call, other = case.make(0), case.make(1)
    call = replace(call, gamma=other.gamma, beta=other.beta, running_mean=other.running_mean)
    call = replace(call, running_var=other.running_var)
    contender = CONTENDERS[name](call)
    contender.take(other)
    expected = CONTENDERS[name](other).outputs()
    for key, value in contender.outputs().items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("cold", [True, False])
def test_the_floor_copies_the_tensor_it_took(cold: bool) -> None:
    call, other = SMALL.make(0), SMALL.make(1)
    floor = contenders.floor(call, cold=cold)
    assert torch.equal(floor.forward(), call.x)
    floor.take(other)
    assert torch.equal(floor.forward(), other.x)


def test_results_stay_alive_for_as_many_calls_and_are_freed_then() -> None:
    alive: list[int] = []

    class Result:
        count = 0

        def __init__(self) -> None:
            Result.count += 1

        def __del__(self) -> None:
            Result.count -= 1

    def forward() -> Result:
        alive.append(Result.count)
        return Result()

    for keep in (0, 3):
        alive.clear()
        one = SimpleNamespace(forward=forward, backward=None)
        timing.interleaved({"one": one}, seconds=0.0, rounds=3, seed=0, keep=keep)
        assert alive[:5] == [min(done, keep) for done in range(5)]
        assert Result.count == 0


def test_a_small_case_is_timed_cold_and_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[int, set[int]] = {}
    take = contenders.Layer.take

    def noting(self: contenders.Layer, call: object) -> None:
        taken.setdefault(id(self), set()).add(call.x.data_ptr())
        take(self, call)

    monkeypatch.setattr(contenders.Layer, "take", noting)
    monkeypatch.setattr(contenders, "has_jax", lambda: False)
    result = conduct.measure(Case((60, 100), "rows"), Settings("quick", repeats=3), record.machine())
    assert result["rotated"] > 1000
    assert [len(places) > 3 for places in taken.values()] == [True, True, True]
    assert set(result["warm"]) == {"copies", "contenders", "ratios", "floors", "gigabytes_per_second"}
    for part in (result, result["warm"]):
        assert list(part["contenders"]) == ["ours", "eager", "floor", "in place"]
        assert {side["rounds"] for side in part["contenders"].values()} == {3}


def test_what_exceeds_the_caches_is_timed_cold_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "LEAST_BYTES", 1000)
    monkeypatch.setattr(contenders, "has_jax", lambda: False)
    machine = record.machine() | {"caches": {"L3": 1000}}
    result = conduct.measure(Case((60, 100), "rows"), Settings("quick", repeats=3), machine)
    assert result["rotated"] == 2
    assert "warm" not in result
