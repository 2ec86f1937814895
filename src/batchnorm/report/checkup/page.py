"""A check-up -> the page as data: what it says and shows, before any HTML. Tests assert on this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from batchnorm.checks.check import Checkup
from batchnorm.checks.explain import COLUMNS, Row, origins
from batchnorm.checks.findings import Finding, Kind, Observed
from batchnorm.quantities import CLASSES, position_in, position_out
from batchnorm.report.checkup import charts
from batchnorm.report.definitions import DEFINITIONS, Definition
from batchnorm.report.lead import Bar, BarGroup, Lead, undone_number
from batchnorm.report.parts import Part
from batchnorm.report.provenance import Facts, grouped
from batchnorm.report.study.panels import Panel
from batchnorm.runs.provenance import provenance
from batchnorm.verdict import CLASS_NAMES, WORDS
from batchnorm.words import count, plural, shortened

TITLE = "The batch norm layers of a checkpoint"
TOLD = ("class", "undo_distance", "undo_index", "undo_angle, bare_angle", "position in, position out")
UNITS = 20_000
"""Units in the table: a page with more of them opens slowly."""
LISTED_UNITS = 12


@dataclass(frozen=True)
class Group:
    """All findings of one kind and severity."""

    kind: Kind
    severity: str
    findings: tuple[Finding, ...]

    def units(self, finding: Finding) -> str:
        """The units of a finding, as far as they fit in a line."""
        shown = ", ".join(str(unit) for unit in finding.units[:LISTED_UNITS])
        return f"{shown}, …" if len(finding.units) > LISTED_UNITS else shown


@dataclass(frozen=True)
class CheckPage:
    """Everything the page shows, in its order."""

    title: str
    subtitle: str
    notices: tuple[str, ...]
    healthy: Lead
    lead: Lead
    headline: str
    parts: tuple[Part, ...]
    findings: tuple[Group, ...]
    columns: tuple[str, ...]
    origin: tuple[tuple[int, str], ...]
    layers: tuple[Row, ...]
    panels: tuple[Panel, ...]
    units: dict[str, Any]
    definitions: tuple[Definition, ...]
    provenance: tuple[Facts, ...]


def build(found: Checkup) -> CheckPage:
    """The page of a check-up."""
    network = found.network
    units = sum(layer.units for layer in network.layers)
    notices = []
    if units > UNITS:
        notices.append(f"The table of units shows the first {UNITS:,} of {units:,}.")
    about = {
        "source": shortened(network.source, 200),
        "format": network.format,
        "bytes": None if network.size is None else f"{network.size:,}",
        "tensors": f"{network.tensors:,}",
        "batch norm layers": f"{len(network.layers):,}",
        "units": f"{units:,}",
    }
    return CheckPage(
        title=TITLE,
        subtitle=f"{shortened(network.source, 80)}: {network.format}, {plural(len(network.layers), 'layer')}",
        notices=tuple(notices),
        healthy=_healthy(found),
        lead=_lead(found),
        headline=found.headline[0].upper() + found.headline[1:] + ".",
        parts=_parts(found),
        findings=tuple(_groups(found.findings)),
        columns=COLUMNS,
        origin=origins(found.explanation.rows),
        layers=found.explanation.rows,
        panels=charts.panels(network.layers, found.explanation.rows),
        units=_units(network.layers),
        definitions=tuple(each for each in DEFINITIONS if each.name in TOLD),
        provenance=tuple(grouped({"What was checked": about, "Versions": provenance(())["versions"]})),
    )


def _healthy(found: Checkup) -> Lead:
    errors = found.count("error")
    if errors:
        label = f"found: {found.counted}"
    else:
        label = f"errors; found: {found.counted}" if found.findings else "errors: no rule found anything"
    return Lead("Are they healthy?", "No" if errors else "Yes", count(errors), label)


def _lead(found: Checkup) -> Lead:
    told = found.explanation
    bars = tuple(Bar(row.layer, row.classes) for row in told.rows if row.classes.units)
    label = f"of {plural(told.classes.units, 'unit')} are undone, by the running statistics"
    question = "Do gamma and beta undo it?"
    return Lead(question, WORDS[told.verdict], undone_number(told.classes), label, (BarGroup("", bars),))


def _parts(found: Checkup) -> tuple[Part, ...]:
    told = found.explanation
    gravest = found.findings[0] if found.findings else None
    if gravest is None:
        sick = Part("Are they healthy?", "Yes", "no rule found anything", ())
    else:
        where = f"`{shortened(gravest.layer, 60)}`: " if gravest.layer else ""
        words = (f"The most serious: {where}{gravest.text}.", gravest.kind.advice)
        sick = Part("Are they healthy?", "Yes" if found.healthy else "No", f"with {found.counted}", words)
    sentences = tuple(filter(None, (told.headline, told.scale_free)))
    undone = Part("Do gamma and beta undo it?", WORDS[told.verdict], "by the running statistics", sentences)
    return sick, undone


def _groups(findings: Sequence[Finding]) -> list[Group]:
    grouped_findings = groupby(findings, key=lambda finding: (finding.kind, finding.severity))
    return [Group(kind, severity, tuple(found)) for (kind, severity), found in grouped_findings]


def _units(layers: Sequence[Observed]) -> dict[str, Any]:
    """The table of units, column by column, as the page's script wants it."""
    columns: dict[str, list[Any]] = {name: [] for name in charts.UNIT_COLUMNS}
    for at, layer in enumerate(layers):
        mean, var, gamma, beta = (layer[name][-1] for name in ("running_mean", "running_var", "gamma", "beta"))
        eps = float(layer.settings["eps"])
        rows = {
            "layer": [at] * layer.units,
            "unit": range(layer.units),
            "gamma": gamma,
            "beta": beta,
            "running_mean": mean,
            "running_var": var,
            "class": _codes(layer),
            **{name: layer[name][-1] for name in ("undo_index", "undo_angle", "bare_angle")},
            "position_in": position_in(mean, var, eps),
            "position_out": position_out(gamma, beta),
        }
        for name, values in rows.items():
            columns[name] += [charts.plain(value) for value in values]
        if len(columns["unit"]) >= UNITS:
            break
    shown = [
        {"name": name, "header": header, "numeric": name not in ("layer", "class")}
        for name, header in charts.UNIT_COLUMNS.items()
    ]
    names = {"layer": [shortened(layer.name, 80) for layer in layers], "class": [*CLASS_NAMES.values()]}
    return {"columns": shown, "values": {k: v[:UNITS] for k, v in columns.items()}, "names": names}


def _codes(layer: Observed) -> list[int]:
    """Of each unit the position of its class in CLASSES."""
    unknown = CLASSES.index("unknown")
    return [int(code) if code == code else unknown for code in layer["class"][-1].tolist()]
