"""What the study of regimes trains on, held against hand computations, and that its arms share what they should."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from batchnorm.runs.run import Run
from batchnorm.study.data import load
from batchnorm.study.regimes.cases import CASES, LARGE, Case, drawn, norm_of, size_of, stretched
from batchnorm.study.regimes.experiment import Config, study, trained, work
from batchnorm.study.regimes.networks import Sequences

LABELS = torch.arange(100) % 10


def case(name: str) -> Case:
    return next(each for each in CASES if each.name == name)


def test_each_image_becomes_its_rows_at_a_pace_of_its_own() -> None:
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
        arm: type(norm_of(arm, each, 100)(8)).__name__ for each in CASES for arm in each.arms if each.draw != "padded"
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
    assert norm_of("accumulate", case("batches of 4"), 100)(8).accumulate == 8


@pytest.mark.parametrize("how", ["no norm", "outputs masked", "lengths"])
def test_what_is_masked_does_not_depend_on_the_padding(how: str) -> None:
    torch.manual_seed(0)
    model = Sequences(8, 10, how).eval()
    x, lengths = torch.randn(3, 8, 12), torch.tensor([12, 5, 1])
    x = x * (torch.arange(12) < lengths[:, None])[:, None]
    torch.testing.assert_close(model(torch.nn.functional.pad(x, (0, 9)), lengths), model(x, lengths))


def test_every_arm_of_every_case_is_measured_once(tmp_path: Path) -> None:
    run, done = Run.create(tmp_path / "run", "regimes"), []
    config = Config(seeds=1, steps=2)
    study(config, load("digits"), run, done.append)
    assert sum(done) == work(config) == 2 * len(list(trained(config)))
    rows = run.table("results").to_pylist()
    assert [(row["case"], row["arm"]) for row in rows if row["arm"] != "recalibrated"] == [
        (each.name, arm) for _, each, arm in trained(config)
    ]
    again = [row for row in rows if row["arm"] == "recalibrated"]
    assert {row["case"] for row in again} == {each.name for each in CASES if "recalibrated" in each.arms}
    assert all(row["statistics_error"] < 1e-5 for row in again), "exact, whatever the training did"
    counted = next(row for row in rows if row["arm"] == "padding counted")
    assert counted["statistics_error"] > 0.1
    assert all(np.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1 for row in rows)


def test_an_interrupted_study_keeps_what_was_measured(tmp_path: Path) -> None:
    run, steps = Run.create(tmp_path / "run", "regimes"), []

    def advance(units: int) -> None:
        steps.append(units)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(Config(seeds=1, steps=2), load("digits"), run, advance)
    assert run.table("results").num_rows == 2
