"""check() and explain(): apply the rules to a model, a state dict or a file, and say what gamma and beta do there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, ClassVar

import numpy as np

from batchnorm.checks import sources
from batchnorm.checks.findings import SEVERITIES, Finding, LayerData, apply_rules, by_severity, finding_lines
from batchnorm.checks.rules import at_rest
from batchnorm.checks.sources import Network
from batchnorm.quantities import CLASSES, position_in, position_out
from batchnorm.records import Record
from batchnorm.words import SENTENCES, ClassCounts, angle, index, is_live, known, percent, plural, quantile

__all__ = ["check", "explain"]

COLUMNS = (
    "layer", "units", "undo_index", "undo_angle", "undone", "away", "dead", "gamma < 0", "mean/s", "beta/gamma",
    "variance",
)  # fmt: skip
ORIGIN = {"kind": "type", "producer": "weight before it"}
"""Attributes of `Row` that a wide table shows beside the layer's name, and their headers."""


@dataclass(frozen=True)
class Row:
    """One layer of an `Explanation`, in numbers; NaN where unknown.

    Attributes:
        layer: its name.
        units: how many units (channels) it has.
        undo_index: (lower quartile, median, upper quartile) over its units: 1 is undone, 0 is bare normalization.
        classes: how many of its units are in each class, by the running statistics.
        undo_angle: the median over the live units, in degrees: 0 is undone, for every scale.
        bare_angle: the median angle that bare normalization would have, in degrees.
        position_in: the median of |mean/s|: how far the input's mean is from 0, in standard deviations.
        position_out: the median of |beta/gamma|: the same of the output.
        negative: the share of units with gamma < 0.
        variance: (min, median, max) of the running variance.
        aliases: further names of the same module.
        kind: its class; empty where unknown.
        producer: the module whose weight comes right before it and has as many output channels; empty where unknown.
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

    def as_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON; unknown values are NaN."""
        return asdict(self) | {"classes": self.classes.as_dict()}

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS; empty where unknown."""
        shares = (*(self.classes.share(name) for name in ("undone", "away", "dead")), self.negative)
        return (
            self.layer,
            f"{self.units:,}",
            _ranged(self.undo_index, index),
            known(self.undo_angle, angle),
            *(known(share, percent) for share in shares),
            known(self.position_in, _number),
            known(self.position_out, _number),
            _ranged(self.variance, _number),
        )


def origins(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """The entries of ORIGIN that some row has."""
    return tuple((key, name) for key, name in ORIGIN.items() if any(getattr(row, key) for row in rows))


@dataclass(frozen=True, repr=False)
class Explanation(Record):
    """What gamma and beta do, by the running statistics: one row per layer, and a sentence for the network.

    Attributes:
        rows: one for each layer.
        classes: how many units of all layers are in each class, such as "undone" and "dead".
        index: the median undo_index of all units: 1 is undone, 0 is bare normalization.
        undo_angle: the median undo_angle of the live units, in degrees: 0 is undone, for every scale.
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
        """The answer in a sentence, by the running statistics."""
        if not self.rows:
            return "There is no batch norm layer."
        if self.classes["unknown"] == self.classes.units:
            return "Unknown: gamma and beta or the running statistics are missing or not finite."
        shares = f"of {plural(self.classes.units, 'unit')}, {self.classes.text()}"
        median = f"; median undo_index {index(self.index)} (1: undone, 0: bare)" if np.isfinite(self.index) else ""
        return f"By the running statistics, {SENTENCES[self.verdict]}: {shares}{median}."

    @property
    def scale_free(self) -> str:
        """The answer by undo_angle, which does not depend on the scale of the weights below; empty if unknown."""
        if not np.isfinite(self.undo_angle):
            return ""
        return (
            f"Whatever the scale of the weights below: median undo_angle {angle(self.undo_angle)} over the live units "
            f"(0°: undone, up to a factor; bare: {angle(self.bare_angle)})."
        )

    @property
    def sentences(self) -> tuple[str, ...]:
        """Both answers, without empty ones."""
        return tuple(filter(None, (self.headline, self.scale_free)))

    def as_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON; unknown values are NaN."""
        answer = {"verdict": self.verdict, "headline": self.headline, "classes": self.classes.as_dict()}
        medians = {"undo_index": self.index, "undo_angle": self.undo_angle, "bare_angle": self.bare_angle}
        return answer | medians | {"layers": [row.as_dict() for row in self.rows]}

    def _repr_html_(self) -> str:
        """In a notebook: a table of the layers."""
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row.cells()) for row in self.rows)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        words = "".join(f"<p>{escape(text)}</p>" for text in self.sentences)
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
    """Explain each layer of a network, and all of them together."""
    rows = tuple(_row(layer) for layer in network.layers)
    return Explanation(rows, ClassCounts.total_of(row.classes for row in rows), *_medians(network.layers))


def _medians(layers: Sequence[LayerData]) -> tuple[float, float, float]:
    """Medians of undo_index over all units, and of undo_angle and bare_angle over the live units."""
    names = ("class", "undo_index", "undo_angle", "bare_angle")
    classes, *values = (np.concatenate([np.zeros(0), *(layer[name][-1] for layer in layers)]) for name in names)
    live = ~np.isnan(classes) & is_live(classes)
    return quantile(values[0]), quantile(values[1][live]), quantile(values[2][live])


def _row(layer: LayerData) -> Row:
    names = ("class", "undo_index", "running_mean", "running_var", "gamma", "beta")
    classes, undo, mean, var, gamma, beta = (layer[name][-1] for name in names)
    undo_index, undo_angle, bare_angle = _medians([layer])
    settings = layer.settings
    codes = np.where(np.isnan(classes), float(CLASSES.index("unknown")), classes)  # a layer may have no statistics
    return Row(
        layer=layer.name,
        units=layer.units,
        undo_index=(quantile(undo, 0.25), undo_index, quantile(undo, 0.75)),
        classes=ClassCounts.of(codes if settings.get("affine", True) else []),
        undo_angle=undo_angle,
        bare_angle=bare_angle,
        position_in=quantile(np.abs(position_in(mean, var, float(settings.get("eps", 1e-5))))),
        position_out=quantile(np.abs(position_out(gamma, beta))),
        negative=float(np.mean(gamma[~np.isnan(gamma)] < 0)) if not np.isnan(gamma).all() else float("nan"),
        variance=(quantile(var, 0.0), quantile(var), quantile(var, 1.0)),
        aliases=tuple(settings.get("aliases", ())),
        kind=str(settings.get("class", "")),
        producer=str(settings.get("producer", "")),
    )


def _ranged(values: tuple[float, float, float], form: Callable[[float], str]) -> str:
    low, middle, high = map(form, values)
    return f"{middle} [{low}..{high}]" if np.isfinite(values[1]) else ""


def _number(value: float) -> str:
    return f"{value:.2g}" if abs(value) >= 1000 or 0 < abs(value) < 0.01 else f"{value:.3g}"


@dataclass(frozen=True, repr=False)
class Checkup(Record):
    """The result of `check`: what is wrong, and what gamma and beta do; `print` it.

    Attributes:
        network: the layers that were checked.
        findings: the findings of the rules, most severe first.
        explanation: what gamma and beta of each layer do, as returned by `explain`.
    """

    page_kind: ClassVar[str] = "checkup"

    network: Network
    findings: tuple[Finding, ...]
    explanation: Explanation

    @property
    def healthy(self) -> bool:
        """Whether there is no finding at error level."""
        return not self.count("error")

    def count(self, severity: str) -> int:
        """Count the findings of one `severity`: "error", "warning" or "note"."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def headline(self) -> str:
        """How many layers, units and findings there are, in one line."""
        units = sum(layer.units for layer in self.network.layers)
        layers = plural(len(self.network.layers), "batch norm layer")
        return f"{layers}, {plural(units, 'unit')}: {self.counted or 'nothing found'}"

    @property
    def counted(self) -> str:
        """How many findings there are, as "1 error, 3 warnings"; empty without findings."""
        counts = ((self.count(severity), severity) for severity in SEVERITIES)
        return ", ".join(plural(number, severity) for number, severity in counts if number)

    def as_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON; unknown values are NaN."""
        source = self.network
        about = {"source": source.source, "format": source.format, "bytes": source.size, "tensors": source.tensors}
        return about | {
            "healthy": self.healthy,
            "headline": self.headline,
            "findings": [finding.as_dict() for finding in self.findings],
            "classes": self.explanation.classes.as_dict(),
            "explanation": {k: v for k, v in self.explanation.as_dict().items() if k != "layers"},
            "layers": [row.as_dict() for row in self.explanation.rows],
        }

    def __str__(self) -> str:
        return "\n".join([self.headline, *finding_lines(self.findings)])


def check(given: object) -> Checkup:
    """Check every batch norm layer of a model or checkpoint against rules: what is wrong, and what to do.

    Args:
        given: a model, also a GraphModule; an ExportedProgram of torch.export, with the settings of its nodes; a state
            dict, nested or not; or the path of a checkpoint (.pt, .pth, .ckpt, .pt2, .safetensors, .onnx, .h5, .keras)
            or of its folder. Files are never executed, and only the tensors of norms are read.

    Returns:
        Findings and a table of the layers; `print` it, or use `.as_dict()`. Nothing is changed.

    Raises CheckpointError if a file cannot be read, and SourceError, a ValueError, if there is nothing to check.
    """
    return checkup(sources.of(given))


def checkup(network: Network) -> Checkup:
    """Apply all rules to a network."""
    findings = [finding for layer in network.layers for finding in apply_rules(at_rest.RULES, layer)]
    findings += [finding for rule in at_rest.ACROSS for finding in rule(network)]
    return Checkup(network, tuple(by_severity(findings)), explained(network))


def explain(given: object) -> Explanation:
    """Say for each layer whether gamma and beta undo the normalization, from the running statistics alone.

    undo_index is 1 if gamma = sqrt(running_var + eps) and beta = running_mean (the layer is the identity in eval mode),
    and 0 if it is as far from that as bare normalization (gamma = 1, beta = 0). mean/s and beta/gamma say where zero
    lies in the distributions of input and output; they do not depend on the scale of the weights below. The running
    variance is the unbiased one, as PyTorch stores it. eps is the layer's, or its framework's default if unknown.

    Args:
        given: a model, a program, a state dict or the path of a checkpoint, as for `check`.

    Returns:
        A table of the layers and the answer for the whole network; `print` it. Nothing is changed.

    Raises CheckpointError if a file cannot be read, and SourceError, a ValueError, if there is nothing to explain.
    """
    return explained(sources.of(given))
