"""One layer's data (`LayerData`), what a rule finds in it (`Finding`), and the rules for trainings and checkpoints.

Rules that need the steps of a training, or a file, are in `rules`. Each threshold is a constant with its reason. The
docstring of a rule says how it avoids false alarms.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchnorm.words import plural, shortened

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Most severe first. Terminal, JSON and pages show these names."""

LASTING = 3
"""A state counts if it holds in at least the last three recorded steps: one or two odd batches are chance."""
LASTING_STEPS = 50
"""It must also hold over this many steps: every early step may be recorded, and a gamma that crosses zero stays near
zero for a few."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding, such as "dead units".

    Attributes:
        slug: its name in JSON and in links, such as "dead-units".
        title: its name in words.
        why: why it matters.
        advice: what to do about it.
        causes: slugs of kinds that imply this kind, if they are found in the same units.
    """

    slug: str
    title: str
    why: str
    advice: str
    causes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A rule's finding in a layer.

    Attributes:
        kind: what was found, why it matters and what to do.
        severity: "error", "warning" or "note".
        layer: the layer's name.
        text: the finding in words that continue after the layer's name.
        number: the measured number behind the finding.
        units: the units concerned, from 0; empty for the whole layer.
        since: the recorded step from which on it holds; None without steps, as in a checkpoint.
    """

    kind: Kind
    severity: Severity
    layer: str
    text: str
    number: float
    units: tuple[int, ...] = ()
    since: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields as a dict for JSON."""
        fields = {name: getattr(self, name) for name in ("severity", "layer", "text", "number", "units", "since")}
        kind = self.kind
        about = {"why": kind.why, "advice": kind.advice, "docs": f"docs/findings.md#{kind.slug}"}
        return {"slug": kind.slug, **fields, "units": list(self.units), **about}


@dataclass(frozen=True)
class LayerData:
    """One layer's data: `arrays` (rows, units) by the names of a Run's columns, NaN where unknown.

    Each row is a recorded step. A checkpoint has one row, and `steps` is None. `settings` has eps, momentum and affine
    if they are known.
    """

    name: str
    units: int
    arrays: Mapping[str, Array]
    steps: Rows | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return 1 if self.steps is None else len(self.steps)

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name] if name in self.arrays else np.full((self.rows, self.units), np.nan)

    def lasting(self, flags: Array) -> Rows:
        """Per column of `flags` (rows, n), which are 1, 0 or NaN: the first row from which on it is 1, or -1.

        Rows of NaN (the layer did not run) are skipped. Fewer than LASTING rows or LASTING_STEPS steps give -1.
        """
        known, needed = np.flatnonzero(~np.isnan(flags).all(axis=1)), 1 if self.steps is None else LASTING
        if len(known) < needed:
            return np.full(flags.shape[1], -1)
        to_the_end = np.logical_and.accumulate(flags[known][::-1] == 1)[::-1]
        first: Rows = np.where(to_the_end.sum(axis=0) >= needed, known[to_the_end.argmax(axis=0)], -1)
        if self.steps is not None:
            first[self.steps[known[-1]] - self.steps[first] < LASTING_STEPS] = -1
        return first

    def finding(
        self,
        kind: Kind,
        severity: Severity,
        text: str,
        number: float,
        units: Rows | None = None,
        row: int | None = None,
    ) -> Finding:
        """A finding in these `units` or in the whole layer, since the step of `row`."""
        since = None if self.steps is None or row is None else int(self.steps[row])
        return Finding(kind, severity, self.name, text, number, () if units is None else tuple(units.tolist()), since)

    def counted(self, units: Rows) -> str:
        """Text such as "3 of 64 units"."""
        return f"{len(units):,} of {plural(self.units, 'unit')}"

    def since_words(self, rows: Sequence[int]) -> str:
        """Text such as " since step 4,200", from the first and last of `rows`; empty without steps."""
        if self.steps is None:
            return ""
        first, last = int(self.steps[min(rows)]), int(self.steps[max(rows)])
        if max(rows) == 0:
            return " from the first recorded step on"
        return f" since step {last:,}" if first == last else f" since step {last:,}, the first since step {first:,}"


