"""A study of regimes -> everything its page shows, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt

from batchnorm.report.charts import (
    RECORDS,
    Records,
    Spec,
    panel,
)
from batchnorm.report.definitions import Definition
from batchnorm.report.provenance import Facts, grouped, ran
from batchnorm.report.regimes.verdicts import POINTS, SEEDS, Arm, arms, headline, sentences
from batchnorm.report.study.panels import Panel
from batchnorm.runs.run import Run
from batchnorm.words import Spread

TITLE = "When is each regime worth it?"
COLOURS = {"better": "#159b76", "worse": "#dd6a1f", "": "#2f88d0"}
COLUMNS = ("case", "arm", "accuracy", "loss", "error of running mean", "points", "verdict")
RULE = (
    "Accuracy on held-out data in eval mode, median over seeds with the range. Points: the median difference in "
    "accuracy from the arm compared with, seed by seed. better, worse: at least "
    f"{SEEDS} seeds, all of one sign, and a median of {POINTS:g} point or more; else no difference is seen. "
    "Error of the running mean: of the first norm, RMS over units of its distance from that of all training data (over "
    "valid positions), in deviations."
)
DEFINITIONS = (
    Definition(
        "no norm, group norm",
        "y = x; y over groups of channels of each sample",
        "What there is outside of batch normalization, at the same rate and number of steps.",
        "4 groups",
    ),
    Definition("recalibrated", "bn.recalibrate(model, batches)", "The same training, statistics of all data.", "-"),
    Definition("renorm", "gamma·(xhat·r + d) + beta", "Limits grow up to half of the steps.", "rmax 3, dmax 5"),
    Definition("accumulate", "accumulate=32/size", "The statistics of 32 samples move the running ones.", "-"),
    Definition(
        "synchronized",
        "bn.sync(model)",
        "32/size processes are one batch of 32 by definition, and trained as that: the others see fewer samples.",
        "-",
    ),
    Definition("ghost", "bn.GhostBatchNorm2d(channels, 16)", "Virtual batches of 16.", "-"),
    Definition("by domain", "bn.DomainBatchNorm2d(channels, 2)", "The domain is known, in inference too.", "-"),
    Definition("frozen after a fifth", "bn.freeze(model)", "Statistics as they are after a fifth of the steps.", "-"),
    Definition(
        "padding counted, outputs masked, lengths",
        "norm(x); norm(x)·valid; norm(x, lengths=lengths)",
        "Statistics over all positions; the same with padded outputs set to 0; over valid positions.",
        "-",
    ),
)


@dataclass(frozen=True)
class RegimesPage:
    """Everything the page shows, in its order."""

    title: str
    subtitle: str
    notices: tuple[str, ...]
    headline: str
    sentences: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    rule: str
    parts: tuple[tuple[str, tuple[Panel, ...]], ...]
    definitions: tuple[Definition, ...]
    provenance: tuple[Facts, ...]


def build(run: Run) -> RegimesPage:
    """The page of a study of regimes. Raises RunError where a table is damaged."""
    found, info = arms(run), run.info
    status = info.get("status")
    groups = {"Run": ran(info, "command", "status", "started", "ended"), "Configuration": info.get("config")}
    return RegimesPage(
        title=TITLE,
        subtitle="small batches, batches not drawn at random, padded sequences: on the embedded digits",
        notices=() if status == "complete" else (f"The study is {status}: this is what was measured.",),
        headline=headline(found),
        sentences=tuple(sentences(found)),
        columns=COLUMNS,
        rows=tuple(cells(arm) for arm in found),
        rule=RULE,
        parts=tuple((part, _panels(found, part)) for part in dict.fromkeys(arm.part for arm in found)),
        definitions=DEFINITIONS,
        provenance=tuple(grouped({**groups, "Versions": info.get("versions"), "Machine": info.get("machine")})),
    )


def cells(arm: Arm) -> tuple[str, ...]:
    """An arm's row of the table."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}%"

    def number(value: float) -> str:
        return f"{value:.2g}"

    told = [spread.cell(form) for spread, form in _spreads(arm, percent, number)]
    return (arm.case, arm.name, *told, f"{arm.points:+.1f}" if arm.gain else "", arm.verdict)


def _spreads(arm: Arm, percent: Any, number: Any) -> list[tuple[Spread, Any]]:
    return [(arm.accuracy, percent), (arm.loss, number), (arm.statistics_error, number)]


def _panels(found: list[Arm], part: str) -> tuple[Panel, ...]:
    cases = [*dict.fromkeys(arm.case for arm in found if arm.part == part)]
    return tuple(
        Panel(f"{part}-{case}".replace(" ", "-"), case, f"accuracy of each arm, {case}", _chart(found, case))
        for case in cases
    )


def _chart(found: list[Arm], case: str) -> Spec:
    shown = [arm for arm in found if arm.case == case]
    records: Records = [
        {
            "arm": arm.name,
            "accuracy": arm.accuracy.median,
            "low": arm.accuracy.low,
            "high": arm.accuracy.high,
            "verdict": arm.verdict if arm.verdict in COLOURS else "",
        }
        for arm in shown
        if arm.accuracy.known
    ]
    colour = alt.Color("verdict:N", scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())), legend=None)
    y = alt.Y("arm:N", sort=[arm.name for arm in shown], title=None)
    base = alt.Chart(alt.NamedData(RECORDS)).encode(y=y, color=colour)
    x = alt.X("low:Q", title="accuracy", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(format="%", tickCount=4))
    tooltip = [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("accuracy", "low", "high")]
    drawn = base.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q") + base.mark_point(filled=True, size=60).encode(
        x="accuracy:Q", tooltip=["arm:N", *tooltip]
    )
    return panel(drawn, records, height=24 * len(shown) + 10)
