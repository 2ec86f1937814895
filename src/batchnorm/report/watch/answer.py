"""A watched training's answer in words: do gamma and beta undo batch normalization?

Layers whose gamma and beta are still near their initial values do not count: gamma = 1 and beta = 0 is an undo_index of
0 for every network. Figures of several layers pool their units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from batchnorm import words
from batchnorm.report.page import Bar, BarGroup, Lead, Part
from batchnorm.report.watch.numbers import Array, LayerReading, Reading, read
from batchnorm.runs.run import Run
from batchnorm.words import WORDS, ClassCounts, count, index, known, number, percent, plural, quantile, share, shortened

QUESTION = "Do gamma and beta undo batch normalization?"
NAMED = 4


RUN_COLUMNS = (
    "run", "status", "last step", "layers", "answer", "undo_index", "undo_angle", "undone", "away", "gradient diverted",
    "dead units", "findings",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """One run: its label, its numbers, and its answer, also of an incomplete run.

    Figures are those of the layers that were recorded long enough, or of all layers if none was; NaN where unknown.
    """

    label: str
    reading: Reading

    @cached_property
    def layers(self) -> tuple[LayerReading, ...]:
        return tuple(layer for layer in self.reading.layers if layer.affine and layer.step is not None)

    @cached_property
    def counted(self) -> tuple[LayerReading, ...]:
        return tuple(layer for layer in self.layers if not layer.why_not)

    @property
    def step(self) -> int | None:
        steps = (layer.step for layer in self.counted or self.layers if layer.step is not None)
        return max(steps, default=self.reading.last_step)

    @cached_property
    def classes(self) -> ClassCounts:
        return ClassCounts.total_of(layer.classes for layer in self.counted or self.layers)

    def _units(self, column: str) -> Array:
        return np.concatenate([np.zeros(0), *(layer.last[column] for layer in self.counted or self.layers)])

    @cached_property
    def undo_index(self) -> float:
        return quantile(self._units("undo_index"))

    def _angle(self, name: str) -> float:
        """The median over live units."""
        return quantile(self._units(name)[words.is_live(self._units("class"))])

    @cached_property
    def undo_angle(self) -> float:
        return self._angle("undo_angle")

    @cached_property
    def bare_angle(self) -> float:
        return self._angle("bare_angle")

    @cached_property
    def gradient_diverted(self) -> float:
        ran = (layer.last["gradient_diverted"] for layer in self.reading.layers if layer.step is not None)
        return quantile(np.concatenate([np.zeros(0), *ran]))

    @cached_property
    def batch_noise(self) -> float:
        measured = [layer for layer in self.reading.layers if "noise_mean" in layer.curves]
        medians = [layer.curves["noise_mean"].known[-1] for layer in measured]
        return _weighted_median(medians, [layer.units for layer in measured])

    @cached_property
    def verdict(self) -> str:
        """A key of `words.WORDS`."""
        if not self.reading.layers:
            return "no layer"
        if not any(layer.affine for layer in self.reading.layers):
            return "no affine"
        if 2 * sum(layer.units for layer in self.counted) <= sum(layer.units for layer in self.layers):
            return "too early"  # a few units say nothing about all
        return self.classes.verdict

    @property
    def lead(self) -> Lead:
        """The first screen: verdict, share of undone units and a bar per layer."""
        bars = tuple(Bar(layer.name, layer.classes, layer.why_not) for layer in self.layers if layer.classes.units)
        at = "" if self.step is None else f" at step {count(self.step)}"
        units = self.classes.units
        label = f"of {plural(units, 'unit')} are undone{at}" if units else "no unit was recorded yet"
        groups = (BarGroup("", bars),) if bars else ()
        return Lead(QUESTION, WORDS[self.verdict], share(self.classes.share("undone")), label, groups)

    @cached_property
    def headline(self) -> str:
        return _headline(self)

    @property
    def parts(self) -> tuple[Part, ...]:
        return _how_far(self), _independent_of_scale(self), _diverted(self.gradient_diverted), _batch_noise(self)

    def lines(self) -> list[str]:
        """Paragraphs for the terminal: the headline, then one per part."""
        return [self.headline, *(f"{part.question} {part.text}" for part in self.parts)]

    @property
    def logged(self) -> dict[str, float]:
        return {scalar.name: scalar.last for scalar in self.reading.scalars}

    @property
    def findings(self) -> str:
        """ "1 error, 3 warnings"; notes are not counted."""
        counts = Counter(finding.severity for finding in self.reading.findings)
        return ", ".join(plural(counts[level], level) for level in ("error", "warning") if counts[level]) or "none"

    def cells(self, logged: Sequence[str] = ()) -> tuple[str, ...]:
        """The cells of RUN_COLUMNS, then of the logged names, as text; empty where unknown."""
        shares = (*(self.classes.share(name) for name in ("undone", "away")), self.gradient_diverted)
        return (
            self.label,
            self.reading.status,
            "" if self.reading.last_step is None else count(self.reading.last_step),
            count(len(self.reading.layers)),
            WORDS[self.verdict],
            known(self.undo_index, index),
            known(self.undo_angle, words.angle),
            *(known(share, percent) for share in shares),
            count(sum(layer.classes["dead"] for layer in self.reading.layers)),
            self.findings,
            *(known(self.logged.get(name, math.nan), number) for name in logged),
        )


HEADS = {
    "yes": "Yes, here they do",
    "no": "No",
    "partly": "In part",
    "dead": "Most units are dead",
    "nothing to undo": "There is little to undo",
    "unknown": "Unknown, as most numbers are not finite",
}


def _headline(run: Summary) -> str:
    verdict, layers, counted, classes = run.verdict, run.layers, run.counted, run.classes
    if verdict == "no layer":
        return "No layer was recorded: nothing is known about gamma and beta."
    if verdict == "no affine":
        return "No watched layer has a gamma and a beta that could undo it."
    if verdict == "too early":
        reasons = filter(None, dict.fromkeys(layer.why_not for layer in layers))
        why = f" ({'; '.join(reasons)})" if len(counted) < len(layers) else ""
        head = WORDS[verdict] if layers else "Nothing was recorded yet"
        most, rest = "", ""
        if counted:
            most = f" for {len(layers) - len(counted)} of {plural(len(layers), 'layer')}"
            rest = f" In {'the other one' if len(counted) == 1 else f'the other {len(counted)}'}: {classes.text()}."
        return f"{head}{most}: whether gamma and beta undo batch normalization here is not known{why}.{rest}"
    at = f"at step {count(math.nan if run.step is None else run.step)}, of {plural(classes.units, 'unit')}"
    scale = f"; the median undo_index is {index(run.undo_index)}, where 1 is undone and 0 bare normalization"
    head = f"{HEADS[verdict]}: {at}, {classes.text()}{scale if math.isfinite(run.undo_index) else ''}"
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
    too_early = [layer.name for layer in layers if layer.why_not]
    if too_early:
        head += f". {WORDS['too early']} for {_names(too_early)}"
    return f"So far: {head[0].lower()}{head[1:]}." if run.reading.status == "running" else f"{head}."


def _how_far(run: Summary) -> Part:
    counted, undo_index = run.counted, run.undo_index
    if not math.isfinite(undo_index):
        undefined = f"It is not defined here: of the units, {run.classes.text()}."
        sentences = [undefined if run.classes.units else "It was not measured."]
    elif not counted:
        sentences = ["gamma and beta are still near their initial values: no evidence yet."]
    else:
        starts = _weighted_median([layer.at_start for layer in counted], [layer.units for layer in counted])
        sentences = [
            f"At the first recorded step the typical layer's median was {index(starts)}, at step "
            f"{count(math.nan if run.step is None else run.step)} it is {index(undo_index)} over all units."
        ]
        defined = [layer for layer in counted if math.isfinite(layer.medians["undo_index"])]
        if len(defined) > 1:
            ends = (extreme(defined, key=lambda layer: layer.medians["undo_index"]) for extreme in (min, max))
            # Backticks in a name would end the code.
            low, high = (
                f"{index(layer.medians['undo_index'])} in `{shortened(layer.name).replace('`', chr(39))}`"
                for layer in ends
            )
            sentences.append(f"By layer, from {low} to {high}.")
    label = "median undo_index: 1 is undone, 0 as far as bare normalization, below 0 farther"
    return Part("How far do they go?", index(undo_index), label, tuple(sentences))


def _independent_of_scale(run: Summary) -> Part:
    undo_angle, bare_angle = run.undo_angle, run.bare_angle
    sentences: tuple[str, ...] = (
        f"The median undo_angle of the live units is {words.angle(undo_angle)}; bare normalization, gamma = 1 and beta "
        f"= 0, has a median angle of {words.angle(bare_angle)}.",
        "At 0° the output is the input times a positive factor, which the next layer can absorb; multiplying the "
        "weights below by a constant does not change the angle.",
    )
    if not math.isfinite(undo_angle + bare_angle):
        undo_angle, sentences = math.nan, ("It was not measured.",)
    label = "median undo_angle of the live units: 0° is undone"
    return Part("And independently of the weights' scale?", words.angle(undo_angle), label, sentences)


def _diverted(share: float) -> Part:
    sentences: tuple[str, ...] = (
        f"The normalization removes {percent(share)} of the typical unit's gradient energy; it goes to gamma and beta.",
        "The layers below do not learn from it, even if gamma and beta undo the normalization.",
    )
    if not math.isfinite(share):
        sentences = ("No gradient was recorded.",)
    label = "of the typical unit's gradient energy, at the last step"
    return Part("What never reaches the layers below?", percent(share), label, sentences)


def _batch_noise(run: Summary) -> Part:
    noise = run.batch_noise
    measured = f"Between batches, the typical unit's mean varies by {number(noise)} of its variance."
    missing = "It was not measured: this takes several forward passes per step, processes, or batches of a probe."
    about = "Mean and deviation change from batch to batch; gamma and beta are constant within a step."
    sentences = [about, measured if math.isfinite(noise) else missing]
    sizes = [layer.m for layer in run.reading.layers if math.isfinite(layer.m)]
    if sizes:
        chances = dict.fromkeys(f"{number(1 / size)} (m = {count(size)})" for size in (max(sizes), min(sizes)))
        sentences.append(f"For independent normal values it would be 1/m: {' to '.join(chances)}.")
    label = "variance of the batches' means, relative to the variance"
    return Part("What can't gamma and beta undo?", number(noise), label, tuple(sentences))


def _weighted_median(values: Sequence[float], weights: Sequence[int]) -> float:
    return quantile(np.repeat(np.array(values, np.float64), np.array(weights, np.int64)))


def _names(names: Sequence[str]) -> str:
    shown = [shortened(name) for name in names[:NAMED]]
    more = len(names) - len(shown)
    return words.listing([*shown, f"{more} more"] if more else shown)


def summarize(runs: Sequence[Run]) -> tuple[Summary, ...]:
    """Read each run. Raises RunError if a part is damaged."""
    return tuple(map(Summary, _labels(runs), map(read, runs)))


def _labels(runs: Sequence[Run]) -> list[str]:
    """The names of the runs' folders; equal names get the parent's name and then a number."""
    paths = [run.path.absolute() for run in runs]
    names = [shortened(path.name or str(path)) for path in paths]
    full = [
        f"{shortened(path.parent.name, 20)}/{name}" if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]
    repeats = (full[:i].count(name) for i, name in enumerate(full))
    return [f"{name} ({repeat + 1})" if repeat else name for name, repeat in zip(full, repeats, strict=True)]
