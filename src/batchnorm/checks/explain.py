"""What gamma and beta do in each layer of a network, from its running statistics: a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.checks.findings import Array, Observed
from batchnorm.checks.sources import Network
from batchnorm.quantities import CLASSES, position_in, position_out
from batchnorm.records import Record
from batchnorm.verdict import ClassCounts
from batchnorm.words import angle, index, known, percent, plural

COLUMNS = (
    "layer", "units", "undo_index", "undo_angle", "undone", "away", "dead", "gamma < 0", "mean/s", "beta/gamma",
    "variance",
)  # fmt: skip
ORIGIN = ("type", "weight before it")
"""What a table with room for it tells of a layer beside its name: `Row.origin`."""


@dataclass(frozen=True)
class Row:
    """One layer of an `Explanation`, in numbers; NaN where unknown.

    Attributes:
        layer: its name.
        units: how many units (channels) it has.
        undo_index: (lower quartile, median, upper quartile) over its units: 1 is undone, 0 is bare normalization.
        classes: how many of its units are in each class, by the running statistics.
        undo_angle: the median over the live units, in degrees: 0 is undone, whatever the scale.
        bare_angle: the median angle that bare normalization would have, in degrees.
        position_in: the median of |mean/s|: how far the input's mean is from 0, in standard deviations.
        position_out: the median of |beta/gamma|: the same of the output.
        negative: the share of units with gamma < 0.
        variance: (min, median, max) of the running variance.
        aliases: further names of the same module.
        kind: its class; empty where unknown.
        producer: the module whose weight is kept right before it and makes as many units; empty where unknown.
    """

    layer: str
    units: int
    undo_index: tuple[float, float, float]
    classes: ClassCounts
    undo_angle: float
    bare_angle: float
    position_in: float
    position_out: float
    negative: float
    variance: tuple[float, float, float]
    aliases: tuple[str, ...] = ()
    kind: str = ""
    producer: str = ""

    @property
    def origin(self) -> tuple[str, str]:
        """In the order of ORIGIN."""
        return self.kind, self.producer

    def as_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON; what is not known is NaN."""
        return asdict(self) | {"classes": self.classes.as_dict()}

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS; empty where unknown."""
        low, middle, high = self.undo_index
        least, median, most = self.variance
        return (
            self.layer,
            f"{self.units:,}",
            f"{index(middle)} [{index(low)}..{index(high)}]" if np.isfinite(middle) else "",
            known(self.undo_angle, angle),
            known(self.classes.share("undone"), percent),
            known(self.classes.share("away"), percent),
            known(self.classes.share("dead"), percent),
            known(self.negative, percent),
            known(self.position_in, _number),
            known(self.position_out, _number),
            f"{_number(median)} [{_number(least)}..{_number(most)}]" if np.isfinite(median) else "",
        )


def origins(rows: Sequence[Row]) -> tuple[tuple[int, str], ...]:
    """The places in `Row.origin` of which something is known in some row, and what they are called."""
    return tuple((at, name) for at, name in enumerate(ORIGIN) if any(row.origin[at] for row in rows))


@dataclass(frozen=True, repr=False)
class Explanation(Record):
    """What gamma and beta do, by the running statistics: one row a layer, and the whole network in a sentence.

    Attributes:
        rows: one for each layer.
        classes: how many units of all layers are in each class, such as "undone" and "dead".
        index: the median undo_index of all units: 1 is undone, 0 is bare normalization.
        undo_angle: the median undo_angle of the live units, in degrees: 0 is undone, whatever the scale.
        bare_angle: the median angle that bare normalization (gamma = 1, beta = 0) would have, in degrees.
    """

    rows: tuple[Row, ...]
    classes: ClassCounts
    index: float
    undo_angle: float
    bare_angle: float

    @property
    def verdict(self) -> str:
        """The answer as a key: "yes", "partly", "no", "dead", "nothing to undo", "unknown" or "no layer"."""
        return self.classes.verdict if self.rows else "no layer"

    @property
    def headline(self) -> str:
        """The answer in a sentence, as far as running statistics tell it."""
        if not self.rows:
            return "There is no batch norm layer."
        if self.classes["unknown"] == self.classes.units:
            return "There is no gamma and beta, or there are no statistics, to tell it from."
        heads = {
            "yes": "gamma and beta undo it",
            "partly": "gamma and beta undo it in part",
            "no": "gamma and beta do not undo it",
            "dead": "most units are dead, and pass nothing on",
            "nothing to undo": "there is little to undo",
            "unknown": "whether gamma and beta undo it is unknown",
        }
        found = f"of {plural(self.classes.units, 'unit')}, {self.classes.text()}"
        middle = f"; median undo_index {index(self.index)} (1: undone, 0: bare)" if np.isfinite(self.index) else ""
        return f"By the running statistics, {heads[self.verdict]}: {found}{middle}."

    @property
    def scale_free(self) -> str:
        """The answer by undo_angle, whatever the scale of the weights below; empty where it is not known."""
        if not np.isfinite(self.undo_angle):
            return ""
        return (
            f"Whatever the scale of the weights below: median undo_angle {angle(self.undo_angle)} over the live units "
            f"(0°: undone, up to a factor; bare: {angle(self.bare_angle)})."
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON; what is not known is NaN."""
        found = {"verdict": self.verdict, "headline": self.headline, "classes": self.classes.as_dict()}
        middle = {"undo_index": self.index, "undo_angle": self.undo_angle, "bare_angle": self.bare_angle}
        return found | middle | {"layers": [row.as_dict() for row in self.rows]}

    def _repr_html_(self) -> str:
        """In a notebook: a table of the layers."""
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row.cells()) for row in self.rows)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        words = "".join(f"<p>{escape(text)}</p>" for text in (self.headline, self.scale_free) if text)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{words}"

    def __str__(self) -> str:
        table = [COLUMNS, *(row.cells() for row in self.rows)]
        widths = [max(len(line[at]) for line in table) for at in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in table)
        ]
        return "\n".join([*(line.rstrip() for line in lines), "", self.headline, self.scale_free]).rstrip()


