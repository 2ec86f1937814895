"""A headline never contradicts a number beside it: random mixtures of classes, in every output that gives an answer."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mixtures import mixture, units
from pages import build
from synthetic import study
from watched import Made, watched

from batchnorm.checks.check import check
from batchnorm.quantities import CLASSES
from batchnorm.report.page import Lead
from batchnorm.report.study.answer import answer
from batchnorm.report.study.numbers import End, Study
from batchnorm.report.watch.answer import Summary
from batchnorm.report.watch.numbers import read
from batchnorm.words import SENTENCES, WORDS, ClassCounts, share
from randomness import SEED


def rng_of(case: int) -> np.random.Generator:
    return np.random.default_rng([SEED, case])


def counted(names: list[str]) -> ClassCounts:
    found = Counter(names)
    return ClassCounts(tuple(found[name] for name in CLASSES))


def expected_verdict(classes: ClassCounts) -> str:
    """The rule, written down once more."""
    total, moving = classes.units, sum(classes[name] for name in ("undone", "toward", "neither", "away"))
    if total == 0:
        return "unknown"
    if moving * 2 < total:
        most = max(classes["unknown"], classes["dead"], classes["nothing_to_undo"])
        order = (("unknown", "unknown"), ("dead", "dead"), ("nothing_to_undo", "nothing to undo"))
        return next(verdict for name, verdict in order if classes[name] == most)
    return "yes" if classes["undone"] * 2 > total else "partly" if classes["undone"] * 10 > total else "no"


def agrees(verdict: str, classes: ClassCounts, headline: str, undo_index: float, lead: Lead) -> None:
    """What is said in words, in the large number and in the headline is what the classes say."""
    assert verdict == expected_verdict(classes)
    assert lead.word == WORDS[verdict]
    assert lead.number == share(classes.share("undone"))
    head = headline.removeprefix("So far: ").lower()
    starts = {"yes": "yes", "no": "no", "partly": "in part", "dead": "most units are dead", "unknown": "unknown"}
    assert head.startswith(starts.get(verdict, "there is little to undo")), headline
    for name in CLASSES:
        assert (share(classes.share(name)) in headline) or not classes[name], (name, headline)
    if verdict == "yes":
        assert undo_index >= 0.5
    if verdict == "no":
        assert undo_index < 0.5


@pytest.mark.parametrize("case", range(40))
def test_of_a_watched_training(tmp_path: Path, case: int) -> None:
    rng = rng_of(case)
    mixtures = [mixture(rng, int(rng.integers(1, 40))) for _ in range(int(rng.integers(1, 6)))]

    def put(names: list[str]):
        arrays = units(names, rng)

        def change(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
            for name in ("mean", "var"):
                columns[name][:] = arrays[name]
            columns["gamma"][1:], columns["beta"][1:] = arrays["gamma"], arrays["beta"]
            columns["gamma"][0] = rng.uniform(0.5, 1.5, len(names))  # as pretrained: not all set alike

        return change

    layers = [Made(f"bn{i}", len(names), change=put(names)) for i, names in enumerate(mixtures)]
    run = watched(tmp_path / "run", layers)
    found = Summary("run", read(run))
    whole = ClassCounts.total_of(map(counted, mixtures))
    assert found.classes == whole
    agrees(found.verdict, whole, found.headline, found.undo_index, found.lead)
    for layer, names in zip(found.layers, mixtures, strict=True):
        assert layer.classes == counted(names)
        assert layer.verdict == expected_verdict(counted(names))
    undone = [layer.name for layer in found.layers if layer.classes["undone"] * 2 > layer.units]
    if "In no layer are most units undone" in found.headline:
        assert not undone
    if "most units are undone in" in found.headline.lower():
        assert undone
        result = found.headline.split("ost units are undone in ")[1].split(", not in")[0]
        assert undone[0] in result
    if ". Not in " in found.headline:
        result = found.headline.split(". Not in ")[1]
        assert not any(f"{name}," in result or f"{name}." in result for name in undone)
    page = build([run])
    assert page.headline == found.headline
    assert page.lead.as_rows
    assert [bar.classes for bar in page.lead.groups[0].bars] == list(map(counted, mixtures))
    assert [row.classes for row in page.runs[0].reading.layers] == list(map(counted, mixtures))


@pytest.mark.parametrize("case", range(12))
def test_of_several_runs(tmp_path: Path, case: int) -> None:
    rng = rng_of(1000 + case)
    runs, classes = [], []
    for number in range(3):
        names = mixture(rng, 30)
        arrays = units(names, rng)

        def change(columns, steps, arrays=arrays) -> None:
            for name in ("mean", "var"):
                columns[name][:] = arrays[name]
            columns["gamma"][1:], columns["beta"][1:] = arrays["gamma"], arrays["beta"]

        runs.append(watched(tmp_path / f"run{number}", [Made("bn", 30, change=change)]))
        classes.append(counted(names))
    page = build(runs)
    verdicts = [run.verdict for run in page.runs]
    for verdict, of in zip(verdicts, classes, strict=True):
        assert verdict in (expected_verdict(of), "too early")
    if len(set(verdicts)) == 1:
        assert page.headline == f"In all 3 runs {SENTENCES[verdicts[0]]}."
        assert page.lead.word == WORDS[verdicts[0]]
    else:
        assert page.lead.word == "The runs differ"
        for run, verdict in zip(page.runs, verdicts, strict=True):
            assert f"in {run.label} {SENTENCES[verdict]}" in page.headline
    assert page.lead.number == share(ClassCounts.total_of(classes).share("undone"))


@pytest.mark.parametrize("case", range(40))
def test_of_a_checkpoint(case: int) -> None:
    rng = rng_of(2000 + case)
    mixtures = [mixture(rng, int(rng.integers(1, 40))) for _ in range(int(rng.integers(1, 6)))]
    state = {}
    for number, names in enumerate(mixtures):
        arrays = units(names, rng)
        roles = {"running_mean": "mean", "running_var": "var", "weight": "gamma", "bias": "beta"}
        state |= {f"bn{number}.{leaf}": arrays[name] for leaf, name in roles.items()}
    found = check(state)
    whole = ClassCounts.total_of(map(counted, mixtures))
    result = found.explanation
    assert result.classes == whole
    assert [row.classes for row in result.rows] == list(map(counted, mixtures))
    page = build(found)
    assert page.parts[1].figure == page.lead.word == WORDS[expected_verdict(whole)]
    assert page.parts[0].figure == page.healthy.word == ("Yes" if found.healthy else "No")
    assert found.as_dict()["classes"] == whole.as_dict()
    if whole["unknown"] < whole.units:
        in_words = {"yes": "gamma and beta undo it:", "no": "gamma and beta do not undo it:"}
        for verdict, words in in_words.items():
            assert (words in result.headline) == (result.verdict == verdict)
        assert all(share(whole.share(name)) in result.headline for name in CLASSES if whole[name])
        assert result.verdict != "yes" or result.index >= 0.5
        assert result.verdict != "no" or result.index < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("case", range(20))
def test_of_a_study(tmp_path: Path, case: int) -> None:
    rng = rng_of(3000 + case)
    run = study(tmp_path / "run", tables=("curves", "start"), seeds=(0, 1, 2), measured=np.array([0, 5000]))
    layers = ("hidden1", "hidden2")
    mixtures: dict[tuple[str, int, str], list[str]] = {}
    bases = {arm: mixture(rng, 20) for arm in ("learned", "undone")}
    for arm in ("learned", "undone"):
        for seed in (0, 1, 2):
            for layer in layers:
                names = bases[arm] if rng.random() < 0.7 else mixture(rng, 20)
                mixtures[arm, seed, layer] = names
                arrays = units(names, rng)
                rows = {"seed": [seed] * 20, "arm": [arm] * 20, "layer": [layer] * 20, "unit": list(range(20))}
                columns = {**arrays, "s": np.sqrt(arrays["var"] + 1e-5)}
                run.append("units", {**rows, "step": [5000] * 20, **columns})
    numbers = Study.read(run)
    learned, undone = (End.of_arm(numbers, arm) for arm in ("learned", "undone"))
    for arm, end in (("learned", learned), ("undone", undone)):
        of_seeds = [ClassCounts.total_of(counted(mixtures[arm, seed, layer]) for layer in layers) for seed in (0, 1, 2)]
        assert list(end.seeds) == of_seeds
        assert end.classes == ClassCounts.total_of(of_seeds)
        verdicts = {expected_verdict(each) == "yes" for each in of_seeds}
        if end.measured:
            expected = expected_verdict(end.classes)
            if len(verdicts) > 1 and expected in ("yes", "no"):
                expected = "partly"
            assert end.verdict == expected
            assert end.share("undone").median == end.classes.share("undone")
            assert end.share("undone").low <= end.share("undone").median <= end.share("undone").high
    result = answer(numbers)
    page = build(run)
    assert result.lead.word == result.do.figure == WORDS[learned.verdict] == page.answer.lead.word
    starts = {"yes": "Yes, here they do", "no": "No.", "partly": "In part", "dead": "Most units are dead"}
    starts |= {"unknown": "Too little", "nothing to undo": "There is little to undo"}
    assert result.headline.startswith(starts[learned.verdict])
    if learned.measured:
        assert result.lead.number == share(learned.classes.share("undone"))
        assert learned.classes.text() in result.do.text
    rows = {row.arm: row for row in page.summary}
    for arm, end in (("learned", learned), ("undone", undone)):
        if end.measured:
            assert rows[arm].classes == end.classes
            assert rows[arm].undone.median == end.classes.share("undone")
            assert math.isclose(rows[arm].away.median, end.classes.share("away"))
