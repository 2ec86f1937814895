"""The rounds, under a clock that the contenders themselves move."""

import gc
import random

import pytest

from batchnorm.bench import timing
from batchnorm.bench.contenders import ForwardOnly


class Clock:
    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


class Player:
    """Takes `forward` and `backward` nanoseconds, and notes each call."""

    def __init__(self, name, clock, log, forward, backward=0):
        self.name, self.clock, self.log, self.times = name, clock, log, (forward, backward)
        self.collecting = []

    def forward(self):
        self.log.append(self.name)
        self.clock.now += self.times[0]
        return self.name

    def backward(self, y):
        assert y == self.name
        self.collecting.append(gc.isenabled())
        self.clock.now += self.times[1]


def play(seconds=0.0, rounds=None, train=True, seed=0, stop=lambda: False, scale=1):
    clock, log = Clock(), []
    players = {
        name: Player(name, clock, log, forward * scale, backward * scale)
        for name, forward, backward in (("a", 2_000_000, 1_000_000), ("b", 4_000_000, 5_000_000), ("c", 100_000, 0))
    }
    if not train:
        players = {name: ForwardOnly(player.forward) for name, player in players.items()}
    found = timing.interleaved(players, seconds=seconds, rounds=rounds, seed=seed, stop=stop, clock=clock)
    return found, log


@pytest.mark.slow
def test_forward_and_backward_are_timed_separately():
    found, _ = play(rounds=5)
    assert found["a"].forward == pytest.approx([2e-3] * 5)
    assert found["a"].backward == pytest.approx([1e-3] * 5)
    assert found["b"].whole == pytest.approx([9e-3] * 5)
    forward_only, _ = play(rounds=5, train=False)
    assert forward_only["b"].whole == pytest.approx([4e-3] * 5)
    assert found["b"].parts == ("whole", "forward", "backward")
    assert forward_only["b"].parts == ("whole",)


@pytest.mark.slow
def test_each_round_has_every_contender_and_the_order_changes():
    found, log = play(rounds=20)
    calls = {"a": 1, "b": 1, "c": 5}
    rounds, rest = [], log[2 * len(found) :]
    for _ in range(20):
        order = []
        while len(order) < 3:
            name = rest[0]
            assert rest[: calls[name]] == [name] * calls[name]
            del rest[: calls[name]]
            order.append(name)
        rounds.append(tuple(order))
    assert rest == []
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6
    assert play(rounds=20)[1] == log
    assert play(rounds=20, seed=1)[1] != log


@pytest.mark.slow
def test_what_is_quick_is_called_often_enough_for_the_clock():
    found, log = play(rounds=7)
    assert log.count("c") == 2 + 7 * 5  # 5 x 100 µs
    assert found["c"].forward == pytest.approx([1e-4] * 7)


@pytest.mark.slow
def test_rounds_go_on_until_the_time_is_spent_and_are_odd():
    assert len(play(seconds=0.05)[0]["a"].whole) == timing.MIN_ROUNDS
    rounds = len(play(seconds=0.3)[0]["a"].whole)
    assert rounds % 2 == 1
    assert 0.3 <= rounds * 12.5e-3 < 0.3 + 2 * 12.5e-3
    assert len(play(seconds=1e9)[0]["a"].whole) == timing.MAX_ROUNDS


def test_what_takes_far_too_long_ends_after_three_rounds():
    assert len(play(seconds=0.1, scale=1000)[0]["a"].whole) == 3


def test_stop_interrupts_between_two_rounds_and_collecting_goes_on():
    answers = iter([False, False, True])
    with pytest.raises(KeyboardInterrupt):
        play(rounds=9, stop=lambda: next(answers))
    assert gc.isenabled()


def test_the_collector_rests_while_rounds_are_timed():
    clock = Clock()
    player = Player("a", clock, [], 1_000_000)
    timing.interleaved({"a": player}, seconds=0.0, rounds=3, seed=0, clock=clock)
    assert player.collecting == [True, True, False, False, False]
    assert gc.isenabled()


def test_quartiles():
    assert timing.quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3, "q1": 2, "q3": 4, "min": 1, "max": 5}
    assert timing.quartiles([7.0]) == {"median": 7, "q1": 7, "q3": 7, "min": 7, "max": 7}


def test_a_ratio_is_taken_within_each_round():
    """A machine that halves its speed midway leaves the rounds' ratios alone; a ratio of medians it would not."""
    seed = 5
    draw = random.Random(seed)
    speeds = [draw.choice((1.0, 2.0, 4.0)) for _ in range(9)]
    ours, eager = [1.0 * s for s in speeds], [3.0 * s for s in speeds]
    assert timing.ratio(eager, ours) == pytest.approx(dict.fromkeys(("median", "q1", "q3", "min", "max"), 3.0)), seed
    assert timing.ratio([3.0, 8.0, 1.0], [1.0, 2.0, 1.0])["median"] == 3.0
    assert timing.ratio([5.0], [1.0], 2.5)["median"] == 2.0
