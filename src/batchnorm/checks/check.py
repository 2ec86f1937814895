"""check(): everything that the rules find in a model, a state dict or a checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from batchnorm.checks import sources
from batchnorm.checks.explain import Explanation, explained
from batchnorm.checks.findings import (
    SEVERITIES,
    Finding,
    by_severity,
    found_by,
)
from batchnorm.checks.rules import at_rest
from batchnorm.checks.rules import network as across
from batchnorm.checks.sources import Network
from batchnorm.records import Record
from batchnorm.words import plural

__all__ = ["check", "explain"]


@dataclass(frozen=True, repr=False)
class Checkup(Record):
    """What `check` found: what is wrong, and what gamma and beta do; `print` it.

    Attributes:
        network: what was checked.
        findings: what the rules found, the gravest first.
        explanation: what gamma and beta of each layer do, as `explain` gives it.
    """

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
        layers = len(self.network.layers)
        units = sum(layer.units for layer in self.network.layers)
        head = f"{plural(layers, 'batch norm layer')}, {plural(units, 'unit')}: "
        return head + (self.counted or "nothing found")

    @property
    def counted(self) -> str:
        """How many findings there are, as "1 error, 3 warnings"; empty where nothing was found."""
        found = Counter(finding.severity for finding in self.findings)
        return ", ".join(plural(found[severity], severity) for severity in SEVERITIES if found[severity])

    def as_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON; what is not known is NaN."""
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
        from batchnorm.checks.findings import finding_lines

        return "\n".join([self.headline, *finding_lines(self.findings)])


def check(given: object) -> Checkup:
    """Check every batch norm layer of a model or checkpoint against rules: what is wrong, and what to do.

    Args:
        given: a model; a state dict, nested or not; or the path of a checkpoint (.pt, .pth, .ckpt, .safetensors, .onnx,
            .h5, .keras) or of a folder that holds one. Files are never executed, and only the norms' tensors are read.

    Returns:
        Findings and a table of the layers; `print` it, or take `.as_dict()`. Nothing is changed.

    Raises CheckpointError where a file cannot be read, and SourceError, a ValueError, where nothing is to be checked.
    """
    return checkup(sources.of(given))


def checkup(of: Network) -> Checkup:
    """All rules over a network."""
    found = [finding for layer in of.layers for finding in found_by(at_rest.RULES, layer)]
    found += [finding for rule in across.RULES for finding in rule(of)]
    order = {layer.name: at for at, layer in enumerate(of.layers)}
    kinds = [*dict.fromkeys(finding.kind.slug for finding in found)]
    found.sort(key=lambda f: (kinds.index(f.kind.slug), order.get(f.layer, -1)))
    return Checkup(of, tuple(by_severity(found)), explained(of))


def explain(given: object) -> Explanation:
    """Say for each layer whether gamma and beta undo the normalization, from the running statistics alone.

    undo_index is 1 where gamma = sqrt(running_var + eps) and beta = running_mean (the layer is the identity in eval
    mode), and 0 where it is as far from that as bare normalization (gamma = 1, beta = 0). mean/s and beta/gamma say
    where zero lies in the input's and the output's distribution, whatever the scale of the weights below. The running
    variance is the unbiased one, as PyTorch stores it. eps is the layer's own where it is known, else its framework's
    default.

    Args:
        given: a model, a state dict or the path of a checkpoint, as `check` takes it.

    Returns:
        A table of the layers and the answer for the whole network; `print` it. Nothing is changed.

    Raises CheckpointError where a file cannot be read, and SourceError, a ValueError, where nothing is to be explained.
    """
    return explained(sources.of(given))
