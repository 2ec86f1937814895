"""A watched training -> the answer to "do gamma and beta undo batch normalization?", in words.

Computed from its numbers. Nothing is claimed of a layer whose gamma and beta still stand about where they were set:
gamma = 1 and beta = 0 is an undo_index of 0 whatever the network would learn. Figures of several layers pool units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchnorm.report.parts import Part
from batchnorm.report.watch.reading import LayerReading, Reading
from batchnorm.words import UNKNOWN, count, index, listing, number, percent, shortened

Verdict = Literal["undone", "not undone", "mixed", "too little", "no affine", "no layer"]

MOST = 0.5
HIGH_INDEX = 0.5
"""Half of the way from bare normalization to the identity."""
FEW_LAYERS = 0.1
"""One layer in ten may differ from the others, and is named, before the answer is a mixed one."""
FEW_UNITS = 0.1
"""More than one unit in ten nearer to undone is no plain No; `answer.FEW` of studies is the same."""
MOVED = 0.05
"""How far (gamma, beta) of the typical unit must have gone from where all units of its layer were set alike."""
MIN_SNAPSHOTS = 3
MIN_STEPS = 20
NAMED = 4


@dataclass(frozen=True)
class LayerAnswer:
    """What a layer's units did, at the last step that it ran in. `why_not` says why nothing is claimed, else empty."""

    name: str
    units: int
    undo_index: float
    at_start: float
    nearer_undone: float
    why_not: str

    @property
    def undone(self) -> bool:
        return self.nearer_undone > MOST and self.undo_index >= HIGH_INDEX


@dataclass(frozen=True)
class WatchAnswer:
    """The headline, its figures (NaN where unknown), what each layer did, and the parts that explain it."""

    verdict: Verdict
    headline: str
    step: int | None
    undo_index: float
    nearer_undone: float
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
    told = [layer for layer, found in zip(affine, layers, strict=True) if not found.why_not]
    counted = tuple(found for found in layers if not found.why_not)
    verdict = _verdict(reading, layers, counted, told)
    shown = told or affine
    undo, near = _pooled(shown, "undo_index"), _pooled(shown, "nearer_undone")
    diverted = _pooled([layer for layer in reading.layers if layer.at is not None], "gradient_diverted")
    noise = _noise(reading.layers)
    step = max((layer.at for layer in shown if layer.at is not None), default=reading.last_step)
    median, share = _median(undo), _mean(near)
    return WatchAnswer(
        verdict=verdict,
        headline=_headline(reading, verdict, layers, counted, step, median, share),
        step=step,
        undo_index=median,
        nearer_undone=share,
        gradient_diverted=_median(diverted),
        batch_noise=noise,
        layers=layers,
        parts=(
            _how_far(counted, median, share, step, bool(told)),
            _diverted(_median(diverted)),
            _never(noise, reading.layers),
        ),
    )


def _of_layer(layer: LayerReading) -> LayerAnswer:
    curve = layer.curves.get("undo_index")
    known = curve.median[np.isfinite(curve.median)] if curve is not None else np.zeros(0)
    median, share = _median(layer.last["undo_index"]), _mean(layer.last["nearer_undone"])
    at_start = float(known[0]) if len(known) else math.nan
    return LayerAnswer(layer.name, layer.units, median, at_start, share, _why_not(layer, median))


def _why_not(layer: LayerReading, median: float) -> str:
    first = layer.curves["undo_index"].steps[0] if "undo_index" in layer.curves else 0
    if not math.isfinite(median):
        return "its numbers are not finite"
    if layer.snapshots < MIN_SNAPSHOTS:
        return f"recorded {count(layer.snapshots)} times only"
    if layer.at is None or layer.at - first < MIN_STEPS:
        return f"followed over {count((layer.at or 0) - first)} steps only"
    if _mean(layer.last["dead"]) > MOST:
        return "most of its units are dead, and where nothing varies there is nothing to undo"
    gamma, beta = layer.begin["gamma"], layer.begin["beta"]
    set_alike = np.ptp(gamma) == 0 and np.ptp(beta) == 0
    moved = _median(np.hypot(layer.last["gamma"] - gamma, layer.last["beta"] - beta))
    if set_alike and not moved >= MOVED:
        return "gamma and beta have hardly moved from where they were set"
    return ""


def _verdict(
    reading: Reading, layers: Sequence[LayerAnswer], counted: Sequence[LayerAnswer], told: Sequence[LayerReading]
) -> Verdict:
    if not reading.layers:
        return "no layer"
    if not any(layer.affine for layer in reading.layers):
        return "no affine"
    if 2 * len(counted) <= len(layers):  # what is said of a few must not stand for all
        return "too little"
    undone = sum(layer.undone for layer in counted) / len(counted)
    share, middle = _mean(_pooled(told, "nearer_undone")), _median(_pooled(told, "undo_index"))
    if undone >= 1 - FEW_LAYERS and share > MOST and middle >= HIGH_INDEX:
        return "undone"
    return "not undone" if undone <= FEW_LAYERS and share <= FEW_UNITS and middle < HIGH_INDEX else "mixed"


