"""The sections about training: what reaches an activation, the gradient, drift, noise, where the activation is met."""

from __future__ import annotations

import math

import numpy as np

from batchnorm.report.page import Panel, Section
from batchnorm.report.study import charts
from batchnorm.report.study.charts import (
    LEARNING,
    NORMALIZED,
    from_zero,
    joined,
    layer_panels,
    per_layer,
    pooled,
    some,
)
from batchnorm.report.study.numbers import Study, last_step
from batchnorm.report.tables import Table

OUTLYING = 0.04


def percentiles(study: Study) -> Section:
    picked = _typical_unit(study)
    panels: list[Panel] = []
    paragraphs = (
        "This is Figure 1 (b, c) of Ioffe & Szegedy (2015). The thick line is the median of the values that reach one "
        "sigmoid, the band runs from their 15th to their 85th percentile. Without batch normalization the band wanders "
        "as the layers below learn; the paper shows that with it, it hardly moves.",
        "Read it with care: with batch normalization, these values are its own output, whose mean and deviation are "
        "beta and gamma by construction. That they are steady says little about what arrives. So the second row "
        "shows what arrives, the input x before normalization.",
    )
    if picked is None:
        return Section("percentiles", "The input of one activation over training", paragraphs, ())
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
        "The input of one activation over training",
        paragraphs,
        tuple(panels),
        tuple(study.arms),
        f"Unit {unit:.0f} of {layer}, seed {seed:.0f}: of its layer, the unit closest to the layer's median and width "
        "at the end, all arms taken together. Each row has one vertical scale.",
        columns=4,
    )


def gradient(study: Study) -> Section:
    table = per_layer(study, "gradient_diverted", NORMALIZED)
    return Section(
        "gradient",
        "What undoing cannot restore: the gradient",
        (
            "Going backward, batch normalization removes two directions from each unit's gradient: its mean over the "
            "batch, and its component along x̂. That part reaches beta and gamma instead of the layers below, whatever "
            "values gamma and beta have. So even a unit that is set to undo, whose output is its input, teaches the "
            "layers below something else. Shown is the share of the gradient's energy that is diverted so.",
        ),
        layer_panels(table, "gradient diverted", "gradient", domain=from_zero(table), form="~%"),
        NORMALIZED,
        "Medians over the units of a layer, then over seeds; bands are the range over seeds.",
    )


def drift(study: Study) -> Section:
    panels = []
    layers = study.units.names("layer")
    for what, title in (("location", "location"), ("log_scale", "log scale")):
        sides = []
        for side in ("in", "out"):
            column = f"drift_{side}_{what}"
            medians = study.units.medians(column, ("layer", "arm", "seed", "step"))
            spread = medians.spreads(column, ("layer", "arm", "step"))
            sides.append(spread.labelled("side", side))
        for place, layer in enumerate(layers):
            both = Table.stack([side.rows(layer=layer) for side in sides])
            both = both.where(np.isfinite(both["median"]) & (both["median"] > 0))
            if len(both):
                words = f"Drift of the {what.replace('_', ' ')} per step in {layer}, input and output, by arm."
                panels.append(
                    Panel(
                        f"drift-{what}-{place}",
                        f"{layer}: {title}",
                        words,
                        charts.drift(both, f"drift of {title} per step"),
                    )
                )
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
    mean, log_s = (per_layer(study, column, NORMALIZED) for column in ("noise_mean", "noise_log_scale"))
    mean = mean.where(mean["median"] > 0)
    panels: list[Panel] = []
    for table, title, guide, log in ((mean, "mean", 1 / batch, True), (log_s, "log s", 1 / (2 * batch), False)):
        guides = {"of independent values": guide} if guide == guide else None
        domain = charts.decades(table["median"], guide) if log else from_zero(table, guide)
        what = f"Variance over batches of the {title}"
        name = f"noise-{title.replace(' ', '-')}"
        panels += layer_panels(
            table, what, name, domain=domain, guides=guides, heading=title, log=log, axis=f"variance of the {title}"
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
        NORMALIZED,
        "Medians over the units of a layer, then over seeds; bands are the range over seeds. The scale "
        "of the mean's noise is logarithmic.",
    )


def activation(study: Study) -> Section:
    panels = []
    linear = pooled(study, "linear_share", tuple(study.arms))
    if some(linear):
        chart = charts.curves(linear, "linear share", domain=(0.0, 1.0), form="~%")
        panels.append(Panel("linear", "linear share", "Linear share against step, by arm.", chart))
    dead = study.units.means("dead", ("arm", "seed", "step")).spreads("dead", ("arm", "step"))
    if some(dead):
        chart = charts.curves(dead, "share of dead units", domain=from_zero(dead), form="~%")
        panels.append(Panel("dead", "dead units", "Share of dead units against step, by arm.", chart))
    ends = joined(study, LEARNING)
    if (np.isfinite(ends["position_in"]) & np.isfinite(ends["position_out"])).any():
        frame = charts.frame(ends["position_in"], ends["position_out"], OUTLYING)
        titles = ("position in, mean/s", "position out, beta/gamma")
        chart = charts.against(ends, "position_in", "position_out", *titles, frame)
        words = "Position out against position in, a point for each unit at the last step."
        panels.append(Panel("position", "position out against position in", words, chart))
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


def _typical_unit(study: Study) -> tuple[float, str, float] | None:
    """The seed, layer and unit to show: the first seed and last layer, and the unit whose median and width at the end
    are closest to its layer's, in units of the layer's own scatter, summed over the arms."""
    layers = study.units.names("layer")
    seeds = np.unique(study.units["seed"])
    if not layers or len(seeds) == 0:
        return None
    last = study.units.rows(layer=layers[-1], seed=float(seeds[0]))
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
    return float(seeds[0]), layers[-1], float(units[np.argmin(distance)])
