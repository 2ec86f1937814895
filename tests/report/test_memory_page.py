"""The page of the memory of steps: as data, as HTML, in the terminal, in a browser, hostile and damaged records."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium
from rich.console import Console

from batchnorm.report import Report, render
from batchnorm.report.memory import describe, show, summarize
from batchnorm.words import KEPT_BY, STEPS

MIB = 1 << 20
HOSTILE = "</script><!--<img src=x onerror='window.hacked = true'>"
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"


def contender(norm: float, other: float, peak: float | None) -> dict[str, Any]:
    by_kind = {"norm": norm * MIB, "other": other * MIB}
    return {"kept": (norm + other) * MIB, "by_kind": by_kind, "peak": peak and peak * MIB, "loss": 1.0}


def record(*names: str, peaks: bool = True) -> dict[str, Any]:
    """A record in which ours keeps 60 of stock's 100 MiB."""
    entries = [
        {
            "model": name,
            "layout": "contiguous",
            "shape": [2, 3],
            "failed": {"frozen": "30 GiB are needed"},
            "contenders": {
                "ours": contender(40, 20, 90 if peaks else None),
                "stock": contender(60, 40, 150 if peaks else None),
            },
        }
        for name in names
    ]
    return {
        "format": "batchnorm-bench",
        "memory": entries,
        "machine": {"processor": "AMD", "cores": 2},
        "settings": {"threads": 2},
        "versions": {"torch": "2.13"},
    }


def test_the_page_compares_with_stock() -> None:
    page = Report.of(record("U-Net", "ResNet")).page
    assert (page.lead.word, page.lead.number) == ("−40%", "60%")
    assert page.lead.label == "of what stock keeps is kept by ours, the median"
    assert page.subtitle == "2 networks, AMD"
    assert page.notices[0] == "Not measured: U-Net, 2x3, frozen: 30 GiB are needed."
    assert [panel.id for panel in page.panels] == ["network-0", "network-1"]
    assert page.panels[0].description == (
        "U-Net, 2x3: stock keeps 100 MiB of a peak of 150 MiB; ours keeps 60 MiB of a peak of 90 MiB."
    )
    assert page.columns == ("network", "contender", "kept", KEPT_BY["norm"], KEPT_BY["other"], "peak")
    assert page.rows[0] == ("U-Net, 2x3", "stock", "100", "60", "40", "150")


def test_lean_and_folded_are_compared_where_they_are() -> None:
    made = record("one")
    made["memory"][0]["contenders"] |= {"lean": contender(20, 10, 80), "new": contender(1, 1, 1)}
    page = Report.of(made).page
    assert page.lead.label == "of what stock keeps is kept by lean"
    assert page.headline == "Most is gained in one, 2x3: stock keeps 100 MiB, lean 30 MiB."
    assert [row[1] for row in page.rows][-1] == "new"


def test_bars_add_up_to_what_is_kept_and_a_mark_is_at_the_peak() -> None:
    page = Report.of(record("one")).page
    spec = page.panels[0].chart
    sizes: dict[str, float] = {}
    for bar in spec["data"]["values"]:
        sizes[bar["contender"]] = sizes.get(bar["contender"], 0) + bar["size"]
    assert sizes == {"stock": 100, "ours": 60}
    assert [mark["peak"] for mark in spec["layer"][1]["data"]["values"]] == [150, 90]
    assert len(Report.of(record("one", peaks=False)).page.panels[0].chart["layer"]) == 1


def test_the_terminal_and_json_have_the_same_numbers() -> None:
    summary = summarize([record("U-Net")])
    out = io.StringIO()
    show(summary, Console(file=out, width=100))
    assert re.search(r"U-Net, 2x3 +stock +100 +60 +40 +150", out.getvalue())
    assert "Not measured: U-Net, 2x3, frozen" in out.getvalue()
    assert describe(summary)["networks"]["U-Net, 2x3"]["ours"]["kept"] == 60
    json.dumps(describe(summary))


def test_every_word_of_a_contender_is_defined_on_the_page(tmp_path: Path) -> None:
    text = render(record("one"), tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(name in text for name in STEPS)
    assert "2²⁰" in text
    assert "Ioffe" not in text


def test_a_record_without_memory_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batchnorm bench --memory measures it"):
        Report.of(record())
    with pytest.raises(TypeError, match="a report takes a Run"):
        Report.of({"format": "another"})
    with pytest.raises(ValueError, match="set the file of its page with out="):
        Report.of(record("one")).target()
    for damaged in ({"contenders": 3}, {"shape": None}, {"contenders": {"stock": {"kept": "much"}}}, {"failed": []}):
        made = record("one")
        made["memory"][0] |= damaged
        with pytest.raises(ValueError, match="the record of the memory is damaged"):
            render(made, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_network_that_nothing_measured_is_only_a_notice() -> None:
    made = record("one")
    made["memory"][0]["contenders"] = {}
    page = Report.of(made).page
    assert page.lead.label == "nothing to compare was measured"
    assert page.rows == ()
    assert page.notices


@pytest.mark.slow
def test_in_a_browser_all_charts_are_drawn_and_a_hostile_name_is_text(tmp_path: Path, browser: Chromium) -> None:
    made = record("U-Net", HOSTILE)
    made["memory"][0]["contenders"][HOSTILE] = contender(1, 1, 1)
    page = render(made, tmp_path / "page.html")
    for width, scheme in ((1300, "light"), (420, "dark")):
        browser.open(page, width, scheme)
        browser.wait("document.documentElement.dataset.ready === 'true'")
        assert browser.evaluate("document.querySelectorAll('.chart svg').length") == 2
        assert browser.evaluate("window.hacked === undefined")
        assert browser.evaluate(OVERFLOW) <= 0
