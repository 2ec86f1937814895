"""What is known of one batch norm layer, what a rule finds in it, and the rules on what a layer holds.

Those rules hold for a training and a checkpoint alike; those that need the steps of a training, or a file, are in
`rules`. Thresholds are constants with their reasons; where a rule could cry wolf, its docstring says how it does not.
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
"""The gravest first. Terminal, JSON and pages show these names."""

LASTING = 3
"""A batch can be odd, and two in a row; what holds in the last three recorded steps and to the end is a state."""
LASTING_STEPS = 50
"""And it must have held over as many steps: every step of a training's beginning may be recorded, and a gamma that
passes through zero stays there for a few."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its name, why it matters and what to do about it.

    Attributes:
        slug: its name in JSON and in links, such as "dead-units".
        title: its name in words.
        why: why it matters.
        advice: what to do about it.
        causes: slugs of kinds from which this kind follows, where they are found in all the units concerned.
    """

    slug: str
    title: str
    why: str
    advice: str
    causes: tuple[str, ...] = ()

    @property
    def docs(self) -> str:
        """Where the documentation says more about it."""
        return f"docs/findings.md#{self.slug}"


@dataclass(frozen=True)
class Finding:
    """What a rule found in a layer.

    Attributes:
        kind: which rule, why it matters and what to do.
        severity: "error", "warning" or "note".
        layer: the layer's name.
        text: what was found, in words that continue after the layer's name.
        number: the number that the finding rests on.
        units: the units concerned, from 0; empty where it is the layer as a whole.
        since: the first recorded step from which it holds; None where there are no steps, as in a checkpoint.
    """

    kind: Kind
    severity: Severity
    layer: str
    text: str
    number: float
    units: tuple[int, ...] = ()
    since: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON."""
        kind = self.kind
        named = {"slug": kind.slug, "severity": self.severity, "layer": self.layer, "text": self.text}
        measured = {"number": self.number, "units": list(self.units), "since": self.since}
        return named | measured | {"why": kind.why, "advice": kind.advice, "docs": kind.docs}


@dataclass(frozen=True)
class Observed:
    """One layer: `arrays` are (rows, units) by the names that a Run has, NaN where unknown.

    A row is a recorded step (`steps`), or the only moment of a checkpoint (`steps` is None). `settings` holds eps,
    momentum and affine where they are known.
    """

    name: str
    units: int
    arrays: Mapping[str, Array]
    steps: Rows | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return 1 if self.steps is None else len(self.steps)

    @property
    def needed(self) -> int:
        """How many rows at the end make a state."""
        return 1 if self.steps is None else LASTING

    def __getitem__(self, name: str) -> Array:
        found = self.arrays.get(name)
        return np.full((self.rows, self.units), np.nan) if found is None else found

    def lasting(self, flags: Array) -> Rows:
        """Of flags (rows, n), 1, 0 or NaN where unknown: the row from which each holds to the end, or -1.

        Rows in which nothing is known (the layer did not run) are passed over. Too few rows or steps do not count.
        """
        known = np.flatnonzero(~np.isnan(flags).all(axis=1))
        if len(known) < self.needed:
            return np.full(flags.shape[1], -1)
        held = np.logical_and.accumulate(flags[known][::-1] == 1)[::-1]
        first: Rows = np.where(held.sum(axis=0) >= self.needed, known[held.argmax(axis=0)], -1)
        if self.steps is not None:
            first[self.steps[known[-1]] - self.steps[first] < LASTING_STEPS] = -1
        return first

    def found(
        self,
        kind: Kind,
        severity: Severity,
        text: str,
        number: float,
        units: Rows | None = None,
        row: int | None = None,
    ) -> Finding:
        """What a rule found here, in these `units` or in the layer as a whole, since the step of a `row`."""
        since = None if self.steps is None or row is None else int(self.steps[row])
        concerned = () if units is None else tuple(units.tolist())
        return Finding(kind, severity, self.name, text, number, concerned, since)

    def counted(self, units: Rows) -> str:
        """ "3 of 64 units"."""
        return f"{len(units):,} of {plural(self.units, 'unit')}"

    def latest(self, values: Array) -> Array:
        """The last `needed` rows (fewer, or none, where there are not so many) in which anything is known."""
        known = ~np.isnan(values).all(axis=1)
        return values[known][-self.needed :]

    def since_words(self, rows: Sequence[int]) -> str:
        """ " since step 4,200", from the rows at which units began; " from the first recorded step on"; or ""."""
        if self.steps is None:
            return ""
        first, last = int(self.steps[min(rows)]), int(self.steps[max(rows)])
        if max(rows) == 0:
            return " from the first recorded step on"
        return f" since step {last:,}" if first == last else f" since step {last:,}, the first since step {first:,}"


Rule = Callable[[Observed], Finding | None]


