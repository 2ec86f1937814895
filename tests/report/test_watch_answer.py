"""The answer of a watched training, with its cases; every claim rests on numbers chosen here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched import Made, log_spaced, watched

from batchnorm.report.watch.answer import WatchAnswer, answer
from batchnorm.report.watch.reading import read


def told(folder: Path, layers: list[Made], **options: Any) -> WatchAnswer:
    return answer(read(watched(folder / "run", layers, **options)))


def made(undone: int = 0, bare: int = 0, **options: Any) -> list[Made]:
    first = [Made(f"undone{i}", undo=0.95, **options) for i in range(undone)]
    return first + [Made(f"bare{i}", undo=0.0, **options) for i in range(bare)]


def test_undone(tmp_path: Path) -> None:
    found = told(tmp_path, made(undone=4))
    assert found.verdict == "undone"
    assert found.headline.startswith("Yes, here they do: at step 5,000, all of the units are nearer to undone")
    assert found.undo_index == pytest.approx(0.95, abs=0.02)
    assert found.nearer_undone == 1.0
    assert f"the median undo_index is {found.undo_index:.2f}" in found.headline


def test_not_undone(tmp_path: Path) -> None:
    found = told(tmp_path, made(bare=4))
    assert found.verdict == "not undone"
    assert found.headline.startswith("No: at step 5,000, none of the units is nearer to undone")
    assert abs(found.undo_index) < 0.1


def test_mixed_names_the_layers(tmp_path: Path) -> None:
    found = told(tmp_path, made(undone=2, bare=3))
    assert found.verdict == "mixed"
    assert found.nearer_undone == pytest.approx(0.4, abs=0.05)
    assert f"{100 * found.nearer_undone:.0f}% of the units are nearer to undone" in found.headline
    assert "Undone: undone0 and undone1; not: bare0, bare1 and bare2" in found.headline


def test_some_units_of_every_layer_are_mixed_too(tmp_path: Path) -> None:
    def some(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        s = np.sqrt(columns["var"] + 1e-5)
        columns["gamma"][1:, :4], columns["beta"][1:, :4] = s[1:, :4], columns["mean"][1:, :4]

    found = told(tmp_path, [Made(f"bn{i}", 10, wander=0.01, change=some) for i in range(3)])
    assert found.verdict == "too little", "the typical unit has not moved"
    found = told(tmp_path / "b", [Made(f"bn{i}", 10, wander=0.15, change=some) for i in range(3)])
    assert found.verdict == "mixed"
    assert "40% of the units are nearer to undone" in found.headline
    assert found.headline.endswith("No layer as a whole is undone.")


def test_halfway_is_neither(tmp_path: Path) -> None:
    """All units nearer to undone, but with a low undo_index, would be no "yes"."""
    found = told(tmp_path, [Made(f"bn{i}", undo=0.3, wander=0.0) for i in range(3)])
    assert found.verdict == "not undone"
    assert 0.2 < found.undo_index < 0.4


def test_one_exception_in_ten_is_named(tmp_path: Path) -> None:
    found = told(tmp_path, made(undone=1, bare=14))
    assert found.verdict == "not undone"
    assert found.headline.endswith("Except: undone0.")


def test_many_layers_are_not_all_named(tmp_path: Path) -> None:
    found = told(tmp_path, made(undone=7, bare=7))
    assert "undone3 and 3 more" in found.headline
    assert "undone4" not in found.headline


@pytest.mark.parametrize("steps", [[0], [0, 1], [0, 5, 19]], ids=str)
def test_few_snapshots_or_steps_are_too_little(tmp_path: Path, steps: list[int]) -> None:
    found = told(tmp_path, made(undone=3), steps=np.array(steps))
    assert found.verdict == "too little"
    assert found.headline.startswith("Too little to say")
    assert "Yes" not in found.headline


def test_gamma_and_beta_that_hardly_moved_are_no_evidence(tmp_path: Path) -> None:
    found = told(tmp_path, made(bare=3, wander=0.01))
    assert found.verdict == "too little"
    assert "hardly moved from where they were set" in found.headline
    assert abs(found.undo_index) < 0.05, "near 0 by construction, and not called a No"


def test_zero_initialized_gammas_that_did_not_move_are_no_evidence_either(tmp_path: Path) -> None:
    def zero(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["gamma"][:] = 0
        columns["beta"][:] = 0

    assert told(tmp_path, [Made("bn", change=zero)]).verdict == "too little"


def test_pretrained_gammas_count_as_they_are(tmp_path: Path) -> None:
    def held(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["gamma"][:] = columns["gamma"][-1]
        columns["beta"][:] = columns["beta"][-1]

    assert told(tmp_path, [Made("bn", change=held)]).verdict == "not undone"


def test_what_is_said_of_few_layers_does_not_stand_for_all(tmp_path: Path) -> None:
    still = [Made(f"still{i}", wander=0.0) for i in range(4)]
    found = told(tmp_path, [*still, *made(undone=2)])
    assert found.verdict == "too little"
    assert "of 4 of 6 layers" in found.headline
    assert "In the other 2, 100% of the units are nearer to undone." in found.headline


def test_layers_with_too_little_are_named_beside_the_others(tmp_path: Path) -> None:
    found = told(tmp_path, [Made("still", wander=0.0), *made(bare=3)])
    assert found.verdict == "not undone"
    assert found.headline.endswith("Too little to say of still.")


def test_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    assert told(tmp_path, made(bare=2), status="running").headline.startswith("So far: no: at step 5,000")


def test_layers_without_gamma_and_beta(tmp_path: Path) -> None:
    found = told(tmp_path, [Made("bn", facts={"affine": False}, wander=0.0)])
    assert found.verdict == "no affine"
    assert math.isnan(found.undo_index)
    beside = told(tmp_path / "b", [Made("plain", facts={"affine": False}, wander=0.0), *made(undone=2)])
    assert beside.verdict == "undone"
    assert [layer.name for layer in beside.layers] == ["undone0", "undone1"]


def test_no_layer_and_no_snapshot(tmp_path: Path) -> None:
    assert told(tmp_path, []).verdict == "no layer"
    empty = told(tmp_path / "b", made(bare=2), steps=np.zeros(0), status="running")
    assert empty.verdict == "too little"
    assert empty.headline.startswith("Nothing was recorded yet")


def test_layers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    def lost(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["gamma"][-3:] = np.nan

    found = told(tmp_path, [Made("lost", change=lost), *made(undone=2)])
    assert found.verdict == "undone"
    assert found.layers[0].why_not == "its numbers are not finite"


def test_the_gradient_and_the_noise_are_told_with_their_numbers(tmp_path: Path) -> None:
    def fixed(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["diverted"][:] = 0.25 * columns["energy"]
        columns["noise_mean"][:] = 0.002

    found = told(tmp_path, [Made("bn", change=fixed)])
    assert found.gradient_diverted == pytest.approx(0.25)
    assert found.batch_noise == pytest.approx(0.002)
    text = "\n".join(found.lines())
    assert "Of the typical unit's gradient energy, 25% is taken out" in text
    assert "0.002 of its variance" in text
    assert "2.4e-04 (m = 4,096)" in text


def test_what_was_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    def without(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["energy"][:] = np.nan

    found = told(tmp_path, [Made("bn", change=without)], steps=log_spaced(5000))
    assert math.isnan(found.gradient_diverted)
    assert "No gradient was recorded." in found.lines()[2]
    assert "not measured here" in found.lines()[3]


def test_a_dead_layer_undoes_nothing_although_input_and_output_are_alike(tmp_path: Path) -> None:
    """A network that collapsed: x and y are both constant, so y is x, and that is no answer."""

    def collapse(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        for name, value in (("mean", 0.0), ("var", 0.0), ("gamma", 1e-4), ("beta", 0.0), ("energy", 0.0)):
            columns[name][len(steps) // 2 :] = value

    found = told(tmp_path, [Made("a", change=collapse), Made("b", change=collapse)])
    assert found.verdict == "too little"
    assert "most of its units are dead" in found.headline