Rule = Callable[[LayerData], Finding | None]


def apply_rules(rules: Sequence[Rule], layer: LayerData) -> list[Finding]:
    """Apply rules to a layer in order.

    A finding that follows from another one is dropped. The other one then gets the higher severity of both.
    """
    findings = [finding for rule in rules if (finding := rule(layer)) is not None]
    units = [set(finding.units or range(layer.units)) for finding in findings]
    implied = set()
    for i, finding in enumerate(findings):
        for j, cause in enumerate(findings):
            if cause.kind.slug in finding.kind.causes and units[i] <= units[j]:
                implied.add(i)
                findings[j] = replace(cause, severity=min(cause.severity, finding.severity, key=SEVERITIES.index))
                break
    return [finding for i, finding in enumerate(findings) if i not in implied]


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """Sort by severity, then by kind in order of first appearance; equal ones keep their order."""
    kinds = [*dict.fromkeys(finding.kind.slug for finding in findings)]
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), kinds.index(f.kind.slug)))


LISTED = 5
NAME = 60


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Lines of text: for each kind the first few layers, then why it matters and what to do."""
    if not findings:
        yield "No findings."
    for _, group in groupby(findings, key=lambda finding: (finding.severity, finding.kind)):
        same_kind = list(group)
        kind = same_kind[0].kind
        yield f"{same_kind[0].severity}: {kind.title.lower()} ({kind.slug})"
        texts = [*dict.fromkeys(finding.text for finding in same_kind)]
        for text in texts[:LISTED]:
            names = [shortened(finding.layer, NAME) for finding in same_kind if finding.text == text and finding.layer]
            if len(names) > 3:
                names = [f"{names[0]}, {names[1]} … {names[-1]} ({len(names)} layers)"]
            yield f"  {', '.join(names)}: {text}" if names else f"  {text}"
        if len(texts) > LISTED:
            yield f"  and in {plural(sum(finding.text not in texts[:LISTED] for finding in same_kind), 'more layer')}"
        yield f"  {kind.why} {kind.advice}"


MANY = 0.05
"""From this share of units on, a finding is a warning: a network can lose a few units without harm."""
HALF = 0.5

CONSTANT_BETA = 0.1
"""Threshold of |beta|: a smaller constant hardly changes the next layer."""

MOMENTUM_HIGH = 0.5
"""Above it, the running statistics are mostly the last batch's. TensorFlow's 0.99 is PyTorch's 0.01."""

STARTING_WEIGHT = 0.05
"""The weight that the initial values (mean 0, variance 1) may still have in the running statistics."""
DEFAULT_MOMENTUM = 0.1
"""PyTorch's default. A checkpoint does not store momentum."""

DEAD = Kind(
    "dead-units",
    "Dead units",
    "Their output does not depend on the input: their weights no longer learn, or what they learn is not used.",
    "Lower the learning rate or warm it up; do not decay gamma and beta; or prune these units.",
    causes=("running-variance",),
)
CONSTANT = Kind(
    "constant-channels",
    "Constant channels",
    "The output hardly varies and beta is not near 0: it is the same constant for every input.",
    "Fold the constant into the next layer's bias and prune these units, or do not decay gamma.",
    causes=("running-variance",),
)
NON_FINITE = Kind(
    "non-finite",
    "Values that are not finite",
    "An infinity or a NaN in the statistics or parameters spreads to all layers above and does not go away.",
    "Look at the first step with it. Try a lower learning rate, gradient clipping, or float32 for this layer.",
)
BAD_VARIANCE = Kind(
    "running-variance",
    "Running variance zero or negative",
    "Inference divides by sqrt(running variance + eps): near zero it amplifies its input, below zero it returns NaN.",
    "Recalibrate the running statistics; if they are zero again, the input of these units is constant.",
    causes=("non-finite",),
)
UNTRAINED = Kind(
    "untrained-statistics",
    "Running statistics hardly trained",
    "Inference uses the running statistics: until they have seen data, the network computes something else than in "
    "training.",
    "Train longer, or recalibrate the running statistics before inference.",
    causes=("never-updated",),
)
MOMENTUM = Kind(
    "momentum",
    "Momentum",
    "In PyTorch, momentum is the weight of the newest batch; other libraries use momentum for the weight of the old "
    "value.",
    "Use 1 minus the other library's value: TensorFlow's 0.99 is 0.01 here, the default is 0.1.",
)


