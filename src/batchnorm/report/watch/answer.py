"""A watched training -> the answer to "do gamma and beta undo batch normalization?", in words.

Computed from its numbers. Nothing is claimed of a layer whose gamma and beta still stand about where they were set:
gamma = 1 and beta = 0 is an undo_index of 0 whatever the network would learn. Figures of several layers pool units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.quantities import CLASSES
from batchnorm.report.page import (
    Bar,
    BarGroup,
    Lead,
    Part,
    undone_number,
)
from batchnorm.report.watch.numbers import LayerReading, Reading, median
from batchnorm.verdict import WORDS, ClassCounts
from batchnorm.words import UNKNOWN, angle, count, index, listing, number, percent, plural, shortened

QUESTION = "Do gamma and beta undo batch normalization?"
MOVED = 0.05
"""How far (gamma, beta) of the typical unit must have gone from where all units of its layer were set alike."""
MIN_SNAPSHOTS = 3
MIN_STEPS = 20
NAMED = 4
_NOT_LIVE = tuple(CLASSES.index(name) for name in ("dead", "unknown"))


@dataclass(frozen=True)
class LayerAnswer:
    """What a layer's units did, at its last step. `why_not` says why nothing is claimed, else empty."""

    name: str
    units: int
    classes: ClassCounts
    undo_index: float
    at_start: float
    why_not: str

    @property
    def verdict(self) -> str:
        return "too early" if self.why_not else self.classes.verdict


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
    layers: tuple[LayerAnswer, ...]
    parts: tuple[Part, ...]

    def lines(self) -> list[str]:
        """For the terminal: the headline, then a paragraph a part."""
        return [self.headline, *(f"{part.question} {part.text}" for part in self.parts)]


def answer(reading: Reading) -> WatchAnswer:
    """The answer of one Run, whatever there is of it."""
    affine = [layer for layer in reading.layers if layer.affine and layer.at is not None]
    layers = tuple(_of_layer(layer) for layer in affine)
    counted = tuple(found for found in layers if not found.why_not)
    shown = [layer for layer, found in zip(affine, layers, strict=True) if not found.why_not] or affine
    verdict = _verdict(reading, layers, counted)
    classes = ClassCounts.total_of(layer.classes for layer in shown)
    middle = median(_pooled(shown, "undo_index"))
    angles = median(_live(shown, "undo_angle")), median(_live(shown, "bare_angle"))
    diverted = median(_pooled([layer for layer in reading.layers if layer.at is not None], "gradient_diverted"))
    noise = _noise(reading.layers)
    step = max((layer.at for layer in shown if layer.at is not None), default=reading.last_step)
    return WatchAnswer(
        verdict=verdict,
        lead=_lead(verdict, layers, classes, step),
        headline=_headline(reading, verdict, layers, counted, step, classes, middle),
        step=step,
        classes=classes,
        undo_index=middle,
        undo_angle=angles[0],
        bare_angle=angles[1],
        gradient_diverted=diverted,
        batch_noise=noise,
        layers=layers,
        parts=(
            _how_far(counted, classes, middle, step, bool(counted)),
            _free_of_scale(*angles),
            _diverted(diverted),
            _never(noise, reading.layers),
        ),
    )


def _of_layer(layer: LayerReading) -> LayerAnswer:
    curve = layer.curves.get("undo_index")
    known = curve.median[np.isfinite(curve.median)] if curve is not None else np.zeros(0)
    middle = median(layer.last["undo_index"])
    at_start = float(known[0]) if len(known) else math.nan
    return LayerAnswer(layer.name, layer.units, layer.classes, middle, at_start, _why_not(layer))


def _why_not(layer: LayerReading) -> str:
    gamma, beta = layer.begin["gamma"], layer.begin["beta"]
    first = int(layer.curves["position_in"].steps[0]) if "position_in" in layer.curves else 0
    if 2 * layer.classes["unknown"] > layer.classes.units:
        return ""  # that is a verdict, too
    if layer.snapshots < MIN_SNAPSHOTS:
        return f"recorded {plural(layer.snapshots, 'time')} only"
    if layer.at is None or layer.at - first < MIN_STEPS:
        return f"followed over {plural((layer.at or 0) - first, 'step')} only"
    set_alike = np.ptp(gamma) == 0 and np.ptp(beta) == 0
    moved = median(np.hypot(layer.last["gamma"] - gamma, layer.last["beta"] - beta))
    if set_alike and not moved >= MOVED:
        return "gamma and beta have hardly moved from where they were set"
    return ""


