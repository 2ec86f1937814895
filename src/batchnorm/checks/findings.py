"""What is known of one batch norm layer, and what a rule finds in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchnorm.words import plural, shortened

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
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

    def step(self, row: int) -> int | None:
        """The recorded step of a row."""
        return None if self.steps is None else int(self.steps[row])

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
    left_out: set[int] = set()
    for at, finding in enumerate(found):
        cause = _cause(finding, found, layer.units)
        if cause is not None:
            left_out.add(at)
            severity = min(found[cause].severity, finding.severity, key=SEVERITIES.index)
            found[cause] = replace(found[cause], severity=severity)
    return [finding for at, finding in enumerate(found) if at not in left_out]


def _cause(finding: Finding, found: Sequence[Finding], units: int) -> int | None:
    """The position of the finding that this one follows from."""
    concerned = set(finding.units or range(units))
    for at, other in enumerate(found):
        if other.kind.slug in finding.kind.causes and concerned <= set(other.units or range(units)):
            return at
    return None


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first; of a severity, kind by kind as they first appear; of a kind, in the order given."""
    kinds = [*dict.fromkeys(finding.kind.slug for finding in findings)]
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), kinds.index(f.kind.slug)))


def indices(units: Iterable[int]) -> tuple[int, ...]:
    """The units of a finding, from any array of them."""
    return tuple(int(unit) for unit in units)


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
            yield f"  {_listed(names)}: {text}" if names else f"  {text}"
        if len(texts) > LISTED:
            yield f"  and in {plural(sum(finding.text not in texts[:LISTED] for finding in found), 'more layer')}"
        yield f"  {kind.why} {kind.advice}"


def _listed(names: Sequence[str]) -> str:
    """The first two and the last of many."""
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} … {names[-1]} ({len(names)} layers)"
