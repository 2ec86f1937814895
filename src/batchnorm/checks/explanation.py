"""What gamma and beta do in each layer of a network, from its running statistics: a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from batchnorm.checks.network import Network
from batchnorm.checks.observed import Array, Observed
from batchnorm.quantities import nearer_undone, position_in, position_out, undo_index

COLUMNS = ("layer", "units", "undo_index", "nearer undone", "mean/s", "beta/gamma", "gamma < 0", "dead", "variance")


@dataclass(frozen=True)
class Row:
    """A layer in numbers: medians over units with quartiles, shares and counts; NaN where unknown.

    `undo_index` is (lower quartile, median, upper quartile); `position_in` and `position_out` are medians of |mean/s|
    and |beta/gamma|; `dead` counts |gamma| < 0.01; `variance` is the running variance's (least, median, largest).
    """

    layer: str
    units: int
    undo_index: tuple[float, float, float]
    nearer_undone: float
    position_in: float
    position_out: float
    negative: float
    dead: int
    variance: tuple[float, float, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """In the order of COLUMNS; empty where unknown."""
        low, middle, high = self.undo_index
        least, median, most = self.variance
        return (
            self.layer,
            f"{self.units:,}",
            f"{_index(middle)} [{_index(low)}..{_index(high)}]" if np.isfinite(middle) else "",
            _percent(self.nearer_undone),
            _number(self.position_in),
            _number(self.position_out),
            _percent(self.negative),
            f"{self.dead:,}",
            f"{_number(median)} [{_number(least)}..{_number(most)}]" if np.isfinite(median) else "",
        )


@dataclass(frozen=True)
class Explanation:
    """One row a layer, and the whole network in a sentence. `print` it."""

    rows: tuple[Row, ...]
    undone: float
    index: float

    @property
    def headline(self) -> str:
        """The answer, as far as running statistics tell it."""
        if not self.rows:
            return "There is no batch norm layer."
        if not np.isfinite(self.undone):
            return "There is no gamma and beta, or no statistics, to tell it from."
        verdict = "gamma and beta undo it" if self.undone >= 0.5 else "gamma and beta do not undo it"
        return (
            f"By the running statistics, {verdict}: {_percent(self.undone)} of the units are nearer to undone than to "
            f"bare normalization, median undo_index {_index(self.index)} (1: undone, 0: bare)."
        )

    def __str__(self) -> str:
        table = [COLUMNS, *(row.cells() for row in self.rows)]
        widths = [max(len(line[at]) for line in table) for at in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in table)
        ]
        return "\n".join([*(line.rstrip() for line in lines), "", self.headline])


def explained(network: Network) -> Explanation:
    """The table of a network's layers."""
    units = [_by_unit(layer) for layer in network.layers]
    indices = np.concatenate([index for index, _ in units]) if units else np.zeros(0)
    nearer = np.concatenate([near for _, near in units]) if units else np.zeros(0)
    rows = tuple(_row(layer, *each) for layer, each in zip(network.layers, units, strict=True))
    return Explanation(rows, _mean(nearer), _quantile(indices, 0.5))


def _by_unit(layer: Observed) -> tuple[Array, Array]:
    arguments = layer["running_mean"][-1], layer["running_var"][-1], float(layer.settings.get("eps", 1e-5))
    affine = layer["gamma"][-1], layer["beta"][-1]
    return undo_index(*arguments, *affine), nearer_undone(*arguments, *affine)


def _row(layer: Observed, index: Array, nearer: Array) -> Row:
    mean, var, gamma, beta = (layer[name][-1] for name in ("running_mean", "running_var", "gamma", "beta"))
    eps = float(layer.settings.get("eps", 1e-5))
    return Row(
        layer.name,
        layer.units,
        (_quantile(index, 0.25), _quantile(index, 0.5), _quantile(index, 0.75)),
        _mean(nearer),
        _quantile(np.abs(position_in(mean, var, eps)), 0.5),
        _quantile(np.abs(position_out(gamma, beta)), 0.5),
        _mean(np.where(np.isnan(gamma), np.nan, gamma < 0)),
        int(np.nansum(layer["dead"][-1])),
        (_quantile(var, 0.0), _quantile(var, 0.5), _quantile(var, 1.0)),
    )


def _quantile(values: Array, q: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.quantile(known, q)) if known.size else float("nan")


def _mean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _index(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def _number(value: float) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:.2g}" if abs(value) >= 1000 or 0 < abs(value) < 0.01 else f"{value:.3g}"


def _percent(share: float) -> str:
    if not np.isfinite(share):
        return ""
    return f"{100 * share:.0f}%" if share in (0, 1) or 0.01 <= share <= 0.99 else f"{100 * share:.1f}%"
