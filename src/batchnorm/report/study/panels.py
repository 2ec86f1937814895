"""What a page's section consists of, and the readings of a study that several sections share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from batchnorm.report.charts import NUMBER, Domain, Spec
from batchnorm.report.study import charts
from batchnorm.report.study.measured import Study
from batchnorm.report.tables import Table

LEARNING = ("learned", "undone")
NORMALIZED = ("learned", "fixed", "undone")


@dataclass(frozen=True)
class Panel:
    """One small chart: its title, and what it shows in words for those who do not see it."""

    id: str
    title: str
    description: str
    chart: Spec


@dataclass(frozen=True)
class Section:
    """A question of the page: paragraphs, then panels in a grid. `legend` names the arms that are drawn, `dashed` says
    whether their lines carry their dashes, too."""

    id: str
    title: str
    paragraphs: tuple[str, ...]
    panels: tuple[Panel, ...]
    legend: tuple[str, ...] = ()
    note: str = ""
    columns: int = 3
    dashed: bool = True


def per_layer(study: Study, column: str, arms: tuple[str, ...]) -> Table:
    """median, low and high over seeds of the median over a layer's units, by layer, arm and step."""
    medians = of(study.units, arms).medians(column, ("layer", "arm", "seed", "step"))
    return medians.spreads(column, ("layer", "arm", "step"))


def pooled(study: Study, column: str, arms: tuple[str, ...]) -> Table:
    """The same over the units of all layers."""
    return of(study.units, arms).medians(column, ("arm", "seed", "step")).spreads(column, ("arm", "step"))


def layer_panels(
    table: Table,
    title: str,
    name: str,
    *,
    domain: Domain | None,
    form: str = NUMBER,
    guides: Mapping[str, float] | None = None,
    heading: str = "",
    axis: str = "",
    log: bool = False,
) -> tuple[Panel, ...]:
    """A panel of curves for each layer; `heading` says in its title what is shown, where a section shows several.

    `axis` is the title of the vertical axis, by default `title`.
    """
    panels = []
    for place, layer in enumerate(table.names("layer")):
        rows = table.rows(layer=layer)
        if some(rows):
            chart = charts.curves(rows, axis or title, domain=domain, form=form, guides=guides, log=log)
            shown = f"{layer}: {heading}" if heading else layer
            panels.append(Panel(f"{name}-{place}", shown, f"{title} against step in {layer}, by arm.", chart))
    return tuple(panels)


def of(table: Table, arms: tuple[str, ...]) -> Table:
    return Table.stack([table.rows(arm=arm) for arm in arms])


def joined(study: Study, arms: tuple[str, ...]) -> Table:
    """The units of these arms at their last steps."""
    return Table.stack([study.end(study.units, arm) for arm in arms])


def some(table: Table) -> bool:
    return bool(np.isfinite(table["median"]).any())


def from_zero(table: Table, *others: float) -> Domain:
    """From 0 to above the highest value of the table's bands and of the others."""
    high = np.array([*table["high"], *others])
    return (0.0, float(high[np.isfinite(high)].max(initial=0.0)) * 1.08 or 1.0)