def _verdict(reading: Reading, layers: Sequence[LayerAnswer], counted: Sequence[LayerAnswer]) -> str:
    if not reading.layers:
        return "no layer"
    if not any(layer.affine for layer in reading.layers):
        return "no affine"
    if 2 * sum(layer.units for layer in counted) <= sum(layer.units for layer in layers):
        return "too early"  # what is known of a few units says nothing of all
    return ClassCounts.total_of(layer.classes for layer in counted).verdict


def _lead(verdict: str, layers: Sequence[LayerAnswer], classes: ClassCounts, step: int | None) -> Lead:
    bars = tuple(Bar(layer.name, layer.classes, layer.why_not) for layer in layers if layer.classes.units)
    at = "" if step is None else f" at step {count(step)}"
    label = f"of {plural(classes.units, 'unit')} are undone{at}" if classes.units else "no unit was recorded yet"
    return Lead(QUESTION, WORDS[verdict], undone_number(classes), label, (BarGroup("", bars),) if bars else ())


def _headline(
    reading: Reading,
    verdict: str,
    layers: Sequence[LayerAnswer],
    counted: Sequence[LayerAnswer],
    step: int | None,
    classes: ClassCounts,
    middle: float,
) -> str:
    if verdict == "no layer":
        return "No layer was recorded: nothing is known of gamma and beta."
    if verdict == "no affine":
        return "There is nothing to undo with: no watched layer has a gamma and a beta."
    if verdict == "too early":
        reasons = [*dict.fromkeys(layer.why_not for layer in layers)]
        why = f" ({'; '.join(filter(None, reasons))})" if any(reasons) else ""
        sofar = "Nothing was recorded yet" if not layers else "Too early to tell"
        most = f" for {len(layers) - len(counted)} of {plural(len(layers), 'layer')}" if counted else ""
        rest = ""
        if counted:
            rest = f" In {'the other one' if len(counted) == 1 else f'the other {len(counted)}'}: {classes.text()}."
        return f"{sofar}{most}: whether gamma and beta undo batch normalization here is not known{why}.{rest}"
    at = f"at step {count(math.nan if step is None else step)}, of {plural(classes.units, 'unit')}"
    scale = f"the median undo_index is {index(middle)}, where 1 is undone and 0 bare normalization"
    heads = {
        "yes": "Yes, here they do",
        "no": "No",
        "partly": "In part",
        "dead": "Most units are dead, and pass nothing on",
        "nothing to undo": "There is little to undo",
        "unknown": "Unknown, as most numbers are not finite",
    }
    head = f"{heads[verdict]}: {at}, {classes.text()}{f'; {scale}' if math.isfinite(middle) else ''}"
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
    return f"So far: {head[0].lower()}{head[1:]}." if reading.status == "running" else f"{head}."


def _how_far(counted: Sequence[LayerAnswer], classes: ClassCounts, middle: float, step: int | None, told: bool) -> Part:
    question = "How far do they go?"
    label = "median undo_index: 1 is undone, 0 as far as bare normalization, below 0 farther"
    if not math.isfinite(middle):
        why = f"It is not defined here: of the units, {classes.text()}." if classes.units else "It was not measured."
        return Part(question, UNKNOWN, label, (why,))
    if not told:
        sentence = "This is about where gamma and beta were set, whatever they will learn: no evidence yet."
        return Part(question, index(middle), label, (sentence,))
    starts = _weighted_median([layer.at_start for layer in counted], [layer.units for layer in counted])
    at = count(math.nan if step is None else step)
    sentences = [
        f"At the first recorded step the typical layer's median was {index(starts)}, at step {at} it is {index(middle)}"
        " over all units."
    ]
    known = [layer for layer in counted if math.isfinite(layer.undo_index)]
    if len(known) > 1:
        low, high = (pick(known, key=lambda layer: layer.undo_index) for pick in (min, max))
        sentences.append(
            f"By layer, from {index(low.undo_index)} in `{_plain(low.name)}` to {index(high.undo_index)} in "
            f"`{_plain(high.name)}`."
        )
    return Part(question, index(middle), label, tuple(sentences))


