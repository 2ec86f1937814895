"""A study of regimes in the terminal, and as JSON."""

from __future__ import annotations

from typing import Any

from batchnorm.console import write_table
from batchnorm.record.run import Run
from batchnorm.report.regimes.verdicts import Arm, arms, headline, sentences


def described(run: Run) -> dict[str, Any]:
    """For JSON: the answer, and every arm with its figures."""
    found = arms(run)
    listed = [
        {"part": arm.part, "case": arm.case, "arm": arm.name, "accuracy": arm.accuracy.median, "loss": arm.loss.median}
        | {"statistics_error": arm.statistics_error.median, "points": arm.points, "verdict": arm.verdict}
        for arm in found
    ]
    return {"headline": headline(found), "verdicts": dict(sentences(found)), "arms": listed}


def show(run: Run) -> None:
    """The arms case by case, within 80 columns, and the answer."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, found = Console(), arms(run)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("", "accuracy", "over seeds", "mean off", "points", "verdict"):
        table.add_column(name, justify="left" if name in ("", "verdict") else "right")
    for case in dict.fromkeys(arm.case for arm in found):
        table.add_row(case)
        for arm in (arm for arm in found if arm.case == case):
            table.add_row(*_cells(arm))
    write_table(console, table)
    console.print()
    for line in (headline(found), *(f"{name}: {words}" for name, words in sentences(found))):
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _cells(arm: Arm) -> tuple[str, ...]:
    low, high = 100 * arm.accuracy.low, 100 * arm.accuracy.high
    error = f"{arm.statistics_error.median:.2g}" if arm.statistics_error.known else ""
    points = f"{arm.points:+.1f}" if arm.gain else ""
    return f"  {arm.name}", f"{100 * arm.accuracy.median:.1f}%", f"{low:.1f}..{high:.1f}", error, points, arm.verdict
