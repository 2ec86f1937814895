"""Every chart is a valid Vega-Lite specification that says what it should, and vl-convert can draw it."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import numpy as np
import pytest
import vl_convert

from batchnorm.report import charts
from batchnorm.report.charts import vega_lite_version
from batchnorm.report.study.page import StudyPage
from batchnorm.report.tables import Table, Words


def by_arm(median: list[float], arms: tuple[str, ...] = ("none", "undone")) -> Table:
    """Each arm at steps 0, 1, 2, ... with these medians and a band of 1 around them."""
    steps = np.tile(np.arange(len(median), dtype=float), len(arms))
    values = np.tile(np.array(median), len(arms))
    codes = np.repeat(np.arange(len(arms)), len(median))
    numbers = {"step": steps, "median": values, "low": values - 1, "high": values + 1}
    return Table(numbers, {"arm": Words(codes, list(arms))})


@pytest.mark.slow
def test_every_chart_of_a_page_is_valid(page: StudyPage) -> None:
    panels = [panel for section in page.sections for panel in section.panels]
    assert len(panels) == 42
    for panel in panels:
        records = panel.chart["data"]["values"]
        assert records, panel.id
        # The schema looks at every value of the data; two records stand for all.
        alt.LayerChart.from_dict({**panel.chart, "data": {"values": records[:2]}}, validate=True)


def test_an_arm_has_one_colour_everywhere(page: StudyPage) -> None:
    seen: dict[str, set[str]] = {}
    for section in page.sections:
        for panel in section.panels:
            for layer in panel.chart["layer"]:
                scale = layer["encoding"].get("color", {}).get("scale")
                for arm, colour in zip(scale["domain"], scale["range"], strict=True) if scale else ():
                    seen.setdefault(arm, set()).add(colour)
    assert set(charts.STYLES) <= seen.keys()
    assert all(len(colours) == 1 for colours in seen.values())
    assert len({next(iter(colours)) for colours in seen.values()}) == len(seen)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("paper", ["#fdfdfb", "#15171a"])
def test_the_colours_stand_out_on_light_and_on_dark(paper: str) -> None:
    for colour in (*(style.colour for style in charts.STYLES.values()), charts.OTHER_ARM, charts.GUIDE):
        light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, (colour, paper)


def test_what_is_not_finite_is_left_out() -> None:
    chart = charts.curves(by_arm([0.5, math.nan, math.inf, 0.7]), "value")
    assert [row["median"] for row in chart["data"]["values"]] == [0.5, 0.7] * 2


def test_a_logarithmic_chart_has_no_value_at_or_below_zero() -> None:
    rows = charts.curves(by_arm([0.0, -1.0, 0.5, 2.0]), "value", log=True)["data"]["values"]
    assert [row["median"] for row in rows] == [0.5, 2] * 2
    assert all(row["low"] > 0 for row in rows)


def test_step_zero_has_a_place_on_the_step_axis() -> None:
    x = charts.curves(by_arm([1.0] * 300), "value")["layer"][0]["encoding"]["x"]
    assert x["scale"] == {"type": "symlog", "constant": 1, "domain": [0, 299], "nice": False}
    assert x["axis"]["values"] == [0, 1, 10, 100, 299]


def test_every_axis_of_a_study_has_a_title(page: StudyPage) -> None:
    for panel in (panel for section in page.sections for panel in section.panels):
        for layer in panel.chart["layer"]:
            for axis in ("x", "y"):
                if layer["encoding"].get(axis, {}).get("field"):
                    assert layer["encoding"][axis].get("title"), (panel.id, axis)


def test_every_guide_line_has_its_name(page: StudyPage) -> None:
    found = []
    for panel in (panel for section in page.sections for panel in section.panels):
        layers = panel.chart["layer"]
        rules = [layer for layer in layers if layer["mark"]["type"] == "rule" and "x" not in layer["encoding"]]
        names = [layer for layer in layers if layer["mark"]["type"] == "text"]
        assert len(rules) <= len(names)
        found += rules
    assert len(found) > 5


def test_the_identity_line_spans_the_frame() -> None:
    numbers = {
        "seed": np.zeros(3),
        "unit": np.arange(3.0),
        "s": np.array([1.0, 2, 3]),
        "gamma": np.array([1.0, 1, np.nan]),
    }
    table = Table(numbers, {"arm": Words(np.zeros(3, int), ["learned"])})
    chart = charts.against(table, "s", "gamma", charts.Frame((0.0, 4.0), (-1.0, 5.0)))
    line, label, points = chart["layer"]
    assert label["data"]["values"] == [{"at": 4.0, "name": "undone"}]
    guided = charts.against(table, "s", "gamma", charts.Frame((0.0, 4.0), (-1.0, 5.0)), {"bare": 1.0, "outside": 9.0})
    assert {"at": 1.0, "name": "bare"} in guided["layer"][2]["data"]["values"]
    assert "outside" not in str(guided)
    assert line["data"]["values"] == [{"from": 0.0, "to": 4.0}]
    assert (line["encoding"]["x2"], line["encoding"]["y2"]) == ({"field": "to"}, {"field": "to"})
    assert line["encoding"]["x"]["scale"] == points["encoding"]["x"]["scale"]
    assert points["encoding"]["y"]["scale"]["domain"] == [-1.0, 5.0]
    assert len(chart["data"]["values"]) == 2


def test_span_holds_the_values_and_survives_none_and_constants() -> None:
    low, high = charts.span(np.array([1.0, np.nan, 5.0]), np.array([-np.inf, 2.0]))
    assert low < 1 < 5 < high
    assert charts.span(np.array([np.nan])) == (0.0, 1.0)
    low, high = charts.span(np.array([2.0, 2.0]))
    assert low < 2 < high


def test_a_frame_is_high_enough_for_the_identity_line() -> None:
    frame = charts.frame(np.array([1.0, 9.0, np.nan]), np.array([2.0, 3.0, 1e9]))
    assert frame.x[0] < 1 < 9 < frame.x[1]
    assert frame.y[0] <= frame.x[0]
    assert frame.x[1] <= frame.y[1] < 10


def test_an_arm_nobody_knows_is_drawn_too() -> None:
    chart = charts.curves(by_arm([1.0, 2.0], arms=("learned", "</script>")), "value")
    assert chart["layer"][1]["encoding"]["color"]["scale"]["domain"] == ["learned", "</script>"]


def test_the_charts_can_be_drawn(page: StudyPage) -> None:
    for section in page.sections:
        chart = {**section.panels[0].chart, "width": 300}
        svg = vl_convert.vegalite_to_svg(chart, vl_version=vega_lite_version())
        assert svg.startswith("<svg")
        assert 'aria-roledescription="axis"' in svg


def test_every_line_chart_answers_with_its_nearest_point(page: StudyPage) -> None:
    """And no word in the tooltip is looked for in the wrong record, as Vega-Lite does with words of no format."""
    found = 0
    for panel in (panel for section in page.sections for panel in section.panels):
        marks = [layer["mark"]["type"] for layer in panel.chart["layer"]]
        if "line" not in marks:
            continue
        found += 1
        (selection,) = panel.chart["params"]
        assert selection["select"]["nearest"]
        points = next(layer for layer in panel.chart["layer"] if layer.get("name") in selection["views"])
        assert all("format" in tip for tip in points["encoding"]["tooltip"])
        assert "datum[" not in tooltip_over_cells(panel.chart).replace("datum.datum[", "")
    assert found > 20


def tooltip_over_cells(chart: dict[str, Any]) -> str:
    """The expression that tells the nearest point."""
    compiled = vl_convert.vegalite_to_vega({**chart, "data": {"values": chart["data"]["values"][:2]}})
    (cells,) = [mark for mark in compiled["marks"] if mark["name"].endswith("voronoi")]
    expression: str = cells["encode"]["update"]["tooltip"]["signal"]
    return expression
