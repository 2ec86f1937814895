"""A watched training -> the answer to "do gamma and beta undo batch normalization?", in words.

Computed from its numbers. Nothing is claimed of a layer whose gamma and beta still stand about where they were set:
gamma = 1 and beta = 0 is an undo_index of 0 whatever the network would learn. Figures of several layers pool units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchnorm.quantities import CLASSES
from batchnorm.report.page import Bar, BarGroup, Lead, Part
from batchnorm.report.watch.numbers import Array, LayerReading, Reading, median, read
from batchnorm.runs.run import Run
from batchnorm.words import (
    WORDS,
    ClassCounts,
    angle,
    count,
    index,
    known,
    listing,
    number,
    percent,
    plural,
    share,
    shortened,
)

QUESTION = "Do gamma and beta undo batch normalization?"
NAMED = 4
_NOT_LIVE = tuple(CLASSES.index(name) for name in ("dead", "unknown"))


@dataclass(frozen=True)
class WatchAnswer:
    """The first screen, the headline, its figures (NaN where unknown), each layer's, and the parts that explain it.

    The figures are of the layers of which there is enough to say, or of all where there is of none. `verdict` is a key
    of `verdict.WORDS`.
    """

    verdict: str
    lead: Lead
    headline: str
    step: int | None
    classes: ClassCounts
    undo_index: float
    undo_angle: float
    bare_angle: float
    gradient_diverted: float
    batch_noise: float
    layers: tuple[LayerReading, ...]
    parts: tuple[Part, ...]

    def lines(self) -> list[str]:
        """For the terminal: the headline, then a paragraph a part."""
        return [self.headline, *(f"{part.question} {part.text}" for part in self.parts)]


def answer(reading: Reading) -> WatchAnswer:
    """The answer of one Run, whatever there is of it."""
    layers = tuple(layer for layer in reading.layers if layer.affine and layer.step is not None)
    counted = tuple(layer for layer in layers if not layer.why_not)
    shown = counted or layers
    verdict = _verdict(reading, layers, counted)
    classes = ClassCounts.total_of(layer.classes for layer in shown)
    middle = median(_pooled(shown, "undo_index"))
    live = ~np.isin(_pooled(shown, "class"), _NOT_LIVE)
    undo, bare = (median(_pooled(shown, name)[live]) for name in ("undo_angle", "bare_angle"))
    diverted = median(_pooled([each for each in reading.layers if each.step is not None], "gradient_diverted"))
    noise = _noise(reading.layers)
    step = max((layer.step for layer in shown if layer.step is not None), default=reading.last_step)
    return WatchAnswer(
        verdict=verdict,
        lead=_lead(verdict, layers, classes, step),
        headline=_headline(reading.status, verdict, layers, counted, step, classes, middle),
        step=step,
        classes=classes,
        undo_index=middle,
        undo_angle=undo,
        bare_angle=bare,
        gradient_diverted=diverted,
        batch_noise=noise,
        layers=layers,
        parts=(
            _how_far(counted, classes, middle, step),
            _free_of_scale(undo, bare),
            _diverted(diverted),
            _never(noise, reading.layers),
        ),
    )


def _verdict(reading: Reading, layers: Sequence[LayerReading], counted: Sequence[LayerReading]) -> str:
    if not reading.layers:
        return "no layer"
    if not any(layer.affine for layer in reading.layers):
        return "no affine"
    if 2 * sum(layer.units for layer in counted) <= sum(layer.units for layer in layers):
        return "too early"  # what is known of a few units says nothing of all
    return ClassCounts.total_of(layer.classes for layer in counted).verdict


def _lead(verdict: str, layers: Sequence[LayerReading], classes: ClassCounts, step: int | None) -> Lead:
    bars = tuple(Bar(layer.name, layer.classes, layer.why_not) for layer in layers if layer.classes.units)
    at = "" if step is None else f" at step {count(step)}"
    label = f"of {plural(classes.units, 'unit')} are undone{at}" if classes.units else "no unit was recorded yet"
    return Lead(QUESTION, WORDS[verdict], share(classes.share("undone")), label, (BarGroup("", bars),) if bars else ())


HEADS = {
    "yes": "Yes, here they do",
    "no": "No",
    "partly": "In part",
    "dead": "Most units are dead, and pass nothing on",
    "nothing to undo": "There is little to undo",
    "unknown": "Unknown, as most numbers are not finite",
}


def _headline(
    status: str,
    verdict: str,
    layers: Sequence[LayerReading],
    counted: Sequence[LayerReading],
    step: int | None,
    classes: ClassCounts,
    middle: float,
) -> str:
    if verdict == "no layer":
        return "No layer was recorded: nothing is known of gamma and beta."
    if verdict == "no affine":
        return "There is nothing to undo with: no watched layer has a gamma and a beta."
    if verdict == "too early":
        reasons = filter(None, dict.fromkeys(layer.why_not for layer in layers))
        why = f" ({'; '.join(reasons)})" if len(counted) < len(layers) else ""
        sofar = "Too early to tell" if layers else "Nothing was recorded yet"
        most, rest = "", ""
        if counted:
            most = f" for {len(layers) - len(counted)} of {plural(len(layers), 'layer')}"
            rest = f" In {'the other one' if len(counted) == 1 else f'the other {len(counted)}'}: {classes.text()}."
        return f"{sofar}{most}: whether gamma and beta undo batch normalization here is not known{why}.{rest}"
    at = f"at step {count(math.nan if step is None else step)}, of {plural(classes.units, 'unit')}"
    scale = f"the median undo_index is {index(middle)}, where 1 is undone and 0 bare normalization"
    head = f"{HEADS[verdict]}: {at}, {classes.text()}{f'; {scale}' if math.isfinite(middle) else ''}"
    undone = [layer.name for layer in counted if layer.verdict == "yes"]
    others = [layer.name for layer in counted if layer.verdict != "yes"]
    if verdict == "yes" and others:
        head += f". Not in {_names(others)}"
    elif verdict == "partly" and undone and others:
        head += f". Most units are undone in {_names(undone)}, not in {_names(others)}"
    elif verdict == "partly":
        head += ". In no layer are most units undone"
    elif undone:
        head += f". But most units are undone in {_names(undone)}"
    left = [layer.name for layer in layers if layer.why_not]
    if left:
        head += f". Too early to tell of {_names(left)}"
    return f"So far: {head[0].lower()}{head[1:]}." if status == "running" else f"{head}."


def _how_far(counted: Sequence[LayerReading], classes: ClassCounts, middle: float, step: int | None) -> Part:
    if not math.isfinite(middle):
        of = f"It is not defined here: of the units, {classes.text()}." if classes.units else "It was not measured."
        sentences = [of]
    elif not counted:
        sentences = ["This is about where gamma and beta were set, whatever they will learn: no evidence yet."]
    else:
        starts = _weighted_median([layer.at_start for layer in counted], [layer.units for layer in counted])
        sentences = [
            f"At the first recorded step the typical layer's median was {index(starts)}, at step "
            f"{count(math.nan if step is None else step)} it is {index(middle)} over all units."
        ]
        defined = sorted((each for each in counted if math.isfinite(each.undo_index)), key=lambda each: each.undo_index)
        if len(defined) > 1:
            low, high = (f"{index(each.undo_index)} in `{_plain(each.name)}`" for each in (defined[0], defined[-1]))
            sentences.append(f"By layer, from {low} to {high}.")
    label = "median undo_index: 1 is undone, 0 as far as bare normalization, below 0 farther"
    return Part("How far do they go?", index(middle), label, tuple(sentences))


def _free_of_scale(undo: float, bare: float) -> Part:
    sentences: tuple[str, ...] = (
        f"The median undo_angle of the live units is {angle(undo)}; bare normalization, gamma = 1 and beta = 0, has "
        f"a median angle of {angle(bare)}.",
        "At 0° the output is the input times a positive factor, which the next layer can absorb; multiplying the "
        "weights below by a constant does not change the angle.",
    )
    if not math.isfinite(undo + bare):
        undo, sentences = math.nan, ("It was not measured.",)
    label = "median undo_angle of the live units: 0° is undone"
    return Part("And free of the weights' scale?", angle(undo), label, sentences)


def _diverted(share: float) -> Part:
    sentences: tuple[str, ...] = (
        f"Of the typical unit's gradient energy, {percent(share)} is taken out by the normalization and moves gamma "
        "and beta instead.",
        "The layers below do not learn from it, whatever gamma and beta are, also where they undo the normalization.",
    )
    if not math.isfinite(share):
        sentences = ("No gradient was recorded.",)
    label = "of the typical unit's gradient energy, at the last step"
    return Part("What never reaches the layers below?", percent(share), label, sentences)


def _never(noise: float, layers: Sequence[LayerReading]) -> Part:
    about = "What changes from batch to batch: mean and deviation do, gamma and beta are constants within a step."
    measured = f"Between batches, the typical unit's mean varies by {number(noise)} of its variance."
    if not math.isfinite(noise):
        measured = (
            "It was not measured here: measuring it takes several forward passes per step, several processes, or a "
            "probe of several batches."
        )
    sentences = [about, measured]
    sizes = [layer.m for layer in layers if math.isfinite(layer.m)]
    if sizes:
        chances = dict.fromkeys(f"{number(1 / size)} (m = {count(size)})" for size in (max(sizes), min(sizes)))
        sentences.append(f"Of independent normal values it would be 1/m: {' to '.join(chances)}.")
    label = "variance of the batches' means, relative to the variance"
    return Part("What can't gamma and beta undo?", number(noise), label, tuple(sentences))


def _noise(layers: Sequence[LayerReading]) -> float:
    """The median over layers, weighted by their units, of the last known median."""
    found = [(layer.curves["noise_mean"].known, layer.units) for layer in layers if "noise_mean" in layer.curves]
    return _weighted_median([values[-1] for values, _ in found], [units for _, units in found])


def _pooled(layers: Sequence[LayerReading], column: str) -> Array:
    return np.concatenate([np.zeros(0), *(layer.last[column] for layer in layers)])


def _weighted_median(values: Sequence[float], weights: Sequence[int]) -> float:
    return median(np.repeat(np.array(values, np.float64), np.array(weights, np.int64)))


def _names(names: Sequence[str]) -> str:
    """The first few by name, the others counted."""
    shown = [shortened(name) for name in names[:NAMED]]
    more = len(names) - len(shown)
    return listing([*shown, f"{more} more"] if more else shown)


def _plain(name: str) -> str:
    """Backticks would end the code that the name stands in."""
    return shortened(name).replace("`", "'")


RUN_COLUMNS = (
    "run", "status", "last step", "layers", "answer", "undo_index", "undo_angle", "undone", "away", "gradient diverted",
    "dead units", "findings",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """What is said of one run: its name beside others, what was read, and the answer."""

    label: str
    reading: Reading
    answer: WatchAnswer

    @property
    def logged(self) -> dict[str, float]:
        """The last value of each name."""
        return {scalar.name: scalar.last for scalar in self.reading.scalars}

    @property
    def findings(self) -> str:
        """ "1 error, 3 warnings"; notes are not counted."""
        found = Counter(finding.severity for finding in self.reading.findings)
        return ", ".join(plural(found[level], level) for level in ("error", "warning") if found[level]) or "none"

    def cells(self, logged: Sequence[str] = ()) -> tuple[str, ...]:
        """As text, in the order of RUN_COLUMNS and then of the logged names; empty where unknown."""
        reading, found = self.reading, self.answer
        shares = (*(found.classes.share(name) for name in ("undone", "away")), found.gradient_diverted)
        return (
            self.label,
            reading.status,
            "" if reading.last_step is None else count(reading.last_step),
            count(len(reading.layers)),
            found.lead.word,
            known(found.undo_index, index),
            known(found.undo_angle, angle),
            *(known(share, percent) for share in shares),
            count(sum(layer.classes["dead"] for layer in reading.layers)),
            self.findings,
            *(known(self.logged.get(name, math.nan), number) for name in logged),
        )


def summarize(runs: Sequence[Run]) -> tuple[Summary, ...]:
    """What is said of each. Raises RunError where a part is damaged."""
    readings = [read(run) for run in runs]
    return tuple(map(Summary, _labels(runs), readings, map(answer, readings)))


def _labels(runs: Sequence[Run]) -> list[str]:
    """The runs' folders by name; what is not told apart so by its parent's, too, and then by number."""
    paths = [run.path.absolute() for run in runs]
    names = [shortened(path.name or str(path)) for path in paths]
    full = [
        f"{shortened(path.parent.name, 20)}/{name}" if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]
    before = (full[:place].count(name) for place, name in enumerate(full))
    return [f"{name} ({times + 1})" if times else name for name, times in zip(full, before, strict=True)]
