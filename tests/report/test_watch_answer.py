"""The answer of a watched training, with its cases; every claim rests on numbers chosen here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched import Made, log_spaced, watched

from batchnorm.report.watch.answer import Summary
from batchnorm.report.watch.numbers import read


def answer_of(folder: Path, layers: list[Made], **options: Any) -> Summary:
    return Summary("run", read(watched(folder / "run", layers, **options)))


def made(undone: int = 0, bare: int = 0, **options: Any) -> list[Made]:
    first = [Made(f"undone{i}", undo=0.95, **options) for i in range(undone)]
    return first + [Made(f"bare{i}", undo=0.0, **options) for i in range(bare)]


def test_undone(tmp_path: Path) -> None:
    found = answer_of(tmp_path, made(undone=4))
    assert (found.verdict, found.lead.word, found.lead.number) == ("yes", "Yes", "100%")
    assert found.headline.startswith("Yes, here they do: at step 5,000, of 64 units, 100% are undone; the median")
    assert found.undo_index == pytest.approx(0.95, abs=0.02)
    assert found.classes["undone"] == found.classes.units == 64
    assert found.undo_angle < 5 < found.bare_angle
    assert f"a median angle of {found.bare_angle:.1f}°" in found.parts[1].text
    assert found.parts[1].figure == f"{found.undo_angle:.1f}°"
    assert f"the median undo_index is {found.undo_index:.2f}" in found.headline


def test_not_undone(tmp_path: Path) -> None:
    found = answer_of(tmp_path, made(bare=4))
    assert (found.verdict, found.lead.word, found.lead.number) == ("no", "No", "0%")
    assert found.headline.startswith("No: at step 5,000, of 64 units, ")
    assert abs(found.undo_index) < 0.1


def test_mixed_names_the_layers(tmp_path: Path) -> None:
    found = answer_of(tmp_path, made(undone=2, bare=3))
    assert (found.verdict, found.lead.word) == ("partly", "In part")
    assert found.classes.share("undone") == pytest.approx(0.4, abs=0.05)
    assert f"{100 * found.classes.share('undone'):.1f}% are undone" in found.headline
    assert "Most units are undone in undone0 and undone1, not in bare0, bare1 and bare2" in found.headline


def test_some_units_of_every_layer_are_mixed_too(tmp_path: Path) -> None:
    def some(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        s = np.sqrt(columns["var"] + 1e-5)
        columns["gamma"][1:, :4], columns["beta"][1:, :4] = s[1:, :4], columns["mean"][1:, :4]

    found = answer_of(tmp_path, [Made(f"bn{i}", 10, wander=0.01, change=some) for i in range(3)])
    assert found.verdict == "too early", "the typical unit has not moved"
    found = answer_of(tmp_path / "b", [Made(f"bn{i}", 10, wander=0.15, change=some) for i in range(3)])
    assert found.verdict == "partly"
    assert "40% are undone" in found.headline
    assert found.headline.endswith("In no layer are most units undone.")


def test_part_of_the_way_is_toward(tmp_path: Path) -> None:
    """All units nearer to undone than to bare normalization, but less than half of the way, are no "yes"."""
    found = answer_of(tmp_path, [Made(f"bn{i}", undo=0.3, wander=0.0) for i in range(3)])
    assert found.verdict == "no"
    assert 0.2 < found.undo_index < 0.4
    assert "100% moved toward it" in found.headline


def test_passing_the_identity_and_going_on_is_no_yes(tmp_path: Path) -> None:
    """A network trained at too high a rate: y nearer to x than to xhat in most units, and yet a negative index."""

    def overshot(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        s = np.sqrt(columns["var"] + 1e-5)
        columns["gamma"][1:] = (s + 2.5 * (s - 1))[1:]
        columns["beta"][1:] = (3.5 * columns["mean"])[1:]

    found = answer_of(tmp_path, [Made(f"bn{i}", change=overshot) for i in range(3)])
    assert found.verdict == "no"
    assert found.undo_index < -1
    assert "100% moved away from it" in found.headline


def test_one_exception_in_ten_is_named(tmp_path: Path) -> None:
    found = answer_of(tmp_path, made(undone=1, bare=14))
    assert found.verdict == "no"
    assert found.headline.endswith("But most units are undone in undone0.")


def test_many_layers_are_not_all_named(tmp_path: Path) -> None:
    found = answer_of(tmp_path, made(undone=7, bare=7))
    assert "undone3 and 3 more" in found.headline
    assert "undone4" not in found.headline


@pytest.mark.parametrize("steps", [[0], [0, 1], [0, 5, 19]], ids=str)
def test_few_snapshots_or_steps_are_too_little(tmp_path: Path, steps: list[int]) -> None:
    found = answer_of(tmp_path, made(undone=3), steps=np.array(steps))
    assert (found.verdict, found.lead.word) == ("too early", "Too early to say")
    assert found.headline.startswith("Too early to say")
    assert "Yes" not in found.headline


def test_gamma_and_beta_that_hardly_moved_are_no_evidence(tmp_path: Path) -> None:
    found = answer_of(tmp_path, made(bare=3, wander=0.01))
    assert found.verdict == "too early"
    assert "hardly moved since the start" in found.headline
    assert abs(found.undo_index) < 0.05, "near 0 by construction, and not called a No"


def test_zero_initialized_gammas_that_did_not_move_are_no_evidence_either(tmp_path: Path) -> None:
    def zero(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["gamma"][:] = 0
        columns["beta"][:] = 0

    assert answer_of(tmp_path, [Made("bn", change=zero)]).verdict == "too early"


def test_pretrained_gammas_count_as_they_are(tmp_path: Path) -> None:
    def held(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["gamma"][:] = columns["gamma"][-1]
        columns["beta"][:] = columns["beta"][-1]

    assert answer_of(tmp_path, [Made("bn", change=held)]).verdict == "no"


def test_what_is_said_of_few_layers_does_not_stand_for_all(tmp_path: Path) -> None:
    still = [Made(f"still{i}", wander=0.0) for i in range(4)]
    found = answer_of(tmp_path, [*still, *made(undone=2)])
    assert found.verdict == "too early"
    assert "for 4 of 6 layers" in found.headline
    assert "In the other 2: 100% are undone." in found.headline


def test_it_is_the_units_that_count_not_the_layers(tmp_path: Path) -> None:
    """Many small layers that have not moved say nothing against a large one that has."""
    still = [Made(f"still{i}", units=2, wander=0.0) for i in range(4)]
    found = answer_of(tmp_path, [*still, *made(undone=2, units=32)])
    assert found.verdict == "yes"
    assert found.headline.endswith("Too early to say for still0, still1, still2 and still3.")
    assert found.classes.units == 64


def test_layers_with_too_little_are_named_beside_the_others(tmp_path: Path) -> None:
    found = answer_of(tmp_path, [Made("still", wander=0.0), *made(bare=3)])
    assert found.verdict == "no"
    assert found.headline.endswith("Too early to say for still.")


def test_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    assert answer_of(tmp_path, made(bare=2), status="running").headline.startswith("So far: no: at step 5,000")


def test_layers_without_gamma_and_beta(tmp_path: Path) -> None:
    found = answer_of(tmp_path, [Made("bn", facts={"affine": False}, wander=0.0)])
    assert found.verdict == "no affine"
    assert math.isnan(found.undo_index)
    beside = answer_of(tmp_path / "b", [Made("plain", facts={"affine": False}, wander=0.0), *made(undone=2)])
    assert beside.verdict == "yes"
    assert [layer.name for layer in beside.layers] == ["undone0", "undone1"]


def test_no_layer_and_no_snapshot(tmp_path: Path) -> None:
    assert answer_of(tmp_path, []).verdict == "no layer"
    empty = answer_of(tmp_path / "b", made(bare=2), steps=np.zeros(0), status="running")
    assert empty.verdict == "too early"
    assert empty.headline.startswith("Nothing was recorded yet")


def test_layers_that_are_not_finite_are_unknown(tmp_path: Path) -> None:
    def lost(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["gamma"][-3:] = np.nan

    found = answer_of(tmp_path, [Made("lost", change=lost), *made(undone=2)])
    assert found.verdict == "yes"
    assert found.layers[0].verdict == "unknown"
    assert "33.3% are unknown" in found.headline
    assert found.headline.endswith("Not in lost.")
    assert answer_of(tmp_path / "b", [Made("a", change=lost), Made("b", change=lost)]).verdict == "unknown"


def test_the_gradient_and_the_noise_are_shown_with_their_numbers(tmp_path: Path) -> None:
    def fixed(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["diverted"][:] = 0.25 * columns["energy"]
        columns["noise_mean"][:] = 0.002

    found = answer_of(tmp_path, [Made("bn", change=fixed)])
    assert found.gradient_diverted == pytest.approx(0.25)
    assert found.batch_noise == pytest.approx(0.002)
    text = "\n".join(found.lines())
    assert "removes 25% of the typical unit's gradient energy" in text
    assert "0.002 of its variance" in text
    assert "2.4e-04 (m = 4,096)" in text


def test_what_was_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    def without(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["energy"][:] = np.nan

    found = answer_of(tmp_path, [Made("bn", change=without)], steps=log_spaced(5000))
    assert math.isnan(found.gradient_diverted)
    assert "No gradient was recorded." in found.lines()[3]
    assert "It was not measured" in found.lines()[4]


def test_a_dead_layer_undoes_nothing_although_input_and_output_are_alike(tmp_path: Path) -> None:
    """A network that collapsed: x and y are both constant, so y is x, and that is no answer."""

    def collapse(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        for name, value in (("mean", 0.0), ("var", 0.0), ("gamma", 1e-4), ("beta", 0.0), ("energy", 0.0)):
            columns[name][len(steps) // 2 :] = value

    found = answer_of(tmp_path, [Made("a", change=collapse), Made("b", change=collapse)])
    assert (found.verdict, found.lead.word) == ("dead", "Dead")
    assert found.headline.startswith("Most units are dead: at step 5,000, of 32 units, 100% are dead")


def test_half_and_half_is_in_part(tmp_path: Path) -> None:
    found = answer_of(tmp_path, made(undone=2, bare=2))
    assert found.verdict == "partly"
    assert "50% are undone" in found.headline
    assert "Most units are undone in undone0 and undone1, not in bare0 and bare1." in found.headline


def test_where_the_input_is_normalized_already_there_is_nothing_to_undo(tmp_path: Path) -> None:
    def normalized(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
        columns["mean"][:], columns["var"][:] = 0.01, 1.02
        columns["gamma"][-1] = 40.0

    found = answer_of(tmp_path, [Made("bn", change=normalized)])
    assert (found.verdict, found.lead.word) == ("nothing to undo", "Nothing to undo")
    assert math.isnan(found.undo_index)
    assert "nan" not in " ".join(found.lines()).lower()