def dead_units(layer: LayerData) -> Finding | None:
    """Units that are dead at the end (`quantities.dead`).

    Not reported: constant channels, gammas that grow from 0, and the zero initialization of an untrained checkpoint.
    """
    return None if is_fresh(layer) else _lost(layer, DEAD, "dead")


def constant_channels(layer: LayerData) -> Finding | None:
    """Units whose output hardly varies at the end and whose beta is not near 0."""
    return _lost(layer, CONSTANT, "flat")


def _lost(layer: LayerData, kind: Kind, flag: str) -> Finding | None:
    """Units with this flag at the end. The severity follows the share of constant and dead units together."""
    first = layer.lasting(layer[flag])
    lost = (first >= 0) & ~_rising(layer, first)
    shifted: Mask = ((layer["flat"][-1:] == 1) & (np.abs(layer["beta"][-1:]) >= CONSTANT_BETA)).any(axis=0)
    units = np.flatnonzero(lost & (shifted if kind is CONSTANT else ~shifted))
    if not len(units):
        return None
    rows = [int(row) for row in first[units]]
    text = f"{layer.counted(units)} {'constant' if kind is CONSTANT else 'dead'}{layer.since_words(rows)}"
    return layer.finding(kind, _severity_of(float(lost.mean())), text, len(units) / layer.units, units, max(rows))


def _severity_of(share: float) -> Severity:
    return "error" if share >= HALF else "warning" if share >= MANY else "note"


def non_finite(layer: LayerData) -> Finding | None:
    """Parameters or statistics that are not finite; in a training, a NaN after a finite value or in a step that ran.

    If they are finite again at the end, it is a note. Gradients do not count: with mixed precision they overflow
    regularly, and the step is skipped.
    """
    bad = np.zeros((layer.rows, layer.units), bool)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        values = layer[name]
        if np.isfinite(values).all():
            continue
        at_rest = layer.steps is None and name in layer.arrays
        known_before = at_rest | np.logical_or.accumulate(np.isfinite(values))
        bad |= np.isinf(values) | (np.isnan(values) & known_before)
    ran = layer["count"] > 0
    for name in ("mean", "var"):
        bad |= np.isinf(layer[name]) | (np.isnan(layer[name]) & ran)
    rows = np.flatnonzero(bad.any(axis=1))
    if not len(rows):
        return None
    units = np.flatnonzero(bad.any(axis=0))
    severity: Severity = "error"
    text = f"{layer.counted(units)} not finite{layer.since_words([int(rows[0])])}"
    if not bad[-1].any():
        severity = "note"
        text = f"{layer.counted(units)} not finite in {plural(len(rows), 'recorded step')}, finite again at the end"
    return layer.finding(NON_FINITE, severity, text, float(len(units)), units, rows[0])


def running_variance(layer: LayerData) -> Finding | None:
    """Running variances at or below 0 at the end.

    Below 0 is always wrong. At 0 the input is constant, as after a dead unit; working networks have a few of those.
    """
    var = layer["running_var"][-1:].ravel()
    negative, zero = np.flatnonzero(np.isfinite(var) & (var < 0)), np.flatnonzero(var == 0)
    units = negative if len(negative) else zero
    if not len(units):
        return None
    lowest = float(var[units].min())
    severity = "error" if len(negative) else _severity_of(len(units) / layer.units)
    text = f"running variance {lowest:.3g} in {layer.counted(units)}"
    return layer.finding(BAD_VARIANCE, severity, text, lowest, units)


