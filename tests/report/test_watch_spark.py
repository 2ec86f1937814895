"""Sparklines go as their curves go, each on a scale of its own, with gaps where nothing is known."""

from __future__ import annotations

import re

import numpy as np
import pytest

from batchnorm.report.watch.numbers import Curve
from batchnorm.report.watch.terminal import ASCII_BARS, BARS, Spark

MIDDLE = BARS[4]


def even(values: list[float]) -> Curve:
    """A value a column: recorded at steps as far apart as the columns are."""
    steps = np.expm1(np.linspace(0, 10, len(values))).round().astype(np.int64)
    return Curve(steps, np.array([values], np.float64))


def spark(values: list[float]) -> Spark:
    return Spark.of(even(values), len(values))


def points(svg: str) -> list[float]:
    """The heights of the line's points; y grows downwards."""
    (path,) = re.findall(r' d="([^"]*)"', svg)
    return [float(y) for y in re.findall(r",([\d.]+)", path)]


@pytest.mark.parametrize(
    ("values", "line", "scale"),
    [
        ([0.01, 0.0125, 0.015, 0.02], "▅▆▇█", "0..0.020"),
        ([0.9, 0.92, 0.96, 1.0], "▁▂▅█", "0.90..1.00"),
        ([0.95111, 0.95111, 0.95123, 0.95123], "▁▁██", "0.95111..0.95123"),
        ([-0.5, 0.0, 0.25, 0.5], "▁▅▇█", "-0.5 0▅ 0.5"),
        ([-0.02, -0.015, -0.01, -0.01], "▁▃▅▅", "-0.020..0"),
        ([-3.0, -2.9, -2.6, -2.5], "▁▂▇█", "-3.00..-2.50"),
        ([0.0, 0.0, 1e-9, 1e-9], "▁▁██", "0..1.0e-09"),
        ([0.0, 5e6, 5e6, 1e7], "▁▅▅█", "0..1.0e+07"),
        ([0.3, 0.3, 0.3, 0.3], MIDDLE * 4, "0.3"),
        ([0.3, 0.3 + 1e-9, 0.3, 0.3], MIDDLE * 4, "0.3"),
        ([0.0, 0.0, 0.0, 0.0], MIDDLE * 4, "0"),
        ([-40.0] * 4, MIDDLE * 4, "-40"),
        ([np.nan, 0.0, np.nan, 1.0], " ▁ █", "0..1.0"),
        ([0.0, np.inf, -np.inf, 1.0], "▁  █", "0..1.0"),
        ([0.0, 1.0, np.nan, np.nan], "▁█  ", "0..1.0"),
        ([np.nan] * 4, "    ", ""),
    ],
    ids=str,
)
def test_the_scale_goes_from_the_least_to_the_greatest(values: list[float], line: str, scale: str) -> None:
    found = spark(values)
    assert (found.line(), found.scale()) == (line, scale)


def test_0_has_the_bar_of_its_height_whatever_the_bars() -> None:
    found = spark([-3.0, 0.0, 0.5, 1.0])
    for bars in (BARS, ASCII_BARS):
        assert found.scale(bars) == f"-3.0 0{found.line(bars)[1]} 1.0"


@pytest.mark.parametrize("length", [0, 1, 40])
def test_an_unknown_curve_is_blank(length: int) -> None:
    unknown = Curve(np.arange(length), np.full((3, length), np.nan))
    for found in (Spark.of(unknown, 8), Spark.of(None, 8)):
        assert (found.line(), found.scale(), points(found.svg())) == (" " * 8, "", [])


@pytest.mark.parametrize("step", [0, 7])
def test_a_single_snapshot_is_a_constant_from_its_step_on(step: int) -> None:
    found = Spark.of(Curve(np.array([step]), np.array([[0.7]])), 8)
    assert found.line().strip() == MIDDLE * (8 if step == 0 else 1)
    assert found.scale() == "0.7"
    assert found.svg().count("M") == 1


def test_it_goes_as_the_curve_goes() -> None:
    steps = np.arange(0, 1000)
    rising = Curve(steps, (np.log1p(steps) / np.log1p(999))[None])
    assert Spark.of(rising, 8).line() == BARS
    assert Spark.of(Curve(steps, 1 - rising.values), 8).line() == BARS[::-1]
    late = rising.values.copy()
    late[0, :500] = np.nan
    assert Spark.of(Curve(steps, late), 8).line().startswith(" " * 6)


def test_what_was_not_recorded_is_no_gap_and_what_was_not_known_is_one() -> None:
    steps = np.array([0, 1, 2, 90, 900])
    assert " " not in Spark.of(Curve(steps, np.arange(5.0)[None]), 12).line()
    broken = Spark.of(Curve(steps, np.array([[0.0, np.nan, np.nan, 1.0, 2.0]])), 12)
    assert re.fullmatch(r"▁+ +▅+█", broken.line())


@pytest.mark.parametrize(
    ("values", "zero"), [([0.0, 0.5, 1.0], True), ([-1.0, 0.5, 1.0], True), ([0.9, 0.95, 1.0], False)], ids=str
)
def test_the_svg_goes_from_top_to_bottom_and_marks_0_where_it_has_it(values: list[float], zero: bool) -> None:
    svg = spark(values).svg()
    assert (min(points(svg)), max(points(svg))) == (2, 20)
    assert ("stroke-dasharray" in svg) == zero


def test_the_line_of_the_svg_has_gaps() -> None:
    assert spark([0.0, np.nan, 1.0, 1.0, np.inf, 0.0]).svg().count("M") == 3
