"""Sparklines: a curve over time in a few characters, or in a small SVG. Columns are as far apart as the page's axis
has them, evenly in log(1 + step)."""

from __future__ import annotations

import numpy as np

from batchnorm.report.watch.numbers import Array, Curve

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"
SVG_WIDTH, SVG_HEIGHT = 120, 22


def line(curve: Curve | None, width: int, low: float, high: float, bars: str = BARS) -> str:
    """The medians as `width` characters between `low` and `high`, a space where nothing is known."""
    values = sampled(curve, width)
    share = np.clip((values - low) / (high - low), 0, 1)
    return "".join(" " if np.isnan(each) else bars[min(int(each * len(bars)), len(bars) - 1)] for each in share)


def svg(curve: Curve | None, low: float, high: float) -> str:
    """The same as a line in a small SVG without any text in it: nothing of a Run's words goes in."""
    values = sampled(curve, SVG_WIDTH // 2)
    inner = SVG_HEIGHT - 4
    points = [
        f"{2 * x + 1},{2 + inner * (1 - min(max((value - low) / (high - low), 0), 1)):.1f}"
        for x, value in enumerate(values.tolist())
        if not np.isnan(value)
    ]
    return (
        f'<svg width="{SVG_WIDTH}" height="{SVG_HEIGHT}" role="img" aria-label="over time">'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="#2f88d0" stroke-width="1.5"/></svg>'
    )


def sampled(curve: Curve | None, width: int) -> Array:
    """(width,): the last known median at or before each column's step; NaN before the first."""
    if curve is None or not len(curve.steps):
        return np.full(width, np.nan)
    finite = np.isfinite(curve.median)
    steps, values = curve.steps[finite], curve.median[finite]
    wanted = np.expm1(np.linspace(0, np.log1p(float(curve.steps[-1])), width))
    at = np.searchsorted(steps, wanted + 0.5, side="right") - 1
    found: Array = np.where(at >= 0, values[np.maximum(at, 0)], np.nan) if len(values) else np.full(width, np.nan)
    return found
