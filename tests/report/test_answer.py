"""The answer says what the numbers say, whichever way they point, and says so where they say nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pages import answer, summary
from synthetic import study

from batchnorm.report.study.answer import _headline, _undone_words
from batchnorm.report.study.numbers import Diverted, End, Study
from batchnorm.report.study.terminal import COLUMNS
from batchnorm.report.tables import Table
from batchnorm.runs.run import Run, RunError
from batchnorm.words import Spread, count, index, listing, number, percent

SMALL = {"width": 12, "layers": ("hidden1", "hidden2")}


def test_gamma_and_beta_that_do_not_undo_give_no(small: Path) -> None:
    result = answer(study(small, undo={"learned": 0.02, "undone": 0.7}, **SMALL))
    assert result.verdict == "no"
    assert result.headline.startswith("No. Gamma and beta could undo batch normalization")
    assert "none of the units ends undone" in result.headline
    assert "; when started undone, 99% end undone" in result.headline
    assert "most stay" in result.do.text
    assert "they learn to undo if the loss asks for it" in result.do.text


def test_gamma_and_beta_that_undo_give_yes(small: Path) -> None:
    result = answer(study(small, undo={"learned": 0.9, "undone": 0.95}, **SMALL))
    assert result.verdict == "yes"
    assert result.headline.startswith("Yes, here they do")
    assert (result.do.figure, result.do.label) == ("Yes", "100% of the units end undone")
    assert result.lead.number == "100%"
    assert "0.90" in result.do.text


def test_leaving_the_identity_is_distinguished_from_staying(small: Path) -> None:
    result = answer(study(small, undo={"learned": 0.02, "undone": 0.1}, **SMALL))
    assert "most leave" in result.do.text
    assert "even when started undone" in result.headline


def test_seeds_that_disagree_are_not_averaged_into_a_verdict(small: Path) -> None:
    run = study(small, seeds=(0, 1), undo={"learned": 0.02}, **SMALL)
    other = study(small.with_name("other"), seeds=(2,), undo={"learned": 0.95}, **SMALL)
    for name in other.tables():
        run.append(name, other.table(name))
    result = answer(run)
    assert result.verdict == "partly"
    assert "the seeds disagree" in result.headline
    assert "The seeds disagree." in result.do.text


def test_an_identity_that_was_not_reached_is_said_and_not_claimed_in_the_headline(small: Path) -> None:
    result = answer(study(small, identity=0.02, **SMALL))
    assert result.could.text.startswith("The identity was not reached here")
    assert result.could.figure == "Not here"
    assert "0.02" in result.could.label
    assert "could undo" not in result.headline


def test_could_they_is_answered_by_a_word_and_its_bound(small: Path) -> None:
    could = answer(study(small, identity=1.8e-7, **SMALL)).could
    assert could.figure == "Yes"
    assert could.label == "set to undo it, the logits are equal to within 1.8e-07 in inference mode"


def test_could_they_takes_the_largest_difference_over_seeds_and_says_what_remains(small: Path) -> None:
    run = study(small, seeds=(0,), tables=("curves",), **SMALL)
    for seed, largest, rms in ((0, 1e-6, 0.1), (1, 4e-6, 0.3), (2, 2e-6, 0.2)):
        rows = {"seed": [seed] * 3, "mode": ["inference", "training", "training"], "batch": [0, 0, 1]}
        run.append("start", {**rows, "rms": [1e-7, rms, rms], "max": [largest, 1.0, 1.0], "logit_std": [2.0] * 3})
    text = answer(run).could.text
    assert "within 4.0e-06 (the largest over 3 seeds)" in text
    assert "0.2 (0.1 to 0.3 over 3 seeds) remains, 10% of the logits' standard deviation" in text


def test_a_study_cut_short_at_once_says_that_too_little_was_measured(small: Path) -> None:
    result = answer(study(small, measured=[0, 1, 2, 3], seeds=(0,), status="interrupted", **SMALL))
    assert (result.verdict, result.lead.word) == ("too early", "Too early to say")
    assert result.headline.startswith("Too little was measured to say")
    assert result.do.text.startswith("Too little was measured to say.")


def test_one_seed_is_not_called_a_spread(small: Path) -> None:
    result = answer(study(small, seeds=(0,), **SMALL))
    assert "With one seed," in result.stays.text
    assert "(one seed)" in result.do.text
    assert "over 1" not in " ".join(result.lines())


def test_parting_is_the_first_step_where_the_arms_differ_by_more_than_the_seeds(small: Path) -> None:
    run = Run.create(small, "study", config={"steps": 100, "classes": 10})
    steps = np.array([0, 1, 10, 100])
    apart = np.array([0.0, 0.05, 0.3, 0.3])
    for seed, offset in ((0, 0.0), (1, 0.1)):
        for arm, gap in (("none", 0.0 * apart), ("undone", -apart)):
            columns = {"seed": [seed] * 4, "arm": [arm] * 4, "step": steps, "loss": 2 + offset + gap}
            run.append("curves", {**columns, "accuracy": [0.1, 0.5, 0.8, 0.9]})
    assert "From step 10 on, the held-out losses of `undone` and `none` differ" in answer(run).stays.text


def test_who_learns_faster_follows_the_curves(small: Path) -> None:
    slow = {"undone": 2000.0, "none": 50.0}
    fast = answer(study(small, **SMALL)).stays.text
    assert "`undone` learns faster: it reaches" in fast
    swapped = answer(study(small.with_name("other"), speed=slow, **SMALL)).stays.text
    assert "`none` learns faster: it reaches" in swapped
    same = answer(study(small.with_name("same"), speed={"undone": 90.0, "none": 90.0}, **SMALL)).stays.text
    assert "Neither learns clearly faster" in same
    stuck = answer(study(small.with_name("stuck"), speed={"none": 1e9}, seed_noise=0.0, **SMALL)).stays.text
    assert "only `undone` gets better than guessing" in stuck


def test_diverted_gradient_is_read_at_the_start_and_after(small: Path) -> None:
    diverted = Diverted.of_arm(Study.read(study(small, **SMALL)), "undone")
    assert diverted.start.median == pytest.approx(0.2, abs=0.02)
    assert 0.1 < diverted.after.median < diverted.start.median


def test_a_diverged_seed_is_left_out_of_the_end(small: Path) -> None:
    run = study(small, seeds=(0, 1), diverged=({"seed": 1, "arm": "learned", "step": 40},), **SMALL)
    rows = {row.arm: row for row in summary(run)}
    assert rows["learned"].accuracy.count == 1
    assert rows["learned"].diverged == 1
    assert rows["undone"].accuracy.count == 2
    assert rows["learned"].cells()[0] == "learned (diverged in 1)"


@pytest.mark.parametrize("missing", ["curves", "units", "start", "parting", "optimal"])
def test_a_missing_table_is_no_error(small: Path, missing: str) -> None:
    tables = {"curves", "units", "start", "parting", "optimal"} - {missing}
    run = study(small, seeds=(0, 1), measured=[0, 50, 5000], tables=tuple(tables), **SMALL)
    lines = answer(run).lines()
    assert len(lines) == 4
    assert "nan" not in " ".join(lines)
    summary(run)


@pytest.mark.parametrize("arms", [(), ("none",), ("learned",), ("fixed",), ("undone",), ("none", "undone")])
def test_missing_arms_are_no_error(small: Path, arms: tuple[str, ...]) -> None:
    run = study(small, seeds=(0,), measured=[0, 50, 5000], arms=arms, **SMALL)
    assert "nan" not in " ".join(answer(run).lines())
    assert [row.arm for row in summary(run)] == list(arms)


def test_nan_everywhere_is_not_known_rather_than_a_number(small: Path) -> None:
    run = Run.create(small, "study", config={"steps": 100, "classes": 10, "arms": ["learned", "undone", "none"]})
    nothing = [math.nan] * 4
    for arm in ("learned", "undone", "none"):
        keys = {"seed": [0, 0, 1, 1], "arm": [arm] * 4, "step": [0, 100, 0, 100]}
        run.append("curves", {**keys, "loss": nothing, "accuracy": nothing})
        units = {**keys, "layer": ["hidden1"] * 4, "unit": [0] * 4}
        run.append("units", {**units, "undo_index": nothing, "gamma": nothing, "gradient_diverted": nothing})
    modes = ["inference", "inference", "training", "training"]
    run.append("start", {"seed": [0, 1, 0, 1], "mode": modes, "rms": nothing, "max": nothing, "logit_std": nothing})
    result = answer(run)
    assert result.verdict == "unknown"
    assert [part.figure for part in result.parts] == ["Unknown", "Unknown", "not known"]
    assert result.lead.number == "not known"
    assert "nan" not in " ".join(result.lines()).lower()
    assert summary(run)[0].cells()[1:] == ("",) * (len(COLUMNS) - 1)


def test_an_empty_run_and_a_strange_run_json_are_no_error(small: Path) -> None:
    assert answer(Run.create(small, "study")).verdict == "unknown"
    info = {"config": [1], "diverged": [{"seed": "x"}, 3, {"arm": "none"}]}
    run = Run.create(small.with_name("strange"), "study", **info)
    assert Study.read(run).diverged == ()
    assert answer(run).verdict == "unknown"


def test_a_damaged_table_is_one_clear_line(small: Path) -> None:
    run = study(small, seeds=(0,), measured=[0, 1], **SMALL)
    next(small.glob("units-*.parquet")).write_bytes(b"PAR1 no more")
    with pytest.raises(RunError, match="damaged"):
        answer(run)


def test_words_of_numbers() -> None:
    assert [number(x) for x in (0, 3e-6, 0.1234, 12.345, 1234.5, math.nan)] == [
        "0", "3.0e-06", "0.123", "12.3", "1,234", "not known",
    ]  # fmt: skip
    assert [percent(x) for x in (0, 0.0004, 0.005, 0.37, 0.996, 1)] == [
        "0%", "under 0.1%", "0.5%", "37%", "99.6%", "100%",
    ]  # fmt: skip
    assert (index(-0.001), index(0.614)) == ("0.00", "0.61")
    assert (count(5000), count(math.nan)) == ("5,000", "not known")
    assert (listing("abc"), listing(["a"]), listing([])) == ("a, b and c", "a", "none")
    assert Spread.of([0.1, 0.3, 0.2, math.inf]).text(number) == "0.2 (0.1 to 0.3 over 3 seeds)"
    assert Spread.of([math.nan]).text(number) == "not known"
    assert Spread.of([]).cell(number) == ""
    assert Spread.of([0.5, 0.6, 0.7]).cell(percent) == "60% [50..70]"


def test_medians_of_groups_are_numpys() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=501)
    values[::7] = np.nan
    values[3] = np.inf
    step = rng.integers(0, 6, 501).astype(float)
    values[step == 5] = np.nan
    table = Table({"step": step, "value": values})
    grouped = table.spreads("value", ("step",))
    for at, median, low, high in zip(*(grouped[c] for c in ("step", "median", "low", "high")), strict=True):
        finite = values[(step == at) & np.isfinite(values)]
        expected = [f(finite) if finite.size else np.nan for f in (np.median, np.min, np.max)]
        np.testing.assert_allclose([median, low, high], expected)


def test_run_json_of_the_synthetic_study_is_the_one_described(run: Run) -> None:
    info = json.loads((run.path / "run.json").read_text())
    assert {"config", "versions", "machine", "command", "status", "seconds", "diverged"} <= info.keys()


def test_networks_that_did_not_learn_say_nothing(small: Path) -> None:
    """Gamma and beta that never moved look like a firm no; before anything was learned it would be none."""
    slow = {"none": 1e9, "learned": 1e9, "undone": 1e9, "fixed": 1e9}
    found = answer(study(small, speed=slow))
    assert found.verdict == "too early"
    assert found.headline.startswith("Too little was learned to say")
    assert "was not better than guessing" in found.do.text


def test_no_unit_is_said_only_where_no_seed_has_one() -> None:
    def headline(*undone: int) -> str:
        return _headline(end_of(*undone), end_of(), could=True)

    assert "none of the units" in headline(0, 0, 0)
    assert "only 3% of the units end undone" in headline(0, 0, 8)


def end_of(*undone: int) -> End:
    """Seeds of a hundred units, so many of which are undone and the others away."""
    codes = np.concatenate([np.zeros(0), *([0.0] * each + [3.0] * (100 - each) for each in undone)])
    seeds = np.repeat(np.arange(len(undone), dtype=float), 100)
    numbers = {"seed": seeds, "step": np.full(len(codes), 5000.0), "code": codes}
    return End(Table({**numbers, "undo_index": np.full(len(codes), 0.5)}))


def test_seeds_that_disagree_on_staying_are_said_to_disagree() -> None:
    words = _undone_words(end_of(52, 30, 80), 0)
    assert "the seeds disagree" in words
    assert "undone, most stay" not in words


def test_an_arm_that_diverged_is_said_to_have_diverged(small: Path) -> None:
    gone = tuple({"seed": seed, "arm": "learned", "step": 7} for seed in (0, 1, 2))
    found = answer(study(small, diverged=gone))
    assert "`learned` diverged in 3 seeds" in found.do.text
