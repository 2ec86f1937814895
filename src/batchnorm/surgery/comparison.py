"""What `batchnorm.compare` found: a record, and its text."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.records import Record
from batchnorm.surgery._shared.layers import Skipped
from batchnorm.surgery.conversion import some
from batchnorm.words import plural


@dataclass(frozen=True, slots=True)
class Compared:
    """One layer of a `Comparison`.

    Attributes:
        names: all names of the layer in the model.
        kind: its class.
        place: its place in the order of calls, from 0.
        values: m, the values of a channel in the batch.
        gap: the median over its units of `eval_gap`, in standard deviations of the running statistics.
        expected: the part of the gap that sampling a batch explains: the median over the units whose input varies.
        output_change: RMS of (its output in eval mode - in training mode), divided by the RMS in training mode. It
            holds what the layer adds and what came from the layers before it.
        reason: a key: "fine", "stale", "never-trained" and so on, as `compare` lists them.
        why: the reason in words.
    """

    names: tuple[str, ...]
    kind: str
    place: int
    values: int
    gap: float
    expected: float
    output_change: float
    reason: str
    why: str

    @property
    def name(self) -> str:
        """Its first name; empty where it is the model itself."""
        return self.names[0]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Record):
    """What `compare` found: training mode against eval mode, on one batch.

    Attributes:
        layers: one record for each layer; those with a reason other than "fine" come first.
        skipped: the layers that were not compared, each with the reason.
        output_change: RMS of (output in eval mode - output in training mode), divided by the RMS of the output in
            training mode; None where the model's output holds no tensors to compare.
    """

    layers: tuple[Compared, ...]
    skipped: tuple[Skipped, ...] = ()
    output_change: float | None = None

    @property
    def guilty(self) -> tuple[Compared, ...]:
        """The layers with another reason than "fine"."""
        return tuple(layer for layer in self.layers if layer.reason != "fine")

    def __str__(self) -> str:
        counted = plural(len(self.layers), "batch norm layer")
        if not self.layers:
            head = "no batch norm layers to compare"
        elif not self.guilty:
            head = f"training and eval agree in {'all ' if len(self.layers) > 1 else ''}{counted}"
        else:
            verb = "differs" if len(self.guilty) == 1 else "differ"
            head = f"{len(self.guilty)} of {counted} {verb} between training and eval"
        if self.output_change is not None:
            head += f"; the model's output differs by {100 * self.output_change:.3g}% (RMS)"
        rows = []
        for reason in dict.fromkeys(layer.reason for layer in self.layers):
            layers = [layer for layer in self.layers if layer.reason == reason]
            worst = layers[0]
            rows.append(
                f"{len(layers):4}  {reason}: {some([', '.join(each.names) or '(the model)' for each in layers])}"
            )
            if len(layers) > 1:
                rows.append(f"      {worst.name}: {worst.why}")
            else:
                rows.append(f"      {worst.why}")
        groups: dict[str, list[str]] = {}
        for skipped in self.skipped:
            groups.setdefault(f"{skipped.kind}  not compared ({skipped.why})", []).append(skipped.name or "(the model)")
        return "\n".join([head, *rows, *(f"{len(names):4}  {row}: {some(names)}" for row, names in groups.items())])
