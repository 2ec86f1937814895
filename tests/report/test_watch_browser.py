"""The page of watched trainings in a real browser: map, layers, tables, themes, reloads, hostile names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Chromium
from pages import write
from watched import Made, log_spaced, watched

pytestmark = pytest.mark.browser

OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
NAME = "document.getElementById('layer-name').textContent"
DRAWN = "document.documentElement.dataset.drawn === '{}'"
CELLS = "[...document.querySelectorAll('#unit-table tbody tr')].map((row) => row.cells[{column}].textContent)"
HEADERS = "[...document.querySelectorAll('#unit-table thead th')]"

HOSTILE = (
    "<script>window.hacked = true</script>",
    "</script><!--<img src=x onerror='window.hacked = true'>",
    "\"'`&amp; ${window.hacked = true} \u2028 größe 层/…",
    "x" * 10_000,
)


def dying(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
    columns["gamma"][np.ix_(steps >= 300, np.arange(4))] = 1e-3
    columns["beta"][np.ix_(steps >= 300, np.arange(4))] = 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    layers = [Made("stem", 70, undo=0.95), Made("dying", 8, change=dying), Made("last", 4)]
    return write([watched(folder / "a", layers, logged={"loss": np.exp(-log_spaced(5000) / 500)})])


@pytest.fixture(scope="module")
def two(folder: Path, one: Path) -> Path:
    other = watched(folder / "b", [Made("stem", 70), Made("new", 8)], seed=1)
    first = watched(folder / "again", [Made("stem", 70, undo=0.95), Made("dying", 8, change=dying)])
    return write([first, other], folder / "two.html")


def pixel(row: int) -> str:
    """The script for the colour of a layer's row, near the right end of the map."""
    return (
        "(() => { const c = document.getElementById('heatmap'), r = c.width / c.clientWidth;"
        f" const [x, y] = [c.width - 14 * r, ({row} * 17 + 8) * r];"
        " return [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3); })()"
    )


def colour(browser: Chromium, row: int) -> list[int]:
    found: list[int] = browser.evaluate(pixel(row))
    return found


def choose(browser: Chromium, selector: str, value: str) -> None:
    browser.evaluate(
        f"{{ const s = document.querySelector('{selector}');"
        f" s.value = '{value}'; s.dispatchEvent(new Event('change')); }}"
    )


def press(browser: Chromium, key: str) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)


def numbers(cells: list[str]) -> list[float]:
    return [float(cell) for cell in cells if cell]


