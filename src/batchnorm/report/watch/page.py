"""Watched trainings -> the page as data: what it says and shows, before any HTML. Tests assert on this."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.checks.findings import SEVERITIES, Finding, Kind
from batchnorm.quantities import CLASS_DEFINITIONS
from batchnorm.report.definitions import CLASS, DEFINITIONS, Definition
from batchnorm.report.page import (
    Bar,
    BarGroup,
    Facts,
    Lead,
    Page,
    grouped,
    ran,
    undone_number,
)
from batchnorm.report.watch.answer import QUESTION
from batchnorm.report.watch.payload import COLOURS, payload
from batchnorm.report.watch.rows import COLUMNS, RUN_COLUMNS, TEXTS, Summary
from batchnorm.runs.run import Run, RunError, write_text_atomically
from batchnorm.verdict import ClassCounts
from batchnorm.words import count, plural, shortened

# Told otherwise than in a study, which measures on the same rows at every step and sees what the layers return.
_OTHERWISE = {
    "drift in, drift out": Definition(
        "drift in, drift out",
        "per step |Δmean|/s and |Δlog s|; |Δbeta|/|gamma| and |Δlog|gamma||",
        "How far the distribution moved per step since the recorded step before, in location and in scale. The input's "
        "is between two batches and holds their sampling noise, too; the output's is what gamma and beta set.",
        "0 or more; 0 for the output where gamma and beta are held fixed",
    ),
    "dead": Definition(
        "dead",
        f"{CLASS_DEFINITIONS['dead']}; with ReLU or ReLU6 also: no gradient at y although other units of the layer "
        "have one",
        "Units that pass on nothing which depends on the input. Behind a ReLU, no gradient over a whole batch means "
        "that none of the unit's outputs was above 0; where the activation is not inside of the layer, it is taken for "
        "a ReLU.",
        "0 or 1; as a share 0 to 1",
    ),
    "class": Definition(
        CLASS.name,
        CLASS.formula,
        f"{CLASS.meaning} At the last step of a recording that was closed, mean and var are the running ones: the "
        "model as it was left, in inference.",
        CLASS.values,
        CLASS.cases,
    ),
}

OF_TRAINING = (
    *(_OTHERWISE.get(definition.name, definition) for definition in DEFINITIONS),
    Definition(
        "train/eval gap",
        "sqrt(((mean - running_mean)/r)² + (s/r - 1)²), r = sqrt(running_var + eps)",
        "How far inference would be from training on this batch: the root mean square of the difference of the "
        "outputs, in units of |gamma|.",
        "0 or more; about sqrt(1.5/m) by sampling alone, for independent normal values",
    ),
    Definition(
        "effective learning rate",
        "lr/‖w‖², with w the weights that produce the unit",
        "Behind a norm only the direction of w matters, not its length: this is how fast gradient descent turns it.",
        "0 or more; unknown where the weights are not known",
    ),
    Definition(
        "covariate shift",
        "‖G − G′‖, G the gradient of the weights below a layer, G′ the same after the layers below have been updated",
        "How much the update of the layers below changes what a layer is told (Santurkar et al., 2018). Measured by "
        "probes with a loss.",
        "0 or more; the cosine between G and G′ is -1 to 1",
    ),
    Definition(
        "typical unit, band",
        "the median over a layer's units; the 15th to the 85th percentile over them",
        "What lines and bands show.",
        "as the quantity",
    ),
)


IN_SHORT: Mapping[str, str] = {
    "yes": "gamma and beta undo batch normalization",
    "no": "gamma and beta do not undo batch normalization",
    "partly": "gamma and beta undo it in part",
    "dead": "most units are dead",
    "nothing to undo": "there is little to undo",
    "unknown": "most numbers are not finite",
    "too early": "it is too early to tell",
    "no affine": "there is no gamma and beta",
    "no layer": "no layer was recorded",
}


@dataclass(frozen=True)
class Entry:
    """A finding's line: where it is, in which run, and the layer's place on the page."""

    finding: Finding
    label: str
    place: int

    @property
    def where(self) -> str:
        return shortened(self.finding.layer, 60)


@dataclass(frozen=True)
class Group:
    """All findings of one kind and severity."""

    kind: Kind
    severity: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class WatchPage(Page):
    """The page of one or several watched trainings. `layers` names each layer once, whichever runs have it."""

    template = "watch"
    scripts = ("heatmap", "watch")
    run_columns = RUN_COLUMNS
    layer_columns = COLUMNS
    text_columns = TEXTS
    links = (
        ("findings", "Findings"),
        ("map", "All layers over time"),
        ("layer", "One layer"),
        ("logged", "What was logged"),
    )

    runs: tuple[Summary, ...]
    layers: tuple[str, ...]
    findings: tuple[Group, ...]

    @staticmethod
    def colour(place: int) -> str:
        """The colour of the run at this place."""
        return COLOURS[place % len(COLOURS)]

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    @property
    def logged(self) -> tuple[str, ...]:
        """Names that were logged, in order of first appearance."""
        return tuple(dict.fromkeys(name for run in self.runs for name, _ in run.row.logged))

    def data(self) -> dict[str, Any]:
        return payload(self.runs, self.layers, self.logged)


def build(runs: Sequence[Summary]) -> WatchPage:
    """The page of one or several watched Runs, whatever of them there is."""
    layers = tuple(dict.fromkeys(layer.name for run in runs for layer in run.reading.layers))
    several = len(runs) > 1
    return WatchPage(
        title=QUESTION,
        subtitle=_subtitle(runs),
        notices=tuple(notice for each in runs for notice in _notices(each, several)),
        lead=_lead(runs) if several else runs[0].answer.lead,
        headline=_headline(runs) if several else runs[0].answer.headline,
        parts=() if several else runs[0].answer.parts,
        runs=tuple(runs),
        layers=layers,
        findings=tuple(_groups(runs, layers)),
        definitions=OF_TRAINING,
        provenance=tuple(facts for each in runs for facts in _provenance(each, several)),
    )


def _lead(runs: Sequence[Summary]) -> Lead:
    """What several runs agree in, with a bar for each."""
    words = {run.answer.lead.word for run in runs}
    whole = ClassCounts.total_of(run.answer.classes for run in runs)
    bars = tuple(Bar(run.label, run.answer.classes) for run in runs)
    label = f"of {plural(whole.units, 'unit')} in {plural(len(runs), 'run')} are undone"
    word = words.pop() if len(words) == 1 else "The runs differ"
    return Lead(QUESTION, word, undone_number(whole), label, (BarGroup("", bars),))


def _headline(runs: Sequence[Summary]) -> str:
    """What several runs agree in, or that they differ."""
    verdicts = {run.answer.verdict for run in runs}
    if len(verdicts) == 1:
        every = "both" if len(runs) == 2 else f"all {count(len(runs))}"
        return f"In {every} runs {IN_SHORT[verdicts.pop()]}."
    each = "; ".join(f"in {run.label} {IN_SHORT[run.answer.verdict]}" for run in runs)
    return f"The runs differ: {each}."


def _subtitle(runs: Sequence[Summary]) -> str:
    if len(runs) > 1:
        return f"{count(len(runs))} watched trainings: {', '.join(shortened(run.label, 30) for run in runs[:6])}"
    run = runs[0]
    model = shortened(str(run.reading.run.info.get("model", "a network")))
    last = "no step yet" if run.row.step is None else f"to step {count(run.row.step)}"
    snapshots = count(len(run.reading.steps))
    return (
        f"{run.label}: {model}, {plural(run.row.layers, 'layer')}, {plural(run.row.units, 'unit')}, {last} "
        f"in {snapshots} snapshots"
    )


def _notices(run: Summary, several: bool) -> list[str]:
    info, reading = run.reading.run.info, run.reading
    reached = "no step" if reading.last_step is None else f"step {count(reading.last_step)}"
    head = f"{run.label}: " if several else ""
    words = {
        "running": f"The training is still running, or was killed: recorded up to {reached}.",
        "interrupted": f"The training was interrupted: recorded up to {reached}.",
        "failed": f"The training failed: recorded up to {reached}.",
    }
    notices = [f"{head}{words[reading.status]}"] if reading.status in words else []
    errors = _listed(info.get("errors"))
    notices += [f"{head}While recording: {shortened(str(error), 300)}" for error in errors[:5]]
    if len(errors) > 5:
        notices.append(f"{head}and {count(len(errors) - 5)} more errors while recording, in run.json.")
    skipped = _listed(info.get("skipped"))
    if skipped:
        were = "was" if len(skipped) == 1 else "were"
        layers = plural(len(skipped), "batch norm layer")
        notices.append(f"{head}{layers} {were} not watched: see the end of the page for the reason.")
    return notices


def _groups(runs: Sequence[Summary], layers: Sequence[str]) -> list[Group]:
    """By severity, then by kind as they first appear; within, run by run in the model's order."""
    place = {name: at for at, name in enumerate(layers)}
    entries = [Entry(finding, run.label, place[finding.layer]) for run in runs for finding in run.reading.findings]
    keys = dict.fromkeys((entry.finding.severity, entry.finding.kind) for entry in entries)
    ordered = sorted(keys, key=lambda key: SEVERITIES.index(key[0]))
    return [
        Group(kind, severity, tuple(e for e in entries if (e.finding.severity, e.finding.kind) == (severity, kind)))
        for severity, kind in ordered
    ]