def explained(network: Network) -> Explanation:
    """The table of a network's layers."""
    rows = tuple(_row(layer) for layer in network.layers)
    pooled = {name: np.concatenate([np.zeros(0), *(of[name][-1] for of in network.layers)]) for name in _POOLED}
    live = _live(pooled["class"])
    return Explanation(
        rows,
        ClassCounts.total_of(row.classes for row in rows),
        _quantile(pooled["undo_index"], 0.5),
        _quantile(pooled["undo_angle"][live], 0.5),
        _quantile(pooled["bare_angle"][live], 0.5),
    )


_POOLED = ("class", "undo_index", "undo_angle", "bare_angle")


def _classes(layer: Observed) -> Array:
    """Those of its units; unknown where a layer has no statistics, NaN where it has no gamma and beta."""
    if not layer.settings.get("affine", True):
        return np.full(layer.units, np.nan)
    return np.where(np.isnan(layer["class"][-1]), float(CLASSES.index("unknown")), layer["class"][-1])


def _live(classes: Array) -> NDArray[np.bool_]:
    return ~(np.isnan(classes) | np.isin(classes, [CLASSES.index(name) for name in ("dead", "unknown")]))


def _row(layer: Observed) -> Row:
    mean, var, gamma, beta = (layer[name][-1] for name in ("running_mean", "running_var", "gamma", "beta"))
    eps = float(layer.settings.get("eps", 1e-5))
    low, middle, high = (_quantile(layer["undo_index"][-1], q) for q in (0.25, 0.5, 0.75))
    live = _live(layer["class"][-1])
    return Row(
        layer=layer.name,
        units=layer.units,
        undo_index=(low, middle, high),
        classes=ClassCounts.of(_classes(layer)),
        undo_angle=_quantile(layer["undo_angle"][-1][live], 0.5),
        bare_angle=_quantile(layer["bare_angle"][-1][live], 0.5),
        position_in=_quantile(np.abs(position_in(mean, var, eps)), 0.5),
        position_out=_quantile(np.abs(position_out(gamma, beta)), 0.5),
        negative=_mean(np.where(np.isnan(gamma), np.nan, gamma < 0)),
        variance=(_quantile(var, 0.0), _quantile(var, 0.5), _quantile(var, 1.0)),
        aliases=tuple(layer.settings.get("aliases", ())),
        kind=str(layer.settings.get("class", "")),
        producer=str(layer.settings.get("producer", "")),
    )


def _quantile(values: Array, q: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.quantile(known, q)) if known.size else float("nan")


def _mean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _number(value: float) -> str:
    return f"{value:.2g}" if abs(value) >= 1000 or 0 < abs(value) < 0.01 else f"{value:.3g}"
