"""One layer's data (`Observed`), what a rule finds in it (`Finding`), and the text of findings."""

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
"""One or two odd batches are chance. A state holds in at least the last three recorded steps."""
LASTING_STEPS = 50
"""And over this many steps: early on every step may be recorded, and a gamma that crosses zero stays near it for a
few."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its name, why it matters and what to do about it.

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
        kind: which rule, why it matters and what to do.
        severity: "error", "warning" or "note".
        layer: the layer's name.
        text: the finding in words that continue after the layer's name.
        number: the number that the finding rests on.
        units: the units concerned, from 0; empty for the whole layer.
        since: the first recorded step from which it holds; None without steps, as in a checkpoint.
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
        fields = {name: getattr(self, name) for name in ("severity", "layer", "text", "number", "units", "since")}
        kind = self.kind
        about = {"why": kind.why, "advice": kind.advice, "docs": f"docs/findings.md#{kind.slug}"}
        return {"slug": kind.slug, **fields, "units": list(self.units), **about}


@dataclass(frozen=True)
class Observed:
    """One layer: `arrays` (rows, units) by the names of a Run's columns, NaN where unknown.

    A row is a recorded step; a checkpoint has one row, and `steps` is None. `settings` has eps, momentum and affine if
    they are known.
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
        """Per column of flags (rows, n), which are 1, 0 or NaN: the row from which it is 1 to the end, or -1.

        Rows of NaN (the layer did not run) are skipped. Too few rows or steps do not count.
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
        """ "3 of 64 units"."""
        return f"{len(units):,} of {plural(self.units, 'unit')}"

    def since_words(self, rows: Sequence[int]) -> str:
        """ " since step 4,200" for the rows at which units began; " from the first recorded step on"; or ""."""
        if self.steps is None:
            return ""
        first, last = int(self.steps[min(rows)]), int(self.steps[max(rows)])
        if max(rows) == 0:
            return " from the first recorded step on"
        return f" since step {last:,}" if first == last else f" since step {last:,}, the first since step {first:,}"


Rule = Callable[[Observed], Finding | None]


def found_by(rules: Sequence[Rule], layer: Observed) -> list[Finding]:
    """Apply rules to a layer, in their order. One cause is reported once.

    A finding that follows from another is dropped; the other gets the higher severity of both.
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
    """Lines of text: per kind its first few layers, then why it matters and what to do."""
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
