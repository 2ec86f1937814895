"""The sections of a study's page, each with its text and its charts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from batchnorm.report.page import Panel, Section
from batchnorm.report.study import charts
from batchnorm.report.study.numbers import Study, last_step
from batchnorm.report.tables import Table
from batchnorm.words import count

OUTLYING = 0.002
OUTLYING_POSITIONS = 0.04


def sections(study: Study) -> tuple[Section, ...]:
    """In the order of the page; one that has nothing to show has no panels."""
    made = (accuracy, undo, gamma_beta, angle, optimal, percentiles, gradient, drift, noise, activation)
    return tuple(section(study) for section in made)


def accuracy(study: Study) -> Section:
    def panels(column: str, **options: Any) -> tuple[Panel, ...]:
        title = f"Held-out {column}"
        spread = study.curves.spreads(column, ("arm", "step"))
        return charts.curve_panels(
            spread, column, title, f"{title} against step, by arm.", f"held-out {column}", **options
        )

    return Section(
        "accuracy",
        "Four ways to train the same network",
        (
            "The same network, from the same weights, on the same batches, four times: without batch normalization "
            "(none); with it, its scale gamma and shift beta starting at 1 and 0 and learned (learned); with gamma and "
            "beta held at 1 and 0 (fixed); and with gamma and beta set so that they undo the normalization exactly at "
            "the start, then learned (undone). In inference mode, none and undone start as the same function.",
        ),
        (*panels("accuracy", domain=(0.0, 1.0), form="~%"), *panels("loss")),
        tuple(study.arms),
        "Lines are medians over seeds, bands their range. Steps are on a logarithmic scale, with step 0 at the left.",
        columns=2,
    )


def undo(study: Study) -> Section:
    table = charts.per_layer(study, "undo_index", charts.LEARNING)
    low = table["low"][np.isfinite(table["low"])]
    domain = (max(float(low.min(initial=-0.2)), -1.5) - 0.05, 1.15)
    sampling = ""  # why a network that is set to undo can start a little below 1
    probe, train = study.planned("probe", math.nan), study.planned("train", math.nan)
    if probe < train:
        sampling = (
            f" mean and s are those of a probe of {count(probe)} training rows; undone was set on all {count(train)}, "
            "and starts at 1 to within the probe's sampling."
        )
    return Section(
        "undo",
        "Do gamma and beta go back to the identity?",
        (
            "Normalization turns a unit's input x into x̂, with mean 0 and deviation 1. Gamma and beta can turn it "
            "back: with gamma = s and beta = mean, the output y is x again. The undo_index says how far they went: 1 "
            "is all the way, 0 is as far away as at gamma = 1 and beta = 0, and below 0 is farther still. Held fixed, "
            "it is 0 always. Each line is the median unit of a layer.",
        ),
        charts.layer_panels(table, "undo_index", "undo", domain=domain, guides={"undone": 1.0, "bare": 0.0}),
        charts.LEARNING,
        "Lines are medians over seeds of the median over units; bands are the range over seeds. Values below -1.5 are "
        f"cut off.{sampling}",
    )


def gamma_beta(study: Study) -> Section:
    ends = charts.joined(study, charts.LEARNING)
    panels = []
    outside = 0
    for x, y, bare in (("s", "gamma", 1.0), ("mean", "beta", 0.0)):
        for place, layer in enumerate(ends.names("layer")):
            units = ends.rows(layer=layer)
            frame = charts.frame(units[x], units[y], OUTLYING)
            outside += _outside(units, x, y, frame)
            words = f"{y} against {x}, a point for each unit of {layer} at the last step."
            chart = charts.against(units, x, y, frame, {"bare": bare})
            panels.append(Panel(f"{y}-{place}", f"{layer}: {y} against {x}", words, chart))
    return Section(
        "gamma-beta",
        "Unit by unit: gamma against s, beta against mean",
        (
            "Each point is a unit at the last step. On the dashed line, gamma equals the input's deviation s and beta "
            "its mean: there, batch normalization is undone. A horizontal row of points at gamma = 1 or beta = 0 is "
            "bare normalization.",
            "One caution: multiply the weights below a unit by a constant, and s and mean grow with it while what the "
            "network computes stays the same. Part of the distance from the line is this arbitrary scale; the angle "
            "below is free of it.",
        ),
        tuple(panels),
        charts.LEARNING,
        f"All seeds. {count(outside)} outlying units lie outside the frames." if outside else "All seeds.",
        dashed=False,
    )


def angle(study: Study) -> Section:
    table = charts.per_layer(study, "undo_angle", charts.NORMALIZED)
    return Section(
        "angle",
        "Free of the weights' scale: the angle",
        (
            "The output is gamma times x̂ plus beta, the input is s times x̂ plus the mean. The undo_angle is the angle "
            "between the two, seen as vectors (gamma, beta) and (s, mean): 0° means that the output is the input times "
            "a positive factor, which the next layer can absorb. Multiplying the weights below by a constant changes s "
            "and mean alike, and not the angle. In the arm fixed it is what bare normalization has, at its weights.",
        ),
        charts.layer_panels(
            table,
            "undo_angle",
            "angle",
            domain=charts.from_zero(table, 10.0),
            guides={"undone": 0.0},
            axis="undo_angle, degrees",
        ),
        charts.NORMALIZED,
        "Lines are medians over seeds of the median over units; bands are the range over seeds.",
    )


def optimal(study: Study) -> Section:
    ends = last_step(study.optimal).labelled("arm", "optimal")
    panels: list[Panel] = []
    for x, y in (("s", "gamma"), ("mean", "beta")):
        if (np.isfinite(ends[x]) & np.isfinite(ends[y])).any():
            chart = charts.against(ends, x, y, charts.frame(ends[x], ends[y]))
            words = f"{y} against {x} where undoing is optimal, a point for each unit at the last step."
            panels.append(Panel(f"optimal-{y}", f"{y} against {x}", words, chart))
    index = study.optimal.medians("undo_index", ("seed", "step")).spreads("undo_index", ("step",))
    low = index["low"][np.isfinite(index["low"])].min(initial=0.0)
    domain, guides = (max(float(low), -1.5) - 0.05, 1.15), {"undone": 1.0, "bare": 0.0}
    words = "undo_index against step where undoing is optimal."
    index = index.labelled("arm", "optimal")
    panels += charts.curve_panels(
        index, "optimal-index", "undo_index", words, "undo_index", domain=domain, guides=guides
    )
    return Section(
        "optimal",
        "Where undoing is the right answer",
        (
            "A control: one batch normalization layer is asked to return its own un-normalized input, so the loss is "
            "smallest where gamma = s and beta = mean. If the points lie on the line here but not in the charts "
            "of the previous sections, then gamma and beta could find the identity, and in the network the loss does "
            "not send them there.",
        ),
        tuple(panels),
    )


def percentiles(study: Study) -> Section:
    title = "The input of one activation over training"
    paragraphs = (
        "This is Figure 1 (b, c) of Ioffe & Szegedy (2015). The thick line is the median of the values that reach one "
        "sigmoid, the band runs from their 15th to their 85th percentile. Without batch normalization the band wanders "
        "as the layers below learn; the paper shows that with it, it hardly moves.",
        "Read it with care: with batch normalization, these values are its own output, whose mean and deviation are "
        "beta and gamma by construction. That they are steady says little about what arrives. So the second row "
        "shows what arrives, the input x before normalization.",
    )
    picked = _typical_unit(study)
    if picked is None:
        return Section("percentiles", title, paragraphs, ())
    panels: list[Panel] = []
    seed, layer, unit = picked
    shown = {arm: study.units.rows(arm=arm, layer=layer, seed=seed, unit=unit) for arm in study.arms}
    for side, arms, what in (
        ("out", study.arms, "into the activation"),
        ("in", [arm for arm in study.arms if arm != "none"], "before normalization"),
    ):
        columns = [shown[arm][f"{side}_p{p}"] for arm in arms for p in (15, 85)]
        domain = charts.span(*columns) if columns else (0.0, 1.0)
        for arm in arms:
            if np.isfinite(shown[arm][f"{side}_p50"]).any():
                chart = charts.percentiles(shown[arm], side, arm, domain, what)
                words = f"15th, 50th and 85th percentile against step, {what}, in the arm {arm}."
                panels.append(Panel(f"percentiles-{side}-{arm}", f"{arm}: {what}", words, chart))
    return Section(
        "percentiles",
        title,
        paragraphs,
        tuple(panels),
        tuple(study.arms),
        f"Unit {unit:.0f} of {layer}, seed {seed:.0f}: of its layer, the unit closest to the layer's median and width "
        "at the end, all arms taken together. Each row has one vertical scale.",
        columns=4,
    )


def gradient(study: Study) -> Section:
    table = charts.per_layer(study, "gradient_diverted", charts.NORMALIZED)
    return Section(
        "gradient",
        "What undoing cannot restore: the gradient",
        (
            "Going backward, batch normalization removes two directions from each unit's gradient: its mean over the "
            "batch, and its component along x̂. That part reaches beta and gamma instead of the layers below, whatever "
            "values gamma and beta have. So even a unit that is set to undo, whose output is its input, teaches the "
            "layers below something else. Shown is the share of the gradient's energy that is diverted so.",
        ),
        charts.layer_panels(table, "gradient diverted", "gradient", domain=charts.from_zero(table), form="~%"),
        charts.NORMALIZED,
        "Medians over the units of a layer, then over seeds; bands are the range over seeds.",
    )


def drift(study: Study) -> Section:
    panels = []
    by = ("layer", "arm", "step")
    for what, title in (("location", "location"), ("log_scale", "log scale")):
        sides = {side: study.units.medians(f"drift_{side}_{what}", (*by, "seed")) for side in ("in", "out")}
        both = Table.stack(
            [medians.spreads(f"drift_{side}_{what}", by).labelled("side", side) for side, medians in sides.items()]
        )
        both = both.where(np.isfinite(both["median"]) & (both["median"] > 0))
        for place, layer in enumerate(study.units.names("layer")):
            rows = both.rows(layer=layer)
            if len(rows):
                words = f"Drift of the {title} per step in {layer}, input and output, by arm."
                chart = charts.drift(rows, f"drift of {title} per step")
                panels.append(Panel(f"drift-{what}-{place}", f"{layer}: {title}", words, chart))
    return Section(
        "drift",
        "Drift: is the output steadier than the input?",
        (
            "While a network learns, the distribution that each layer receives keeps moving; the paper that introduced "
            "batch normalization set out to steady it. Solid lines show how far the input's distribution moves per "
            "step, in its own deviations (location) and in the logarithm of its deviation (log scale). Dotted lines "
            "show the same of batch normalization's output, which only gamma and beta can move. Both scales are "
            "logarithmic. Held fixed, the output does not move at all and has no dotted line.",
        ),
        tuple(panels),
        tuple(study.arms),
        "Solid: input. Dotted: output. Medians over the units of a layer and over seeds.",
        dashed=False,
    )


def noise(study: Study) -> Section:
    batch = study.planned("batch", math.nan)
    mean, log_s = (charts.per_layer(study, column, charts.NORMALIZED) for column in ("noise_mean", "noise_log_scale"))
    mean = mean.where(mean["median"] > 0)
    panels: list[Panel] = []
    for table, title, guide, log in ((mean, "mean", 1 / batch, True), (log_s, "log s", 1 / (2 * batch), False)):
        panels += charts.layer_panels(
            table,
            f"Variance over batches of the {title}",
            f"noise-{title.replace(' ', '-')}",
            heading=title,
            axis=f"variance of the {title}",
            domain=charts.decades(table["median"], guide) if log else charts.from_zero(table, guide),
            guides={"of independent values": guide} if guide == guide else None,
            log=log,
        )
    return Section(
        "noise",
        "What constants cannot undo: the noise of a batch",
        (
            "In training, each batch is normalized with its own mean and deviation, which differ from those of the "
            "next batch. Gamma and beta are the same for all, so this difference stays in, however they are set. Shown "
            "is how much the mean (in units of the variance) and the logarithm of s vary from batch to batch.",
            "Above the first layer, the input comes from rows that were already normalized batch by batch below. That "
            "pins down most of a unit's mean in each batch, so its noise is far smaller there; that of s is not.",
        ),
        tuple(panels),
        charts.NORMALIZED,
        "Medians over the units of a layer, then over seeds; bands are the range over seeds. The scale "
        "of the mean's noise is logarithmic.",
    )


def activation(study: Study) -> Section:
    units, by = study.units, ("arm", "seed", "step")
    linear = units.medians("linear_share", by).spreads("linear_share", by[::2])
    dead = units.means("dead", by).spreads("dead", by[::2])
    said = "Linear share against step, by arm.", "Share of dead units against step, by arm."
    panels = [
        *charts.curve_panels(linear, "linear", "linear share", said[0], "linear share", form="~%", domain=(0.0, 1.0)),
        *charts.curve_panels(
            dead, "dead", "dead units", said[1], "share of dead units", form="~%", domain=charts.from_zero(dead)
        ),
    ]
    ends = charts.joined(study, charts.LEARNING)
    if (np.isfinite(ends["position_in"]) & np.isfinite(ends["position_out"])).any():
        frame = charts.frame(ends["position_in"], ends["position_out"], OUTLYING_POSITIONS)
        title = "position out against position in"
        words = f"{title.capitalize()}, a point for each unit at the last step."
        panels.append(Panel("position", title, words, charts.against(ends, "position_in", "position_out", frame)))
    return Section(
        "activation",
        "Where the data meets the activation",
        (
            "The linear share is the part of the data that meets the activation where it is nearly a straight line. A "
            "unit counts as dead where its output hardly varies against that of the layer's other units or, under a "
            "ReLU, where no data reaches its positive side. The position is how many deviations the data's mean lies "
            "above zero, before and after batch normalization: on the dashed line, gamma and beta restored where zero "
            "lies, whatever the scale of the weights.",
        ),
        tuple(panels),
        tuple(study.arms),
        "Linear share: median over all units. Dead units: their share. Bands are the range over seeds.",
    )


def _outside(units: Table, x: str, y: str, frame: charts.Frame) -> int:
    drawn = np.isfinite(units[x]) & np.isfinite(units[y])
    inside = np.ones(len(units), bool)
    for column, (low, high) in ((x, frame.x), (y, frame.y)):
        inside &= (units[column] >= low) & (units[column] <= high)
    return int((drawn & ~inside).sum())


def _typical_unit(study: Study) -> tuple[float, str, float] | None:
    """The seed, layer and unit to show: the first seed and last layer, and the unit whose median and width at the end
    are closest to its layer's, in units of the layer's own scatter, summed over the arms."""
    layers, seeds = study.units.names("layer"), study.units["seed"]
    if not layers or not len(seeds):
        return None
    seed = float(seeds.min())
    last = study.units.rows(layer=layers[-1], seed=seed)
    units = np.unique(last["unit"])
    distance, seen = np.zeros(len(units)), np.zeros(len(units))
    for arm in study.arms:
        end = last_step(last.rows(arm=arm))
        place = np.searchsorted(units, end["unit"])
        with np.errstate(invalid="ignore"):  # the percentiles of a network on its way to infinity
            width = end["out_p85"] - end["out_p15"]
        for values in (end["out_p50"], width):
            finite = np.isfinite(values)
            if finite.any():
                off = np.abs(values[finite] - np.median(values[finite]))
                np.add.at(distance, place[finite], off / (np.median(off) or 1.0))
                np.add.at(seen, place[finite], 1)
    if not seen.any():
        return None
    distance[seen < seen.max()] = np.inf
    return seed, layers[-1], float(units[np.argmin(distance)])