def found_by(rules: Sequence[Rule], layer: Observed) -> list[Finding]:
    """What these rules find in a layer, in their order. One cause is reported once.

    A finding that follows from another one is left out; the other one becomes as severe as both.
    """
    found = [finding for rule in rules if (finding := rule(layer)) is not None]
    units = [set(finding.units or range(layer.units)) for finding in found]
    left_out = set()
    for at, finding in enumerate(found):
        for cause, other in enumerate(found):
            if other.kind.slug in finding.kind.causes and units[at] <= units[cause]:
                left_out.add(at)
                severity = min(other.severity, finding.severity, key=SEVERITIES.index)
                found[cause] = replace(other, severity=severity)
                break
    return [finding for at, finding in enumerate(found) if at not in left_out]


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first; of a severity, kind by kind as they first appear; of a kind, in the order given."""
    kinds = [*dict.fromkeys(finding.kind.slug for finding in findings)]
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), kinds.index(f.kind.slug)))


LISTED = 5
NAME = 60


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Kind by kind: its first few layers, then why it matters and what to do."""
    if not findings:
        yield "No findings."
    for _, group in groupby(findings, key=lambda finding: (finding.severity, finding.kind)):
        found = list(group)
        kind = found[0].kind
        yield f"{found[0].severity}: {kind.title.lower()} ({kind.slug})"
        texts = [*dict.fromkeys(finding.text for finding in found)]
        for text in texts[:LISTED]:
            names = [shortened(f.layer, NAME) for f in found if f.text == text and f.layer]
            if len(names) > 3:
                names = [f"{names[0]}, {names[1]} … {names[-1]} ({len(names)} layers)"]
            yield f"  {', '.join(names)}: {text}" if names else f"  {text}"
        if len(texts) > LISTED:
            yield f"  and in {plural(sum(finding.text not in texts[:LISTED] for finding in found), 'more layer')}"
        yield f"  {kind.why} {kind.advice}"


MANY = 0.05
"""Networks lose single units without harm; one in twenty is worth a look."""
HALF = 0.5

CONSTANT_BETA = 0.1
"""A shift that a following layer can feel."""

MOMENTUM_HIGH = 0.5
"""Above it, the running statistics are mostly the last batch's. TensorFlow's 0.99 is PyTorch's 0.01."""

STARTING_WEIGHT = 0.05
"""How much of the running statistics may still be their start (mean 0, variance 1)."""
DEFAULT_MOMENTUM = 0.1
"""PyTorch's, for a checkpoint, which does not store it."""

DEAD = Kind(
    "dead-units",
    "Dead units",
    "They pass on nothing that depends on the input: their weights no longer learn, or what they learn is not used.",
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
    "An infinity or a NaN in the statistics or parameters spreads to everything above it and does not go away.",
    "Look at the first step with it: a lower learning rate, gradient clipping, or float32 for this layer.",
)
BAD_VARIANCE = Kind(
    "running-variance",
    "Running variance zero or negative",
    "Inference divides by sqrt(running variance + eps): near zero it blows up what arrives, below zero it gives NaN.",
    "Recalibrate the running statistics; where they are zero again, the input of these units is constant.",
    causes=("non-finite",),
)
UNTRAINED = Kind(
    "untrained-statistics",
    "Running statistics hardly trained",
    "Inference uses the running statistics: until they have seen data, the network is another one than in training.",
    "Train on, or recalibrate the running statistics before inference.",
    causes=("never-updated",),
)
MOMENTUM = Kind(
    "momentum",
    "Momentum",
    "In PyTorch, momentum is the weight of the newest batch; other libraries name the weight of the past so.",
    "Use 1 minus the other library's value: TensorFlow's 0.99 is 0.01 here, the default is 0.1.",
)


def dead_units(layer: Observed) -> Finding | None:
    """Units dead to the end, as `quantities.dead` has it. Not: constant channels, gammas on their way up from 0, and
    gammas that a network at rest still has from a zero initialization."""
    return None if is_fresh(layer) else _lost(layer, DEAD, "dead")


def constant_channels(layer: Observed) -> Finding | None:
    """Units whose output hardly varies to the end, where beta is not near 0."""
    return _lost(layer, CONSTANT, "flat")


def _lost(layer: Observed, kind: Kind, flag: str) -> Finding | None:
    """Units with this flag to the end, constant or dead. The severity follows the share of all of them."""
    first = layer.lasting(layer[flag])
    lost = (first >= 0) & ~_rising(layer, first)
    shifted: Mask = ((layer["flat"][-1:] == 1) & (np.abs(layer["beta"][-1:]) >= CONSTANT_BETA)).any(axis=0)
    units = np.flatnonzero(lost & (shifted if kind is CONSTANT else ~shifted))
    if not len(units):
        return None
    rows = [int(row) for row in first[units]]
    text = f"{layer.counted(units)} {'constant' if kind is CONSTANT else 'dead'}{layer.since_words(rows)}"
    return layer.found(kind, _graded(float(lost.mean())), text, len(units) / layer.units, units, max(rows))


def _graded(share: float) -> Severity:
    """How grave it is that this share of a layer's units is lost."""
    return "error" if share >= HALF else "warning" if share >= MANY else "note"


