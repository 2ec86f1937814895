"""examples/variants.py: its batches against hand computations, that arms share what they should, and its output."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent.parent / "examples" / "variants.py"
SPEC = spec_from_file_location("variants_example", PATH)
assert SPEC is not None
assert SPEC.loader is not None
EXAMPLE = module_from_spec(SPEC)
sys.modules["variants_example"] = EXAMPLE
SPEC.loader.exec_module(EXAMPLE)
CASES, LARGE, Case = EXAMPLE.CASES, EXAMPLE.LARGE, EXAMPLE.Case
Sequences, drawn, size_of, stretched = EXAMPLE.Sequences, EXAMPLE.drawn, EXAMPLE.size_of, EXAMPLE.stretched
verdict = EXAMPLE.verdict

LABELS = torch.arange(100) % 10


def case(name: str) -> Case:  # type: ignore[valid-type]
    return next(each for each in CASES if each.name == name)


def test_each_image_becomes_rows_at_its_pace() -> None:
    images = torch.rand(3, 8, 8) + 1
    x, lengths = stretched(images, torch.tensor([2, 0]), seed=0)
    assert x.shape == (2, 8, int(lengths.max()))
    for at, row in enumerate((2, 0)):
        pace = int(lengths[at]) // 8
        assert torch.equal(x[at, :, : lengths[at]].T, images[row].repeat_interleave(pace, 0))
        assert (x[at, :, lengths[at] :] == 0).all()


def test_sorted_batches_hold_two_classes_and_domains_take_turns() -> None:
    for at, (rows, number) in enumerate(islice(drawn(case("two classes a batch"), LABELS, 0), 6)):
        assert set(LABELS[rows].tolist()) == {2 * at % 10, (2 * at + 1) % 10}
        assert number == 0
    turns = [number for _, number in islice(drawn(case("images and negatives by turns"), LABELS, 0), 4)]
    assert turns == [0, 1, 0, 1]


def test_arms_see_the_same_batches_and_processes_that_synchronize_see_more_of_them() -> None:
    small = case("batches of 4")
    one, other = (next(drawn(small, LABELS, 3))[0] for _ in range(2))
    assert torch.equal(one, other)
    assert (size_of("batch norm", small), size_of("synchronized", small)) == (4, LARGE)
    assert size_of("synchronized", case("batches of 128")) == 128


def test_every_arm_makes_its_layer() -> None:
    made = {
        arm: type(EXAMPLE.network(arm, each, 100).body[1]).__name__
        for each in CASES
        for arm in each.arms
        if each.draw != "padded"
    }
    assert made == {
        "no norm": "Identity",
        "group norm": "GroupNorm",
        "batch norm": "BatchNorm2d",
        "recalibrated": "BatchNorm2d",
        "renorm": "BatchRenorm2d",
        "accumulate": "BatchNorm2d",
        "synchronized": "BatchNorm2d",
        "ghost": "GhostBatchNorm2d",
        "frozen after a fifth": "BatchNorm2d",
        "by domain": "DomainBatchNorm2d",
    }
    assert EXAMPLE.network("accumulate", case("batches of 4"), 100).body[1].accumulate == 8


@pytest.mark.parametrize("how", ["no norm", "outputs masked", "lengths"])
def test_masked_output_does_not_depend_on_the_padding(how: str) -> None:
    torch.manual_seed(0)
    model = Sequences(how).eval()
    x, lengths = torch.randn(3, 8, 12), torch.tensor([12, 5, 1])
    x = x * (torch.arange(12) < lengths[:, None])[:, None]
    torch.testing.assert_close(model(torch.nn.functional.pad(x, (0, 9)), lengths), model(x, lengths))


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([2.0, 1.0, 1.5], "better"),
        ([-2.0, -1.0, -1.5], "worse"),
        ([2.0, 1.0, -0.1], "no difference seen"),
        ([0.9, 0.8, 0.7], "no difference seen"),
        ([9.0, 9.0], "too few seeds"),
    ],
)
def test_a_verdict_needs_every_seed_and_a_point(gains: list[float], words: str) -> None:
    assert verdict(gains) == words


def example(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(PATH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_every_arm_of_every_case_is_measured_once() -> None:
    done = example("--seeds", "1", "--steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["case"], row["arm"]) for row in rows] == [(each.name, arm) for each in CASES for arm in each.arms]
    assert all(0 <= row["accuracy"] <= 100 for row in rows)
    assert all(row["mean_off"] < 1e-5 for row in rows if row["arm"] == "recalibrated"), "exact for any training"
    assert next(row for row in rows if row["arm"] == "padding counted")["mean_off"] > 0.1


@pytest.mark.slow
def test_wrong_options_are_refused() -> None:
    assert example("--seeds", "0").returncode == 2
    assert example("--lr", "nan").returncode == 2