def _provenance(run: Summary, several: bool) -> list[Facts]:
    info = run.reading.run.info
    training = ran(info, "model", "status", "started", "ended")
    recording = {
        "schedule": info.get("schedule"),
        "snapshots": count(len(run.reading.steps)),
        "a step is": _step_words(info.get("counted")),
        "steps counted": info.get("steps"),
        "processes": info.get("processes"),
        "errors": len(_listed(info.get("errors"))) or None,
    }
    skipped = {
        shortened(str(entry.get("name")), 120): f"{entry.get('class')}: {entry.get('why')}"
        for entry in _listed(info.get("skipped"))
        if isinstance(entry, Mapping)
    }
    groups: dict[str, Any] = {"Training": training, "Recording": recording, "Not watched": skipped}
    groups |= {"Versions": info.get("versions"), "Machine": info.get("machine")}
    head = f"{run.label}: " if several else ""
    return [Facts(f"{head}{facts.title}", facts.entries) for facts in grouped(groups)]


def _step_words(counted: Any) -> str:
    known = {"optimizer": "a step() of the optimizer", "forwards": "a training forward of the model"}
    return known.get(str(counted), "not known yet")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


Signature = tuple[tuple[str, int, int], ...]


def follow(
    folders: Sequence[Path],
    write: Callable[[list[Run], int | None], Path],
    seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """`write(runs, refresh)` the page, and again whenever a Run has new files, until none is running.

    Looks every `seconds`; an open page loads itself again as often (`refresh`, in whole seconds), until it is written
    for the last time. Ctrl-C (KeyboardInterrupt) leaves a page that does not load itself again.
    """
    seen: Signature | None = None
    written = None
    try:
        while True:
            now = signature(folders)
            runs = [Run.open(folder) for folder in folders]
            if now != seen:
                running = any(run.info.get("status") == "running" for run in runs)
                written, seen = write(runs, max(1, round(seconds)) if running else None), now
                if not running:
                    return
            sleep(seconds)
    except (KeyboardInterrupt, RunError):
        if written is not None:
            still(written)
        raise


def signature(folders: Sequence[Path]) -> Signature:
    """Which files the Runs consist of, how large and how old: cheap to ask, and another when anything was added."""
    found = []
    for folder in folders:
        try:
            entries = [*sorted(folder.glob("*.parquet")), folder / "run.json"]
            for entry in entries:
                status = entry.stat()
                found.append((str(entry), status.st_size, status.st_mtime_ns))
        except OSError:  # removed in between: Run.open raises
            continue
    return tuple(found)


def still(page: Path) -> None:
    """The same page without its loading itself again."""
    lines = page.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if not line.startswith('<meta name="reload"')]
    write_text_atomically(page, "\n".join(kept))
