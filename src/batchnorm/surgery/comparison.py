"""What `batchnorm.compare` found: a record, and its text."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.records import Record, Skipped, some
from batchnorm.words import plural


@dataclass(frozen=True, slots=True)
class Compared:
    """One layer: all its names, its class, its place in the order of calls (from 0), and m, the values a channel.

    `gap` is the median over its units of `eval_gap`, in deviations, and `expected` what sampling explains of it: the
    median over the units whose input varies in the batch.
    `output_change` is the RMS of its output in eval minus that in training, relative to the RMS of that in training:
    what it adds itself and what came from the layers before it. `reason` is one of `reasons.REASONS`, `why` the words.
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
    """Training against eval mode on one batch; the guilty layers first. `skipped` are the layers not compared.

    `output_change` is the RMS of the model's output in eval minus that in training, relative to the RMS of that in
    training; None where the model returns no floating-point tensor.
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
