"""Findings in lines of text, kind by kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from batchnorm.checks.findings import Finding
from batchnorm.words import plural, shortened

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