def untrained_statistics(layer: LayerData) -> Finding | None:
    """Running statistics at exactly mean 0 and variance 1; or, early in a training, still mostly those by momentum."""
    mean = layer["running_mean"][-1:]
    if not mean.size or not np.isfinite(mean).all():
        return None
    if at_start(layer):
        text = f"running mean 0 and variance 1: never updated{why_at_start(layer)}"
        return layer.finding(UNTRAINED, "warning", text, 1.0)
    momentum = layer.settings.get("momentum")
    if layer.steps is None or not isinstance(momentum, float) or not 0 < momentum < 1:
        return None
    batches = np.nanmedian(layer["batches"]) if np.isfinite(layer["batches"]).any() else 1.0
    weight = (1 - momentum) ** ((int(layer.steps[-1]) + 1) * max(float(batches), 1.0))
    if weight <= STARTING_WEIGHT:
        return None
    text = f"{100 * weight:.0f}% of the running statistics are still the initial mean 0 and variance 1"
    return layer.finding(UNTRAINED, "note", text, weight)


def momentum_convention(layer: LayerData) -> Finding | None:
    """Momentum 0 (never updated) or at least 0.5 (another library's convention). None (cumulative average) is fine.

    Not reported: momentum 0 with initial statistics, for which `untrained_statistics` names the momentum.
    """
    value = layer.settings.get("momentum")
    if not isinstance(value, int | float) or 0 < value < MOMENTUM_HIGH or (value == 0 and at_start(layer)):
        return None
    if not np.isfinite(layer["running_mean"]).any():
        return None
    effect = "the running statistics never move" if value == 0 else "the running statistics follow single batches"
    return layer.finding(MOMENTUM, "warning", f"momentum {value:g}: {effect}", float(value))


RULES: tuple[Rule, ...] = (
    non_finite,
    running_variance,
    dead_units,
    constant_channels,
    untrained_statistics,
    momentum_convention,
)


def at_start(layer: LayerData) -> bool:
    """Whether the running statistics are exactly mean 0 and variance 1 in every unit."""
    mean, var = layer["running_mean"][-1:], layer["running_var"][-1:]
    return bool(mean.size and (mean == 0).all() and (var == 1).all())


def why_at_start(layer: LayerData) -> str:
    """The end of a sentence about initial statistics: the reason, if the settings show one."""
    return ", as momentum is 0" if layer.settings.get("momentum") == 0 else ""


def starting_share(layer: LayerData) -> float:
    """The weight (1 - momentum)^batches of the initial values in the running statistics; 0 if unknown.

    Also 0 if a variance is below this weight: an average with the initial 1 cannot be, so it was recalibrated.
    """
    if at_start(layer):
        return 1.0
    batches = layer.settings.get("batches")
    momentum = layer.settings.get("momentum", DEFAULT_MOMENTUM if layer.settings.get("stored") else None)
    if not batches or batches < 0 or not isinstance(momentum, int | float) or not 0 < momentum < 1:
        return 0.0
    share = float((1 - momentum) ** batches)
    return 0.0 if bool((layer["running_var"] < share).any()) else share


def is_fresh(layer: LayerData) -> bool:
    """Whether all gammas and betas of a checkpoint's layer are 0 because no training has moved them yet.

    Residual networks often initialize the last gamma of a block to 0. The running statistics then have their initial
    values, except for a few batches that infer shapes.
    """
    untouched = layer.steps is None and bool((layer["gamma"] == 0).all() and (layer["beta"] == 0).all())
    return untouched and starting_share(layer) > STARTING_WEIGHT


def _rising(layer: LayerData, first: Rows) -> Mask:
    """Units that are flat from the first row on while gamma grows, as in residual blocks that start at gamma = 0."""
    gamma = np.abs(layer["gamma"])
    if len(gamma) < 2:
        return np.zeros(layer.units, bool)
    start = np.take_along_axis(gamma, (~np.isnan(gamma)).argmax(axis=0)[None], axis=0)[0]
    rising: Mask = (first == 0) & (layer["flat"][-1] == 1) & (gamma[-1] > start)
    return rising
