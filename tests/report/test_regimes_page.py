"""The verdicts on made-up figures, and what the page and the terminal make of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import vl_convert

from batchnorm.report.regimes import html, page, terminal, verdicts
from batchnorm.runs.run import Run


def a_run(folder: Path, accuracies: dict[str, Sequence[float]], part: str = "small batches") -> Run:
    run = Run.create(folder / "run", "regimes")
    rows = [
        {"seed": seed, "part": part, "case": "batches of 2", "arm": arm, "accuracy": value, "loss": 1.0}
        | {"statistics_error": float("nan") if arm == "no norm" else 0.1}
        for arm, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    run.append("results", {name: [row[name] for row in rows] for name in rows[0]})
    run.finish("complete")
    return run


BASE = [0.80, 0.82, 0.78]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.82, 0.84, 0.80], "better"),
        ([0.78, 0.80, 0.76], "worse"),
        ([0.805, 0.825, 0.785], "no difference seen"),  # all of one sign, but half a point
        ([0.90, 0.92, 0.77], "no difference seen"),  # ten points, but one seed says no
        ([0.80, 0.92, 0.88], "no difference seen"),  # one seed says nothing
        ([0.82, 0.84], "too few seeds"),
    ],
)
def test_a_verdict_needs_all_seeds_and_a_point(values: list[float], verdict: str, tmp_path: Path) -> None:
    found = verdicts.arms(a_run(tmp_path, {"batch norm": BASE, "renorm": values}))
    assert [arm.verdict for arm in found] == ["", verdict]


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    """The ranges overlap; every seed says the same."""
    found = verdicts.arms(a_run(tmp_path, {"batch norm": [0.5, 0.6, 0.9], "renorm": [0.52, 0.63, 0.93]}))
    assert found[1].points == pytest.approx(3)
    assert found[1].verdict == "better"


def test_padded_sequences_are_compared_with_counted_padding(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"no norm": BASE, "padding counted": BASE, "lengths": [0.9] * 3}, "padded sequences")
    assert [arm.reference for arm in verdicts.arms(run)] == ["padding counted"] * 3
    assert verdicts.sentences(verdicts.arms(run))[-1] == (
        "lengths",
        "better than padding counted: batches of 2 (+10.0)",
    )


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ({"batch norm": BASE, "renorm": [0.9] * 3, "ghost": BASE}, "in every seed: renorm."),
        ({"batch norm": BASE, "renorm": [0.1] * 3}, "None of the regimes was better"),
        ({"batch norm": BASE[:2], "renorm": [0.9] * 2}, "Fewer than 3 seeds"),
    ],
)
def test_the_headline_can_go_either_way(accuracies: dict[str, list[float]], words: str, tmp_path: Path) -> None:
    assert words in verdicts.headline(verdicts.arms(a_run(tmp_path, accuracies)))


def test_the_page_has_every_arm_and_escapes_its_words(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"batch norm": BASE, "<script>alert(1)</script>": [0.9] * 3, "no norm": [0.1] * 3})
    built = page.build(run)
    assert [row[1] for row in built.rows] == ["batch norm", "<script>alert(1)</script>", "no norm"]
    assert built.rows[0][2] == "80.0% [78.0..82.0]"
    assert built.rows[2][4] == "", "no norm has no statistics"
    (part,) = built.parts
    assert [panel.title for panel in part[1]] == ["batches of 2"]
    assert [record["verdict"] for record in part[1][0].chart["data"]["values"]] == ["", "better", "worse"]
    assert vl_convert.vegalite_to_svg(part[1][0].chart).startswith("<svg")
    text = html.write(run).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "When is each regime worth it?" in text


def test_an_unfinished_study_says_so_and_an_empty_one_too(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "empty", "regimes")
    run.finish("interrupted")
    built = page.build(run)
    assert built.headline == "Nothing was measured."
    assert built.notices == ("The study is interrupted: this is what was measured.",)
    html.write(run)


def test_the_terminal_fits_in_80_columns_and_json_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = a_run(tmp_path, {"batch norm": BASE, "frozen after a fifth": [0.805] * 3})
    terminal.show(run)
    table = capsys.readouterr().out.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "no difference seen" in table
    told = json.loads(json.dumps(terminal.described(run)))
    assert told["arms"][1]["verdict"] == "no difference seen"
