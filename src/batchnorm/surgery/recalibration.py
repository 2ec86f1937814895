"""What `batchnorm.recalibrate` did: a record, and its text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from batchnorm.records import Record, Skipped, some
from batchnorm.words import plural


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """One layer: all its names, its class, the values of a channel that were pooled, and its calls in one forward.

    `moved_median` and `moved_max` are over its units: `eval_gap` from the old to the new statistics, in old deviations;
    NaN where no unit had old statistics that are finite, of which there were `healed`.
    """

    names: tuple[str, ...]
    kind: str
    values: int
    calls: int
    moved_median: float
    moved_max: float
    healed: int


@dataclass(frozen=True, slots=True, repr=False)
class Recalibration(Record):
    """What `recalibrate` did; layers in the order of their calls.

    `skipped` are the layers left as they were. `batches` were used and `left_out` had values that are not finite.
    `converged` is None where no tolerance was given, `kept` "after" or "before": the statistics that the model has now.
    """

    layers: tuple[Recalibrated, ...]
    skipped: tuple[Skipped, ...] = ()
    batches: int = 0
    left_out: int = 0
    passes: int = 0
    exact: bool = True
    converged: bool | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    kept: str = "after"

    def __str__(self) -> str:
        return "\n".join([self._head(), *self._moves(), *self._rest(), *([self._verdict()] if self.layers else [])])

    def _head(self) -> str:
        counted = f"{plural(len(self.layers), 'batch norm layer')} recalibrated"
        if not self.layers:
            return counted
        head = f"{counted} on {plural(self.batches, 'batch', 'batches')} in {plural(self.passes, 'pass', 'passes')}"
        if self.left_out:
            head += f", {plural(self.left_out, 'batch', 'batches')} left out (not finite)"
        if self.converged is not None:
            head += ", converged" if self.converged else ", not converged: more data would move them further"
        return head

    def _moves(self) -> list[str]:
        rows = []
        for kind in dict.fromkeys(layer.kind for layer in self.layers):
            layers = [layer for layer in self.layers if layer.kind == kind]
            row = f"{len(layers):4}  {kind}"
            known = [layer for layer in layers if not math.isnan(layer.moved_max)]
            if known:
                most = max(known, key=lambda layer: layer.moved_max)
                median = float(np.nanmedian([layer.moved_median for layer in known]))
                row += f"  moved by {median:.2g} deviations in the median, up to {most.moved_max:.2g} ({_called(most)})"
            healed = [layer for layer in layers if layer.healed]
            if healed:
                units = sum(layer.healed for layer in healed)
                row += f"; {plural(units, 'unit was', 'units were')} not finite: "
                row += some([_called(layer) for layer in healed])
            rows.append(row)
        return rows

    def _rest(self) -> list[str]:
        groups: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.calls > 1:
                groups.setdefault("called several times in a forward, pooled over its calls", []).append(_called(layer))
        for skipped in self.skipped:
            groups.setdefault(f"{skipped.kind}  left alone ({skipped.why})", []).append(skipped.name or "(the model)")
        return [f"{len(names):4}  {row}: {some(names)}" for row, names in groups.items()]

    def _verdict(self) -> str:
        if self.metric_before is None:
            return "no metric was given: is this the data that inference will see? metric= keeps the better statistics"
        moved = f"metric {self.metric_before:.6g} → {self.metric_after:.6g}"
        return moved if self.kept == "after" else f"{moved}: worse, so the old statistics were put back"


def _called(layer: Recalibrated) -> str:
    return ", ".join(layer.names) or "(the model)"