def _headline(
    reading: Reading,
    verdict: Verdict,
    layers: Sequence[LayerAnswer],
    counted: Sequence[LayerAnswer],
    step: int | None,
    median: float,
    share: float,
) -> str:
    if verdict == "no layer":
        return "No layer was recorded: nothing is known of gamma and beta."
    if verdict == "no affine":
        return "There is nothing to undo with: no watched layer has a gamma and a beta."
    if verdict == "too little":
        reasons = [*dict.fromkeys(layer.why_not for layer in layers)]
        why = f" ({'; '.join(filter(None, reasons))})" if any(reasons) else ""
        sofar = "Nothing was recorded yet" if not layers else "Too little to say"
        most = f" of {len(layers) - len(counted)} of {len(layers)} layers" if counted else ""
        rest = f" In the other {len(counted)}, {percent(share)} of the units are nearer to undone." if counted else ""
        return f"{sofar}{most}: whether gamma and beta undo batch normalization here is not known{why}.{rest}"
    undone = [layer.name for layer in counted if layer.undone]
    others = [layer.name for layer in counted if not layer.undone]
    near = "none" if share == 0 else "all" if share == 1 else percent(share)
    at = f"at step {count(math.nan if step is None else step)}"
    figures = f"{near} of the units {'is' if share == 0 else 'are'} nearer to undone than to bare normalization"
    scale = f"the median undo_index is {index(median)}, where 1 is undone and 0 bare normalization"
    if verdict == "undone":
        head, exceptions = f"Yes, here they do: {at}, {figures}; {scale}", others
    elif verdict == "not undone":
        head, exceptions = f"No: {at}, {figures}; {scale}", undone
    else:
        head = f"In part: {at}, {figures}; {scale}"
        exceptions = []
        if undone and others:
            head += f". Undone: {_names(undone)}; not: {_names(others)}"
        elif others:
            head += ". No layer as a whole is undone"
    if exceptions:
        head += f". Except: {_names(exceptions)}"
    left = [layer.name for layer in layers if layer.why_not]
    if left:
        head += f". Too little to say of {_names(left)}"
    return f"So far: {head[0].lower()}{head[1:]}." if reading.status == "running" else f"{head}."


def _how_far(counted: Sequence[LayerAnswer], median: float, share: float, step: int | None, told: bool) -> Part:
    question = "How far do they go?"
    label = "median undo_index: 1 is undone, 0 as far as bare normalization, below 0 farther"
    if not math.isfinite(median):
        return Part(question, UNKNOWN, label, ("It was not measured.",))
    if not told:
        sentence = "This is about where gamma and beta were set, whatever they will learn: no evidence yet."
        return Part(question, index(median), label, (sentence,))
    starts = _weighted_median([layer.at_start for layer in counted], [layer.units for layer in counted])
    at = count(math.nan if step is None else step)
    sentences = [
        f"At the first recorded step the typical layer's median was {index(starts)}, at step {at} it is {index(median)}"
        f" over all units; {percent(share)} of the units are nearer to undone."
    ]
    if len(counted) > 1:
        low, high = (pick(counted, key=lambda layer: layer.undo_index) for pick in (min, max))
        sentences.append(
            f"By layer, from {index(low.undo_index)} in `{_plain(low.name)}` to {index(high.undo_index)} in "
            f"`{_plain(high.name)}`."
        )
    return Part(question, index(median), label, tuple(sentences))


def _diverted(median: float) -> Part:
    question, label = "What never reaches the layers below?", "of the typical unit's gradient energy, at the last step"
    if not math.isfinite(median):
        return Part(question, UNKNOWN, label, ("No gradient was recorded.",))
    sentences = (
        f"Of the typical unit's gradient energy, {percent(median)} is taken out by the normalization and moves gamma "
        "and beta instead.",
        "The layers below do not learn from it, whatever gamma and beta are, also where they undo the normalization.",
    )
    return Part(question, percent(median), label, sentences)


def _never(noise: float, layers: Sequence[LayerReading]) -> Part:
    question, label = "What can no gamma and beta undo?", "variance of the batches' means, relative to the variance"
    sizes = [layer.m for layer in layers if math.isfinite(layer.m)]
    about = "What changes from batch to batch: mean and deviation do, gamma and beta are constants within a step."
    chance = ""
    if sizes:
        low, high = (f"{number(1 / size)} (m = {count(size)})" for size in (max(sizes), min(sizes)))
        chance = f"Of independent normal values it would be 1/m: {low if low == high else f'{low} to {high}'}."
    if math.isfinite(noise):
        found = f"Between batches, the typical unit's mean varies by {number(noise)} of its variance."
        return Part(question, number(noise), label, tuple(filter(None, (about, found, chance))))
    missing = "It was not measured here: that needs several forwards a step, several processes, or a probe of batches."
    return Part(question, UNKNOWN, label, tuple(filter(None, (about, missing, chance))))


def _noise(layers: Sequence[LayerReading]) -> float:
    """The median over layers, weighted by their units, of the last known median."""
    found = [(layer.curves["noise_mean"].median, layer.units) for layer in layers if "noise_mean" in layer.curves]
    known = [(values[np.isfinite(values)], units) for values, units in found]
    return _weighted_median([float(v[-1]) for v, _ in known if len(v)], [units for v, units in known if len(v)])


def _pooled(layers: Sequence[LayerReading], column: str) -> NDArray[np.float64]:
    return np.concatenate([layer.last[column] for layer in layers]) if layers else np.zeros(0)


def _median(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _weighted_median(values: Sequence[float], weights: Sequence[int]) -> float:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if math.isfinite(value)]
    repeated = np.repeat([value for value, _ in known], [weight for _, weight in known]) if known else np.zeros(0)
    return _median(repeated)


def _names(names: Sequence[str]) -> str:
    """The first few by name, the others counted."""
    shown = [shortened(name) for name in names[:NAMED]]
    more = len(names) - len(shown)
    return listing([*shown, f"{more} more"] if more else shown)


def _plain(name: str) -> str:
    """Backticks would end the code that the name stands in."""
    return shortened(name).replace("`", "'")