def non_finite(layer: Observed) -> Finding | None:
    """Parameters or statistics at rest; in a training a NaN where there was a number before, or under a count.

    What was overcome is a note. Gradients are left out: mixed precision overflows on purpose and skips the step.
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
    return layer.found(NON_FINITE, severity, text, float(len(units)), units, rows[0])


def running_variance(layer: Observed) -> Finding | None:
    """Running variances at or below 0 at the end. Below is always wrong; at 0 a unit's input is constant, as a dead
    unit's below is, which single units are in networks that work."""
    var = layer["running_var"][-1:].ravel()
    negative, zero = np.flatnonzero(np.isfinite(var) & (var < 0)), np.flatnonzero(var == 0)
    units = negative if len(negative) else zero
    if not len(units):
        return None
    lowest = float(var[units].min())
    severity = "error" if len(negative) else _graded(len(units) / layer.units)
    return layer.found(
        BAD_VARIANCE, severity, f"running variance {lowest:.3g} in {layer.counted(units)}", lowest, units
    )


def untrained_statistics(layer: Observed) -> Finding | None:
    """Still exactly mean 0 and variance 1 in every unit; or, early in a training, largely so by their momentum."""
    mean = layer["running_mean"][-1:]
    if not mean.size or not np.isfinite(mean).all():
        return None
    if at_start(layer):
        text = f"running mean 0 and variance 1: never updated{why_at_start(layer)}"
        return layer.found(UNTRAINED, "warning", text, 1.0)
    momentum = layer.settings.get("momentum")
    if layer.steps is None or not isinstance(momentum, float) or not 0 < momentum < 1:
        return None
    batches = np.nanmedian(layer["batches"]) if np.isfinite(layer["batches"]).any() else 1.0
    weight = (1 - momentum) ** ((int(layer.steps[-1]) + 1) * max(float(batches), 1.0))
    if weight <= STARTING_WEIGHT:
        return None
    text = f"{100 * weight:.0f}% of the running statistics are still their start, mean 0 and variance 1"
    return layer.found(UNTRAINED, "note", text, weight)


def momentum_convention(layer: Observed) -> Finding | None:
    """0: never updated; 0.5 and more: another library's convention. None (a cumulative average) is fine.

    Not: 0 over statistics at their start, of which `untrained_statistics` says that momentum is the reason.
    """
    value = layer.settings.get("momentum")
    if not isinstance(value, int | float) or 0 < value < MOMENTUM_HIGH or (value == 0 and at_start(layer)):
        return None
    if not np.isfinite(layer["running_mean"]).any():
        return None
    means = "the running statistics never move" if value == 0 else "the running statistics follow single batches"
    return layer.found(MOMENTUM, "warning", f"momentum {value:g}: {means}", float(value))


RULES: tuple[Rule, ...] = (
    non_finite,
    running_variance,
    dead_units,
    constant_channels,
    untrained_statistics,
    momentum_convention,
)


def at_start(layer: Observed) -> bool:
    """Whether the running statistics are exactly mean 0 and variance 1 in every unit."""
    mean, var = layer["running_mean"][-1:], layer["running_var"][-1:]
    return bool(mean.size and (mean == 0).all() and (var == 1).all())


def why_at_start(layer: Observed) -> str:
    """For a sentence about statistics at their start: the reason, where the settings show one."""
    return ", as momentum is 0" if layer.settings.get("momentum") == 0 else ""


def starting_share(layer: Observed) -> float:
    """Of a layer at rest: (1 - momentum)^batches of its running statistics is their start; 0 where that is unknown.

    0 also where a variance lies below that share of the start's 1, which no average from there can reach: the
    statistics were recalibrated.
    """
    if at_start(layer):
        return 1.0
    batches = layer.settings.get("batches")
    momentum = layer.settings.get("momentum", DEFAULT_MOMENTUM if layer.settings.get("stored") else None)
    if not batches or batches < 0 or not isinstance(momentum, int | float) or not 0 < momentum < 1:
        return 0.0
    share = float((1 - momentum) ** batches)
    return 0.0 if bool((layer["running_var"] < share).any()) else share


def is_fresh(layer: Observed) -> bool:
    """Whether gamma and beta of a layer at rest are 0 because no training has moved them yet.

    Residual networks often initialize the last gamma of a block to 0. All gammas and betas are then exactly 0, and the
    running statistics are at their start, but for a few batches that infer shapes. Training moves all of them.
    """
    untouched = layer.steps is None and bool((layer["gamma"] == 0).all() and (layer["beta"] == 0).all())
    return untouched and starting_share(layer) > STARTING_WEIGHT


def _rising(layer: Observed, first: Rows) -> Mask:
    """Units whose gamma was near 0 from the first row on, and grows: residual blocks often begin with gamma = 0."""
    gamma = np.abs(layer["gamma"])
    if len(gamma) < 2:
        return np.zeros(layer.units, bool)
    start = np.take_along_axis(gamma, (~np.isnan(gamma)).argmax(axis=0)[None], axis=0)[0]
    rising: Mask = (first == 0) & (layer["flat"][-1] == 1) & (gamma[-1] > start)
    return rising
