"""The page of a check-up: as data, as HTML, in the terminal, in a browser, hostile names included."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Chromium
from pages import build, write
from rich.console import Console

from batchnorm import words
from batchnorm.checks.check import Checkup, check
from batchnorm.report.checkup.page import LAYERS, UNITS, show
from batchnorm.report.page import render
from batchnorm.runs.run import RunError

HOSTILE = (
    "<script>window.hacked = true</script>",
    "</script><!--<img src=x onerror='window.hacked = true'>",
    "\"'`&amp; ${window.hacked = true} \u2028 größe 层/…",
    "\x1b[31mred\x07",
    "x" * 10_000,
)
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"


def state(names: tuple[str, ...] = ("stem.bn", "head.bn"), units: int = 20, **changed: Any) -> dict[str, np.ndarray]:
    """A state dict of layers that look trained; `changed` holds values of the first unit of the first layer."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for name in names:
        made[f"{name}.weight"] = 1 + 0.2 * rng.standard_normal(units)
        made[f"{name}.bias"] = 0.2 * rng.standard_normal(units)
        made[f"{name}.running_mean"] = rng.standard_normal(units)
        made[f"{name}.running_var"] = 1 + rng.random(units)
        made[f"{name}.num_batches_tracked"] = np.array(1000)
    for leaf, value in changed.items():
        made[f"{names[0]}.{leaf}"][0] = value
    return made


@pytest.fixture(scope="module")
def sick() -> Checkup:
    made = state(weight=1e-4, bias=0.0)
    made["head.bn.running_var"][0] = float("nan")
    return check(made)


def printed(found: Checkup, width: int = 80) -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=width))
    return out.getvalue()


def test_the_page_says_what_was_found_and_what_gamma_and_beta_do(sick: Checkup) -> None:
    page = build(sick)
    assert page.headline == "2 batch norm layers, 40 units: 1 error, 1 warning."
    assert [(group.kind.slug, group.severity) for group in page.findings] == [
        ("non-finite", "error"),
        ("dead-units", "warning"),
    ]
    assert (page.parts[0].figure, page.parts[0].label) == ("No", "with 1 error, 1 warning")
    assert page.parts[1].sentences == (sick.explanation.headline, sick.explanation.scale_free)
    assert (page.healthy.word, page.healthy.number) == ("No", "1")
    assert [bar.label for bar in page.lead.groups[0].bars] == ["stem.bn", "head.bn"]
    assert page.lead.number == words.share(sick.explanation.classes.share("undone"))
    assert [row.layer for row in page.layers] == ["stem.bn", "head.bn"]
    assert [panel.id for panel in page.panels] == ["undo-index", "variance", "gamma-s", "beta-mean"]


def test_every_unit_is_in_the_table_and_what_is_not_finite_is_empty(sick: Checkup) -> None:
    units = build(sick).units
    assert len(units["values"]["unit"]) == 40
    assert units["values"]["running_var"][20] is None
    assert units["names"]["class"][units["values"]["class"][0]] == "dead"
    assert units["names"]["class"][units["values"]["class"][20]] == "unknown"
    assert units["values"]["gamma"][0] == 1e-4
    assert {len(column) for column in units["values"].values()} == {40}
    json.dumps(units, allow_nan=False)


def test_a_healthy_one_says_so() -> None:
    page = build(check(state()))
    assert page.parts[0].figure == "Yes"
    assert page.findings == ()


def test_without_any_layer_there_is_still_a_page(tmp_path: Path) -> None:
    found = check({"fc.weight": np.ones((2, 3))})
    text = write(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "There is no batch norm layer." in text
    assert "no-norms" in printed(found)


def test_many_units_are_cut_with_a_notice() -> None:
    page = build(check(state(units=UNITS)))
    assert len(page.units["values"]["unit"]) == UNITS
    assert page.notices == (f"The table of units shows the first {UNITS:,} of {2 * UNITS:,}.",)


def test_the_same_check_gives_the_same_page(sick: Checkup) -> None:
    assert render(build(sick)) == render(build(sick))


def test_a_healthy_network_is_answered_by_a_word() -> None:
    page = build(check(state()))
    assert (page.healthy.word, page.healthy.number, page.healthy.label) == (
        "Yes",
        "0",
        "errors: no rule found anything",
    )
    assert page.parts[0].figure == "Yes"
    warned = build(check(state(weight=1e-4, bias=0.0)))
    assert (warned.healthy.word, warned.healthy.label) == ("Yes", "errors; found: 1 warning")
    assert (warned.parts[0].figure, warned.parts[0].label) == ("Yes", "with 1 warning")
    assert '<p class="word">Yes</p>' in render(warned)


def test_a_page_that_cannot_be_written_is_one_line(sick: Checkup, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        write(sick, tmp_path / "no" / "such" / "folder.html")


def test_the_terminal_fits_80_columns_and_says_it_all(sick: Checkup) -> None:
    text = printed(sick)
    table = text[: text.index("By the running")]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("1 error, 1 warning", "stem.bn", "non-finite", "dead-units", "did neither"):
        assert word in text


@pytest.mark.parametrize("fed", [True, False])
def test_the_module_before_a_layer_is_shown_if_known(fed: bool) -> None:
    before = {"stem.conv.weight": np.zeros((20, 3, 1, 1))} if fed else {}
    found = check(before | state())
    page = render(build(found))
    assert ('<td class="text" title="stem.conv">stem.conv</td>' in page) is fed
    assert ("weight before it</th>" in page) is fed
    assert "type</th>" not in page, "a file does not say it"
    for width in (80, 120):
        assert ("stem.conv" in printed(found, width)) is (fed and width == 120)


def test_a_models_layers_have_types() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    page = render(build(check(model)))
    assert '<td class="text" title="BatchNorm1d">BatchNorm1d</td><td class="text" title="0">0</td>' in page


def test_a_file_with_a_million_layers_would_not_fill_the_terminal() -> None:
    found = check(state(tuple(f"bn{i}" for i in range(LAYERS + 5)), units=1))
    text = printed(found)
    assert f"bn{LAYERS - 1} " in text
    assert f"bn{LAYERS} " not in text


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert not re.search("[\x00-\x08\x0e-\x1f]", printed(check(state(HOSTILE, running_var=float("nan")))))


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (380, "light")])
def test_in_a_browser_charts_are_drawn_and_nothing_sticks_out(
    sick: Checkup, tmp_path: Path, browser: Chromium, width: int, scheme: str
) -> None:
    browser.open(write(sick, tmp_path / "page.html"), width, scheme)
    browser.wait("document.documentElement.dataset.ready === 'true'")
    assert browser.evaluate("document.querySelectorAll('.chart svg').length") == 4
    assert browser.evaluate(OVERFLOW) <= 0
    assert browser.evaluate("document.querySelectorAll('#unit-table tbody tr').length") == 40
    assert browser.evaluate("document.querySelectorAll('#filters select').length") == 2, "by layer and by class"
    assert browser.evaluate("document.querySelectorAll('#answer svg.bar rect').length") >= 4
    assert browser.evaluate("document.querySelector('#answer').getBoundingClientRect().top") < 300


@pytest.mark.browser
def test_hostile_names_stay_text(tmp_path: Path, browser: Chromium) -> None:
    browser.open(write(check(state(HOSTILE, running_var=float("nan"))), tmp_path / "page.html"))
    browser.wait("document.documentElement.dataset.ready === 'true'")
    assert browser.evaluate("window.hacked === undefined")
    assert browser.evaluate(OVERFLOW) <= 0
