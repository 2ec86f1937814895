"""The page in a real browser: it draws, sorts, fits, changes its theme, and asks the network for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import Chromium
from pages import write
from synthetic import study

from batchnorm.runs.run import Run

pytestmark = pytest.mark.browser

CELLS = "[...document.querySelectorAll('#unit-table tbody tr')].map((row) => row.cells[{column}].textContent)"
HEADERS = "[...document.querySelectorAll('#unit-table thead th')]"
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"


@pytest.fixture(scope="module")
def report(run: Run) -> Path:
    return write(run)


def numbers(cells: list[str]) -> list[float]:
    return [float(cell) for cell in cells if cell]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_it_draws_everything_and_fits(browser: Chromium, report: Path, width: int, scheme: str) -> None:
    browser.open(report, width, scheme)
    assert browser.complaints == []
    assert browser.requests == [report.as_uri()]
    assert browser.evaluate("document.querySelectorAll('svg.marks').length") == 42
    # Each chart has drawn marks, not only its axes.
    marks = "svg => svg.querySelector('.mark-line path, .mark-symbol path, .mark-area path')?.getAttribute('d')"
    assert browser.evaluate(f"[...document.querySelectorAll('svg.marks')].every({marks})")
    assert browser.evaluate(OVERFLOW) <= 0
    too_wide = (
        "[...document.querySelectorAll('.chart svg')].filter((s) => s.getBoundingClientRect().right > innerWidth)"
    )
    assert browser.evaluate(f"{too_wide}.length") == 0


def test_sorting_filtering_and_paging(browser: Chromium, report: Path) -> None:
    browser.open(report)
    names = browser.evaluate(f"{HEADERS}.map((cell) => cell.textContent)")
    column = names.index("gamma")
    press = f"{HEADERS}[{column}].querySelector('button').click()"
    state = f"{HEADERS}[{column}].getAttribute('aria-sort')"

    browser.evaluate(press)
    rising = numbers(browser.evaluate(CELLS.format(column=column)))
    assert browser.evaluate(state) == "ascending"
    assert len(rising) == 50
    assert rising == sorted(rising)

    browser.evaluate(press)
    falling = numbers(browser.evaluate(CELLS.format(column=column)))
    assert browser.evaluate(state) == "descending"
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > rising[0]

    click_next = "[...document.querySelectorAll('#pager button')].at(-1).click()"
    browser.evaluate(f"for (let i = 0; i < 100; i++) {click_next}")
    assert set(browser.evaluate(CELLS.format(column=column))) == {""}, "what is not defined comes last"
    assert (
        browser.evaluate("document.querySelector('#pager [role=status]').textContent") == "3551 to 3600 of 3600 units"
    )

    browser.evaluate(
        "{ const s = document.querySelector('#filters select');"
        " s.value = [...s.options].find((o) => o.textContent === 'undone').value;"
        " s.dispatchEvent(new Event('change')); }"
    )
    assert set(browser.evaluate(CELLS.format(column=0))) == {"undone"}
    assert "of 900 units" in browser.evaluate("document.querySelector('#pager [role=status]').textContent")


def test_the_theme_follows_the_system_and_can_be_chosen(browser: Chromium, report: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    label = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    browser.open(report, scheme="dark")
    dark = [browser.evaluate(paper), browser.evaluate(label)]
    browser.prefer("light")
    light = [browser.evaluate(paper), browser.evaluate(label)]
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    chosen = []
    for _ in range(3):
        browser.evaluate("document.getElementById('theme').click()")
        chosen.append([browser.evaluate(paper), browser.evaluate(label)])
    assert chosen == [light, dark, light], "light, dark, and back to the system's"


def test_the_keyboard_reaches_the_table_and_shows_where_it_is(browser: Chromium, report: Path) -> None:
    browser.open(report)
    browser.evaluate("document.querySelector('#unit-table thead button').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.evaluate("document.activeElement.textContent") == "seed"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.slow
def test_hostile_names_neither_run_nor_break_the_layout(browser: Chromium, tmp_path: Path) -> None:
    layers = (
        "<script>window.hacked = true</script>",
        "</script><!--<img src=x onerror='window.hacked = true'>",
        "\"'`&amp; ${window.hacked = true} \u2028 größe 层",
        "x" * 10_000,
    )
    run = study(tmp_path / "run", seeds=(0,), measured=[0, 30, 5000], width=6, layers=layers)
    run.note(command="y" * 10_000 + "<b>", machine={"<i>" * 300: "z" * 5000}, diverged=[
        {"seed": 0, "arm": "<img src=x onerror='window.hacked = true'>" * 50, "step": 3}
    ])  # fmt: skip
    written = write(run)
    for width in (390, 1400):
        browser.open(written, width)
        assert browser.evaluate("window.hacked === undefined")
        assert browser.complaints == []
        assert len(browser.requests) == 1
        assert browser.evaluate(OVERFLOW) <= 0
    captions = browser.evaluate("[...document.querySelectorAll('#undo figcaption')].map((c) => c.textContent)")
    assert captions[:2] == list(layers[:2])
    shown = browser.evaluate(CELLS.format(column=2))
    assert layers[0] in shown


@pytest.mark.slow
@pytest.mark.parametrize("measured", [[], [0]])
def test_short_runs_draw_without_complaint(browser: Chromium, tmp_path: Path, measured: list[int]) -> None:
    run = study(tmp_path / "run", seeds=(0,), measured=measured or [0], width=5, status="interrupted", tables=(
        ("curves", "units", "start", "parting", "optimal") if measured else ()
    ))  # fmt: skip
    browser.open(write(run), 390)
    assert browser.complaints == []
    assert browser.evaluate(OVERFLOW) <= 0
