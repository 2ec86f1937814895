"""The page as data: what stands on it, in which order, for whole, partial and hostile Runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pages import build
from synthetic import ARMS, study

from batchnorm import quantities
from batchnorm.report.definitions import DEFINITIONS
from batchnorm.report.study.numbers import Study
from batchnorm.report.study.page import UNIT_COLUMNS, WORDS, StudyPage
from batchnorm.runs.run import Run

SMALL = {"width": 8, "layers": ("hidden1", "hidden2")}


def panels(page: StudyPage, section: str) -> list[str]:
    return [panel.id for each in page.sections if each.id == section for panel in each.panels]


@pytest.mark.slow
def test_the_sections_stand_in_the_order_of_the_question(page: StudyPage) -> None:
    assert [section.id for section in page.sections] == [
        "accuracy", "undo", "gamma-beta", "angle", "optimal", "percentiles", "gradient", "drift", "noise", "activation",
    ]  # fmt: skip
    assert all(section.panels for section in page.sections)
    identifiers = [panel.id for section in page.sections for panel in section.panels]
    assert len(set(identifiers)) == len(identifiers)


def test_each_layer_has_its_panels(page: StudyPage) -> None:
    assert panels(page, "undo") == ["undo-0", "undo-1", "undo-2"]
    assert panels(page, "gamma-beta") == ["gamma-0", "gamma-1", "gamma-2", "beta-0", "beta-1", "beta-2"]


def test_the_page_and_the_terminal_give_the_same_answer(page: StudyPage) -> None:
    assert page.answer.verdict == "no"
    assert [row.arm for row in page.summary] == list(ARMS)
    assert page.notices == ()


def test_the_bands_of_figure_1_share_one_scale_and_one_unit(page: StudyPage) -> None:
    section = next(section for section in page.sections if section.id == "percentiles")
    assert panels(page, "percentiles") == [
        *(f"percentiles-out-{arm}" for arm in ARMS),
        *(f"percentiles-in-{arm}" for arm in ARMS[1:]),
    ]
    domains = [panel.chart["layer"][0]["encoding"]["y"]["scale"]["domain"] for panel in section.panels]
    assert all(domain == domains[0] for domain in domains[:4])
    assert "of hidden3, seed 0" in section.note


def test_the_unit_shown_is_typical_of_its_layer(small: Path) -> None:
    run = study(small, seeds=(0,), measured=[0, 5000], arms=("none",), tables=("curves",), **SMALL)
    median = np.array([5.0, -3.0, 0.1, 4.0, -9.0])
    rows = {"seed": [0] * 5, "arm": ["none"] * 5, "step": [7] * 5, "layer": ["hidden1"] * 5, "unit": [0, 1, 2, 3, 9]}
    run.append("units", {**rows, **{f"{side}_p{p}": median + p for side in ("in", "out") for p in (15, 50, 85)}})
    section = next(section for section in build(run).sections if section.id == "percentiles")
    assert section.note.startswith("Unit 2 of hidden1")


def test_the_table_lists_every_unit_at_its_last_step(page: StudyPage) -> None:
    values, names = page.units["values"], page.units["names"]
    assert set(values["step"]) == {5000}
    assert names["layer"] == ["hidden1", "hidden2", "hidden3"]
    assert names["arm"][values["arm"][0]] == "learned"
    assert {len(column) for column in values.values()} == {3 * 4 * 300}
    assert None in values["gamma"], "the arm without batch normalization has no gamma"


@pytest.mark.slow
def test_a_seed_that_was_cut_short_is_listed_where_it_stopped(small: Path) -> None:
    run = study(small, seeds=(0,), measured=[0, 50, 5000], **SMALL)
    other = study(small.with_name("other"), seeds=(1,), measured=[0, 50], **SMALL)
    run.append("units", other.table("units"))
    values = build(run).units["values"]
    assert {(s, t) for s, t in zip(values["seed"], values["step"], strict=True)} == {(0, 5000), (1, 50)}


@pytest.mark.slow
def test_an_interrupted_run_and_a_diverged_arm_are_said_on_top(small: Path) -> None:
    lost = ({"seed": 1, "arm": "none", "step": 1200},)
    built = build(study(small, seeds=(0, 1), measured=[0, 9], status="interrupted", diverged=lost, **SMALL))
    assert "interrupted: recorded up to step 9" in built.notices[0]
    assert "none (seed 1, step 1,200)" in built.notices[1]


@pytest.mark.parametrize("kept", [(), ("curves",), ("units",), ("start", "parting"), ("optimal",)])
def test_a_run_with_few_tables_still_makes_a_page(small: Path, kept: tuple[str, ...]) -> None:
    built = build(study(small, seeds=(0,), measured=[0], tables=kept, status="running", **SMALL))
    assert len(built.sections) == 10
    assert built.answer.verdict == ("too early" if kept == ("units",) else "unknown")


def test_nan_and_infinity_everywhere_still_make_a_page(small: Path) -> None:
    run = study(small, seeds=(0,), measured=[0, 5000], tables=("curves",), **SMALL)
    columns = [name for name in UNIT_COLUMNS if name not in (*WORDS, "seed", "unit", "step")]
    for value in (np.nan, np.inf, -np.inf, 0.0, 1e300):
        for arm in ARMS:
            rows = {"seed": [0] * 2, "arm": [arm] * 2, "step": [0, 5000], "layer": ["hidden1"] * 2, "unit": [0, 1]}
            run.append("units", {**rows, **{name: np.full(2, value) for name in columns}})
    build(run)


def test_the_definitions_cover_every_quantity() -> None:
    text = " ".join(f"{d.name} {d.formula}" for d in DEFINITIONS).replace(" ", "_")
    names = (
        "undo_distance",
        "undo_index",
        "undo_angle",
        "bare_angle",
        "position_in",
        "gradient_diverted",
        "batch_noise",
    )
    for name in names:
        assert hasattr(quantities, name)
        assert name in text
    for name, definition in quantities.CLASS_DEFINITIONS.items():
        assert f"{name}: {definition}".replace(" ", "_") in text
    assert f"{quantities.LINEAR_REGIME:g}·max" in text


def test_provenance_says_what_ran_where(page: StudyPage) -> None:
    facts = {group.title: dict(group.entries) for group in page.provenance}
    assert facts["Run"]["command"] == "batchnorm study --data digits"
    assert facts["Run"]["status"] == "complete"
    assert facts["Versions"]["torch"] == "2.13.0"
    assert facts["Configuration"]["hidden"] == "100, 100, 100"


@pytest.mark.slow
def test_a_whole_study_is_built_in_seconds(run: Run) -> None:
    before = time.process_time()
    build(run)
    assert time.process_time() - before < 5


@pytest.mark.slow
def test_the_report_needs_no_torch(small: Path) -> None:
    run = study(small, seeds=(0,), measured=[0, 5000], **SMALL)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from batchnorm.runs.run import Run\n"
        "from batchnorm.report import Report\n"
        f"run = Run.open({str(run.path)!r}); Report.of(run).describe(); Report.of(run).write()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (run.path / "report.html").exists()


@pytest.mark.slow
def test_the_answer_needs_no_plotting_library() -> None:
    program = (
        "import sys; import batchnorm.report.study.terminal, batchnorm.report.watch.terminal\n"
        "assert not {'torch', 'altair', 'vl_convert', 'jinja2'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tables_are_read_once_and_whole(run: Run) -> None:
    read = Study.read(run)
    assert len(read.units) == run.table("units").num_rows
    assert read.arms == list(ARMS)
