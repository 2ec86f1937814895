"""The page of a diff: as data, as HTML, in the terminal, in a browser, hostile names included."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Chromium
from pages import build, write
from rich.console import Console

from batchnorm.checks.diff import Diff, diff
from batchnorm.report import Report
from batchnorm.report.diff.page import LISTED, UNITS, show
from batchnorm.report.page import render

HOSTILE = (
    "<script>window.hacked = true</script>",
    "</script><!--<img src=x onerror='window.hacked = true'>",
    "\"'`&amp; ${window.hacked = true} \u2028 größe 层/…",
    "\x1b[31mred\x07",
    "x" * 10_000,
)
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
NAMES = ("stem.bn", "body.bn", "head.bn")


def state(names: tuple[str, ...] = NAMES, units: int = 20, **changed: float) -> dict[str, np.ndarray]:
    """A state dict of layers that look trained; `changed` is added to the first unit of the first layer."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for name in names:
        made[f"{name}.weight"] = 1 + 0.2 * rng.standard_normal(units)
        made[f"{name}.bias"] = 0.2 * rng.standard_normal(units)
        made[f"{name}.running_mean"] = rng.standard_normal(units)
        made[f"{name}.running_var"] = 1 + rng.random(units)
        made[f"{name}.num_batches_tracked"] = np.array(1000)
    for leaf, value in changed.items():
        made[f"{names[0]}.{leaf}"][0] += value
    return made


@pytest.fixture(scope="module")
def found() -> Diff:
    other = state(weight=0.5, running_mean=3.0)
    other["body.bn.running_var"] *= 63 / 64
    other["body.bn.num_batches_tracked"] = np.array(0)
    return diff(state(), other)


def printed(found: Diff, width: int = 80) -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=width))
    return out.getvalue()


def test_the_page_has_the_differences_the_worst_first(found: Diff) -> None:
    page = build(found)
    assert (page.lead.word, page.lead.number, page.lead.label) == ("Yes", "2", "of 3 layers differ")
    assert [(line.aspect, line.layers) for line in page.lines] == [
        ("mean", "stem.bn"),
        ("gamma", "stem.bn"),
        ("biased variance", "body.bn"),
        ("count", "body.bn"),
    ]
    assert page.headline == found.headline
    assert (page.parts[0].figure, page.parts[0].label) == (page.lines[0].effect, "mean")
    assert [name for name, _ in page.meanings] == ["biased variance", "mean", "gamma", "count"]
    assert [panel.id for panel in page.panels] == ["effect"]
    dots = page.panels[0].chart["data"]["values"]
    assert [dot["layer"] for dot in dots] == ["stem.bn", "body.bn"], "one unit is enough for a dot"


def test_the_table_has_the_units_that_differ_with_both_values(found: Diff) -> None:
    values = build(found).units["values"]
    assert values["unit"] == [0, *range(20)]
    assert values["running_mean B"][0] - values["running_mean A"][0] == pytest.approx(3, rel=1e-3)
    assert {len(column) for column in values.values()} == {21}
    json.dumps(build(found).units, allow_nan=False)


def test_equal_networks_have_a_page_that_says_so(tmp_path: Path) -> None:
    found = diff(state(), state())
    page = build(found)
    assert (page.lead.word, page.lead.number, page.lines, page.parts, page.panels) == ("No", "0", (), (), ())
    assert "There is no difference." in render(page)
    assert printed(found).endswith("3 batch norm layers: no difference.\n")
    assert "Neither has a batch norm layer." in render(build(diff({"w": np.ones(3)}, {"w": np.ones(3)})))


def test_layers_that_one_network_lacks_have_a_line_and_no_units() -> None:
    page = build(diff(state(), state(NAMES[:2])))
    assert [(line.aspect, line.layers) for line in page.lines] == [("missing", "head.bn")]
    assert page.units["values"]["unit"] == []


def test_what_is_not_finite_is_empty_in_json() -> None:
    found = diff(state(), state(running_var=float("nan")))
    assert build(found).lines[0].effect == "infinite"
    json.dumps(build(found).data(), allow_nan=False)
    assert "running_var differs in 1 of 20 units, most in unit 0" in printed(found)


def test_many_are_cut_with_a_notice() -> None:
    names = tuple(f"bn{at}" for at in range(LISTED + 5))
    other = state(names, units=1)
    for name in names:
        other[f"{name}.running_mean"] += 1
    found = diff(state(names, units=1), other)
    page = build(found)
    assert len(page.lines) == LISTED
    assert page.notices[0].startswith(f"The page shows the worst {LISTED:,} of 1,00"), "equal words are one line"
    assert f"The worst {LISTED:,} of {LISTED + 5:,} differences." in printed(found)
    wide = state(units=UNITS)
    for name in NAMES:
        wide[f"{name}.running_mean"] = wide[f"{name}.running_mean"] + 1
    assert len(build(diff(state(units=UNITS), wide)).units["values"]["unit"]) == UNITS


def test_the_same_diff_gives_the_same_page_and_the_report_knows_its_kind(found: Diff, tmp_path: Path) -> None:
    assert render(build(found)) == render(build(found))
    report = Report.of(found)
    assert report.kind.label == "diff"
    assert report.describe()["equal"] is False
    with pytest.raises(ValueError, match="a diff has no folder"):
        report.write()


def test_the_terminal_says_it_all(found: Diff) -> None:
    text = printed(found)
    for word in ("A  state dict (state dict)", "biased in B, for m = 64 values", "body.bn", "count: "):
        assert word in text


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (380, "light")])
def test_in_a_browser_charts_are_drawn_and_nothing_sticks_out(
    found: Diff, tmp_path: Path, browser: Chromium, width: int, scheme: str
) -> None:
    browser.open(write(found, tmp_path / "page.html"), width, scheme)
    browser.wait("document.documentElement.dataset.ready === 'true'")
    assert browser.complaints == []
    assert browser.evaluate("document.querySelectorAll('.chart svg').length") == 1
    assert browser.evaluate(OVERFLOW) <= 0
    assert browser.evaluate("document.querySelectorAll('#unit-table tbody tr').length") == 21
    assert browser.evaluate("document.querySelectorAll('#changes tbody tr').length") == 4


@pytest.mark.browser
def test_hostile_names_stay_text(tmp_path: Path, browser: Chromium) -> None:
    other: dict[str, Any] = state(HOSTILE, running_mean=3.0)
    browser.open(write(diff(state(HOSTILE), other), tmp_path / "page.html"))
    browser.wait("document.documentElement.dataset.ready === 'true'")
    assert browser.evaluate("window.hacked === undefined")
    assert browser.evaluate(OVERFLOW) <= 0