PAPER = 703
"""A4 without its margins, in CSS pixels."""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper_no_table_and_no_map_is_wider_than_the_paper(browser: Chromium, one: Path, scheme: str) -> None:
    browser.open(one, 1400, scheme)
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    size = {"width": PAPER, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.send("Emulation.setDeviceMetricsOverride", **size)
    browser.send("Emulation.setEmulatedMedia", media="print")
    try:
        wide = f".filter((each) => each.getBoundingClientRect().right > {PAPER + 1}).map((each) => each.outerHTML)"
        assert browser.evaluate(f"[...document.querySelectorAll('table, canvas, svg')]{wide}") == []
        assert browser.evaluate(OVERFLOW) <= 0
        assert browser.evaluate("[...document.querySelectorAll('details')].every((each) => each.open)")
        colour = "getComputedStyle(document.body).backgroundColor"
        assert browser.evaluate(colour) == "rgb(255, 255, 255)"
    finally:
        browser.send("Emulation.setEmulatedMedia", media="")
        browser.evaluate("dispatchEvent(new Event('afterprint'))")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_it_draws_everything_and_fits(browser: Chromium, one: Path, width: int, scheme: str) -> None:
    browser.open(one, width, scheme)
    assert browser.complaints == []
    assert browser.requests == [one.as_uri()]
    assert browser.evaluate("document.querySelectorAll('#curves svg.marks').length") == 10
    assert browser.evaluate("document.querySelectorAll('#scatters svg.marks, #scalars svg.marks').length") == 3
    marks = "svg => svg.querySelector('.mark-line path, .mark-symbol path')?.getAttribute('d')"
    assert browser.evaluate(f"[...document.querySelectorAll('svg.marks')].every({marks})")
    assert browser.evaluate(OVERFLOW) <= 0
    ends = "[...document.querySelectorAll('.chart svg, canvas')].map((s) => s.getBoundingClientRect().right)"
    assert browser.evaluate(f"Math.max(...{ends})") <= width


def test_the_map_shows_what_was_recorded(browser: Chromium, one: Path) -> None:
    browser.open(one)
    undone, bare = colour(browser, 0), colour(browser, 2)
    assert undone[2] > undone[1] + 40, "undone is purple"
    assert max(bare) - min(bare) < 40, "bare is the colour of the paper"
    choose(browser, "#map-choices select", "dead")
    alive, dead = colour(browser, 0), colour(browser, 1)
    assert sum(dead) < sum(alive) - 100, "half of the layer is dead, none of the first"
    assert browser.evaluate("document.querySelector('.marks').textContent") == "0%50%100%"


def test_a_layer_is_chosen_by_pointer_keyboard_link_and_list(browser: Chromium, one: Path) -> None:
    browser.open(one)
    assert browser.evaluate(NAME) == "stem"
    box = browser.evaluate(
        "(() => { const c = document.getElementById('heatmap'); c.scrollIntoView();"
        " const b = c.getBoundingClientRect(); return [b.left, b.top]; })()"
    )
    at = {"x": box[0] + 500, "y": box[1] + 17 + 8}
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
    assert browser.evaluate("document.querySelector('.tip').textContent").startswith("dying, step ")
    for kind in ("mousePressed", "mouseReleased"):
        browser.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    browser.wait(DRAWN.format(1))
    assert browser.evaluate(NAME) == "dying"
    assert browser.evaluate("document.querySelectorAll('#unit-table tbody tr').length") == 8

    browser.evaluate("document.getElementById('heatmap').focus()")
    for key in ("ArrowDown", "ArrowLeft", "ArrowLeft"):
        press(browser, key)
    steps = log_spaced(5000)
    assert browser.evaluate("document.getElementById('map-status').textContent").startswith(
        f"last, step {steps[-3]:,}: undo_index"
    )
    press(browser, "Enter")
    browser.wait(DRAWN.format(2))
    assert browser.evaluate(NAME) == "last"

    browser.evaluate("document.querySelector('#findings a').click()")
    browser.wait(DRAWN.format(1))
    assert browser.evaluate(NAME) == "dying"

    choose(browser, "#layers", "0")
    browser.wait(DRAWN.format(0))
    assert browser.evaluate(NAME) == "stem"


def test_the_units_of_a_layer_are_sorted(browser: Chromium, one: Path) -> None:
    browser.open(one)
    names = browser.evaluate(f"{HEADERS}.map((cell) => cell.textContent)")
    column = names.index("gamma")
    browser.evaluate(f"{HEADERS}[{column}].querySelector('button').click()")
    rising = numbers(browser.evaluate(CELLS.format(column=column)))
    assert len(rising) == 50
    assert rising == sorted(rising)
    assert rising[0] < rising[-1]
    assert browser.evaluate("document.querySelector('#pager [role=status]').textContent") == "1 to 50 of 70 units"


@pytest.mark.slow
def test_a_page_that_loads_itself_again_keeps_the_layer(browser: Chromium, folder: Path) -> None:
    run = watched(folder / "running", [Made("first", 4), Made("second", 4)], status="running")
    browser.open(write([run], folder / "running.html", refresh=2))
    choose(browser, "#layers", "1")
    choose(browser, "#map-choices select", "eval_gap")
    browser.evaluate("window.before = true")
    browser.wait("window.before === undefined && document.documentElement?.dataset.ready === 'true'")
    assert browser.evaluate(NAME) == "second"
    assert browser.evaluate("document.querySelector('#map-choices select').value") == "eval_gap"
    assert browser.complaints == []


def test_several_runs_are_drawn_over_each_other(browser: Chromium, two: Path) -> None:
    browser.open(two)
    assert browser.complaints == []
    strokes = (
        "[...new Set([...document.querySelectorAll('#curves .mark-line path')].map((p) => p.getAttribute('stroke')))]"
    )
    assert sorted(browser.evaluate(strokes)) == ["#2f88d0", "#dd6a1f"]
    assert browser.evaluate("document.querySelector('#pager [role=status]').textContent") == "1 to 50 of 140 units"
    choose(browser, "#unit-choices select", "1")
    assert set(browser.evaluate(CELLS.format(column=0))) == {"b"}
    assert browser.evaluate(OVERFLOW) <= 0


def test_the_map_follows_the_theme(browser: Chromium, one: Path) -> None:
    browser.open(one, scheme="light")
    light = colour(browser, 2)
    browser.prefer("dark")
    browser.wait(f"{pixel(2)}.reduce((sum, part) => sum + part) < {sum(light) - 200}")


@pytest.mark.slow
def test_hostile_names_neither_run_nor_break_the_layout(browser: Chromium, tmp_path: Path) -> None:
    layers = [Made(name, 8, change=dying) for name in HOSTILE]
    steps = log_spaced(5000)
    options: dict[str, Any] = {"logged": dict.fromkeys(HOSTILE, np.exp(-steps / 500.0))}
    bad = HOSTILE[1] * 50
    options |= {"model": bad, "schedule": bad, "errors": [bad], "skipped": [{"name": bad, "class": bad, "why": bad}]}
    name = "<img src=x onerror='window.hacked = true'>".replace("/", "")
    written = write(
        [watched(tmp_path / name, layers, **options), watched(tmp_path / "b", layers, seed=1)], tmp_path / "page.html"
    )
    for width in (400, 1400):
        browser.open(written, width)
        for place in range(len(HOSTILE)):
            browser.evaluate(f"location.hash = 'layer={place}'")
            browser.wait(DRAWN.format(place))
        assert browser.evaluate("window.hacked === undefined")
        assert browser.complaints == []
        assert len(browser.requests) == 1
        assert browser.evaluate(OVERFLOW) <= 0
    assert HOSTILE[0] in browser.evaluate("[...document.querySelectorAll('#findings a')].map((a) => a.textContent)")
    assert len(browser.evaluate(NAME)) < 100


@pytest.mark.slow
@pytest.mark.parametrize("steps", [[], [0], [7]], ids=str)
def test_short_runs_draw_without_complaint(browser: Chromium, tmp_path: Path, steps: list[int]) -> None:
    run = watched(tmp_path / "run", [Made("a", 3), Made("b", 3)], steps=np.array(steps), status="running")
    browser.open(write([run]), 400)
    assert browser.complaints == []
    assert browser.evaluate(OVERFLOW) <= 0


def test_a_run_without_layers_draws_without_complaint(browser: Chromium, tmp_path: Path) -> None:
    browser.open(write([watched(tmp_path / "run", [])]))
    assert browser.complaints == []


@pytest.mark.parametrize("width", [1400, 800])
def test_a_wide_table_says_that_it_goes_on(browser: Chromium, two: Path, width: int) -> None:
    """A bar that stays, a shade at the edge, and the first column in sight however far it is scrolled."""
    browser.open(two, width)
    browser.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.evaluate(OVERFLOW) <= 0
    wide = "[...document.querySelectorAll('.scroll')].filter((each) => each.scrollWidth > each.clientWidth)"
    assert (browser.evaluate(f"{wide}.length") > 0) == (width == 800), "at 1,400 all of them fit"
    tables = "[...document.querySelectorAll('.scroll')]"
    bar = "parseFloat(getComputedStyle(each, '::-webkit-scrollbar').height) > 5"
    assert browser.evaluate(f"{tables}.every((each) => {bar})")
    shade = "getComputedStyle(each).backgroundImage.split('linear-gradient').length === 5"
    assert browser.evaluate(f"{tables}.every((each) => {shade})")
    kept = (
        f"{wide}.every((each) => {{ each.scrollLeft = each.scrollWidth;"
        " const first = each.querySelector('tbody tr').cells[0].getBoundingClientRect();"
        " return each.scrollLeft > 0 && Math.abs(first.left - each.getBoundingClientRect().left) < 1; })"
    )
    assert browser.evaluate(kept)


@pytest.mark.parametrize(("across", "down"), [(0.5, 0.1), (0.5, 0.9), (0.98, 0.5)])
def test_a_line_chart_answers_the_pointer_anywhere(browser: Chromium, two: Path, across: float, down: float) -> None:
    """With the point nearest to it: its run and step in the tooltip, and the point itself drawn."""
    browser.open(two)
    for chart in ("#curves svg.marks", "#curves figure:nth-child(2) svg.marks"):
        box = browser.evaluate(
            f"(() => {{ const c = document.querySelector('{chart}'); c.scrollIntoView({{block: 'center'}});"
            " const b = c.querySelector('.background').getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]; })()"
        )
        at = {"x": box[0] + across * box[2], "y": box[1] + down * box[3]}
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", **{**at, "x": at["x"] - 40})
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
        browser.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
        result = browser.evaluate("document.getElementById('vg-tooltip-element').textContent")
        assert re.match(r"run(again|b)(side(undo|bare))?step[\d,]+median", result)
        marks = f"[...document.querySelectorAll('{chart} .mark-symbol path')]"
        browser.wait(f"{marks}.filter((p) => getComputedStyle(p).opacity === '1').length === 1")


def test_a_layer_is_shown_with_its_type_and_producer(browser: Chromium, tmp_path: Path) -> None:
    fed = Made("stem.bn", 8, facts={"producer": "stem.conv.weight"})
    old = Made("head.bn", 8, facts={"class": None})
    browser.open(write([watched(tmp_path / "run", [fed, old])]))
    facts = "document.getElementById('layer-facts').textContent"
    assert browser.evaluate(facts).startswith("BatchNorm2d, fed by stem.conv, 8 units")
    browser.evaluate("location.hash = 'layer=1'")
    browser.wait(DRAWN.format(1))
    assert browser.evaluate(facts).startswith("8 units")