def _free_of_scale(undo: float, bare: float) -> Part:
    question, label = "And free of the weights' scale?", "median undo_angle of the live units: 0° is undone"
    if not (math.isfinite(undo) and math.isfinite(bare)):
        return Part(question, UNKNOWN, label, ("It was not measured.",))
    sentences = (
        f"The median undo_angle of the live units is {angle(undo)}; bare normalization, gamma = 1 and beta = 0, has "
        f"a median angle of {angle(bare)}.",
        "At 0° the output is the input times a positive factor, which the next layer can absorb; multiplying the "
        "weights below by a constant does not change the angle.",
    )
    return Part(question, angle(undo), label, sentences)


def _diverted(share: float) -> Part:
    question, label = "What never reaches the layers below?", "of the typical unit's gradient energy, at the last step"
    if not math.isfinite(share):
        return Part(question, UNKNOWN, label, ("No gradient was recorded.",))
    sentences = (
        f"Of the typical unit's gradient energy, {percent(share)} is taken out by the normalization and moves gamma "
        "and beta instead.",
        "The layers below do not learn from it, whatever gamma and beta are, also where they undo the normalization.",
    )
    return Part(question, percent(share), label, sentences)


def _never(noise: float, layers: Sequence[LayerReading]) -> Part:
    question, label = "What can't gamma and beta undo?", "variance of the batches' means, relative to the variance"
    sizes = [layer.m for layer in layers if math.isfinite(layer.m)]
    about = "What changes from batch to batch: mean and deviation do, gamma and beta are constants within a step."
    chance = ""
    if sizes:
        low, high = (f"{number(1 / size)} (m = {count(size)})" for size in (max(sizes), min(sizes)))
        chance = f"Of independent normal values it would be 1/m: {low if low == high else f'{low} to {high}'}."
    if math.isfinite(noise):
        found = f"Between batches, the typical unit's mean varies by {number(noise)} of its variance."
        return Part(question, number(noise), label, tuple(filter(None, (about, found, chance))))
    missing = (
        "It was not measured here: measuring it takes several forward passes per step, several processes, or a probe "
        "of several batches."
    )
    return Part(question, UNKNOWN, label, tuple(filter(None, (about, missing, chance))))


def _noise(layers: Sequence[LayerReading]) -> float:
    """The median over layers, weighted by their units, of the last known median."""
    found = [(layer.curves["noise_mean"].median, layer.units) for layer in layers if "noise_mean" in layer.curves]
    known = [(values[np.isfinite(values)], units) for values, units in found]
    return _weighted_median([float(v[-1]) for v, _ in known if len(v)], [units for v, units in known if len(v)])


def _pooled(layers: Sequence[LayerReading], column: str) -> NDArray[np.float64]:
    return np.concatenate([layer.last[column] for layer in layers]) if layers else np.zeros(0)


def _live(layers: Sequence[LayerReading], column: str) -> NDArray[np.float64]:
    """Of the units that are neither dead nor unknown."""
    values: NDArray[np.float64] = _pooled(layers, column)
    return values[~np.isin(_pooled(layers, "class"), _NOT_LIVE)]


def _weighted_median(values: Sequence[float], weights: Sequence[int]) -> float:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if math.isfinite(value)]
    repeated = np.repeat([value for value, _ in known], [weight for _, weight in known]) if known else np.zeros(0)
    return median(repeated)


def _names(names: Sequence[str]) -> str:
    """The first few by name, the others counted."""
    shown = [shortened(name) for name in names[:NAMED]]
    more = len(names) - len(shown)
    return listing([*shown, f"{more} more"] if more else shown)


def _plain(name: str) -> str:
    """Backticks would end the code that the name stands in."""
    return shortened(name).replace("`", "'")
