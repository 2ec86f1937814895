"""The sections of a study's page, with text and charts."""

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
PER_LAYER_NOTE = "Lines are medians over seeds of the median over a layer's units; bands are the range over seeds."


def sections(study: Study) -> tuple[Section, ...]:
    """All sections in order; a section without data has no panels."""
    every = (accuracy, undo, gamma_beta, angle, optimal, percentiles, gradient, drift, noise, activation)
    return tuple(section(study) for section in every)


def accuracy(study: Study) -> Section:
    def panels(column: str, **options: Any) -> tuple[Panel, ...]:
        title = f"Held-out {column}"
        spreads = study.curves.spreads(column, ("arm", "step"))
        words = f"{title} against step, by arm."
        return charts.curve_panels(spreads, column, title, words, f"held-out {column}", **options)

    return Section(
        "accuracy",
        "Four ways to train the same network",
        (
            "The same network, with the same initial weights and batches, is trained four times: without batch "
            "normalization (none); with scale gamma and shift beta learned from 1 and 0 (learned); with gamma and beta "
            "fixed at 1 and 0 (fixed); and with gamma and beta set to undo the normalization exactly at the start, "
            "then learned (undone). In inference mode, none and undone start as the same function.",
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
    sampling = ""  # why a network that is set to undo can start slightly below 1
    probe, train = study.planned("probe", math.nan), study.planned("train", math.nan)
    if probe < train:
        sampling = (
            f" mean and s come from a probe of {count(probe)} training rows; undone was set on all {count(train)}, so "
            "it starts at 1 up to the probe's sampling noise."
        )
    return Section(
        "undo",
        "Do gamma and beta go back to the identity?",
        (
            "Normalization turns a unit's input x into x̂, with mean 0 and deviation 1. Gamma and beta can reverse "
            "this: with gamma = s and beta = mean, the output y is x again. undo_index is 1 if they fully do, 0 at "
            "the distance of gamma = 1 and beta = 0, and below 0 if they are farther away. In the arm fixed it is "
            "always 0. Each line is the median unit of a layer.",
        ),
        charts.layer_panels(table, "undo_index", "undo", domain=domain, guides={"undone": 1.0, "bare": 0.0}),
        charts.LEARNING,
        f"{PER_LAYER_NOTE} Values below -1.5 are cut off.{sampling}",
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
            "Each point is a unit at the last step. On the dashed line gamma equals the input's deviation s, or beta "
            "its mean: batch normalization is undone. A horizontal row of points at gamma = 1 or beta = 0 is bare "
            "normalization.",
            "Multiplying the weights below a unit by a constant multiplies s and mean too, but does not change the "
            "network's function. Part of the distance from the line is this arbitrary scale; the angle below does not "
            "depend on it.",
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
            "The output is gamma times x̂ plus beta, the input is s times x̂ plus the mean. undo_angle is the angle "
            "between the vectors (gamma, beta) and (s, mean): 0° means that the output is the input times a positive "
            "factor, which the next layer can absorb. Multiplying the weights below by a constant does not change the "
            "angle. In the arm fixed it is the angle of bare normalization.",
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
        PER_LAYER_NOTE,
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
        "This is Figure 1(b, c) of Ioffe & Szegedy (2015). The line is the median of the values that reach one "
        "sigmoid, the band runs from their 15th to their 85th percentile. Without batch normalization the band moves "
        "as the layers below learn; the paper shows that with it, the band hardly moves.",
        "But with batch normalization these values are its output, whose mean and deviation are beta and gamma by "
        "construction: that they are stable says little about the input. So the second row shows the input x before "
        "normalization.",
    )
    typical = _typical_unit(study)
    if typical is None:
        return Section("percentiles", title, paragraphs, ())
    panels: list[Panel] = []
    seed, layer, unit = typical
    rows = {arm: study.units.rows(arm=arm, layer=layer, seed=seed, unit=unit) for arm in study.arms}
    normalized = [arm for arm in study.arms if arm != "none"]
    for side, arms, label in (("out", study.arms, "into the activation"), ("in", normalized, "before normalization")):
        columns = [rows[arm][f"{side}_p{p}"] for arm in arms for p in (15, 85)]
        domain = charts.span(*columns) if columns else (0.0, 1.0)
        for arm in arms:
            if np.isfinite(rows[arm][f"{side}_p50"]).any():
                chart = charts.percentiles(rows[arm], side, arm, domain, label)
                words = f"15th, 50th and 85th percentile against step, {label}, in the arm {arm}."
                panels.append(Panel(f"percentiles-{side}-{arm}", f"{arm}: {label}", words, chart))
    return Section(
        "percentiles",
        title,
        paragraphs,
        tuple(panels),
        tuple(study.arms),
        f"Unit {unit:.0f} of {layer}, seed {seed:.0f}: the unit closest to its layer's median and width at the end, "
        "over all arms. Each row has one vertical scale.",
        columns=4,
    )


def gradient(study: Study) -> Section:
    table = charts.per_layer(study, "gradient_diverted", charts.NORMALIZED)
    return Section(
        "gradient",
        "What undoing cannot restore: the gradient",
        (
            "In the backward pass, batch normalization removes two directions from each unit's gradient: its mean over "
            "the batch, and its component along x̂. That part goes to beta and gamma instead of the layers below, for "
            "all values of gamma and beta. So the layers below learn differently even if a unit is set to undo. The "
            "charts show the diverted share of the gradient's energy.",
        ),
        charts.layer_panels(table, "gradient diverted", "gradient", domain=charts.from_zero(table), form="~%"),
        charts.NORMALIZED,
        PER_LAYER_NOTE,
    )


def drift(study: Study) -> Section:
    panels = []
    by = ("layer", "arm", "step")
    for name in ("location", "log_scale"):
        title = name.replace("_", " ")
        sides = []
        for side in ("in", "out"):
            column = f"drift_{side}_{name}"
            sides.append(study.units.medians(column, (*by, "seed")).spreads(column, by).labelled("side", side))
        both = Table.stack(sides)
        both = both.where(np.isfinite(both["median"]) & (both["median"] > 0))
        for place, layer in enumerate(study.units.names("layer")):
            rows = both.rows(layer=layer)
            if len(rows):
                words = f"Drift of the {title} per step in {layer}, input and output, by arm."
                chart = charts.drift(rows, f"drift of {title} per step")
                panels.append(Panel(f"drift-{name}-{place}", f"{layer}: {title}", words, chart))
    return Section(
        "drift",
        "Drift: is the output more stable than the input?",
        (
            "While a network learns, the distribution that each layer receives keeps moving. The aim of the batch "
            "normalization paper was to stabilize it. Solid lines show how far the input's distribution moves per "
            "step, in standard deviations (location) and in the logarithm of its deviation (log scale). Dotted lines "
            "show the same for the output, which only gamma and beta can move. Both axes are logarithmic. In the arm "
            "fixed the output does not move and has no dotted line.",
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
            "In training, each batch is normalized with its mean and deviation, which differ between batches. Gamma "
            "and beta are the same for all batches, so this difference remains for all their values. The charts show "
            "how much the mean (in units of the variance) and the logarithm of s vary from batch to batch.",
            "Above the first layer, the input comes from rows that were already normalized per batch below. That fixes "
            "most of a unit's mean in each batch, so its noise is much smaller there; the noise of s is not.",
        ),
        tuple(panels),
        charts.NORMALIZED,
        f"{PER_LAYER_NOTE} The scale of the mean's noise is logarithmic.",
    )


def activation(study: Study) -> Section:
    units, by = study.units, ("arm", "seed", "step")
    linear = units.medians("linear_share", by).spreads("linear_share", by[::2])
    dead = units.means("dead", by).spreads("dead", by[::2])
    panels: list[Panel] = []
    for table, name, title, axis, domain in (
        (linear, "linear", "linear share", "linear share", (0.0, 1.0)),
        (dead, "dead", "dead units", "share of dead units", charts.from_zero(dead)),
    ):
        words = f"{axis.capitalize()} against step, by arm."
        panels += charts.curve_panels(table, name, title, words, axis, form="~%", domain=domain)
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
            "The linear share is the part of the data that lies where the activation is nearly linear. A unit is dead "
            "if its output hardly varies compared with the layer's other units or, before a ReLU, if no data is "
            "positive. The position is how many deviations the mean lies above zero, before and after batch "
            "normalization. On the dashed line gamma and beta restore the position of zero, for every scale of the "
            "weights.",
        ),
        tuple(panels),
        tuple(study.arms),
        "Linear share: median over all units. Dead units: their share. Bands are the range over seeds.",
    )


def _outside(units: Table, x: str, y: str, frame: charts.Frame) -> int:
    finite = np.isfinite(units[x]) & np.isfinite(units[y])
    inside = np.ones(len(units), bool)
    for column, (low, high) in ((x, frame.x), (y, frame.y)):
        inside &= (units[column] >= low) & (units[column] <= high)
    return int((finite & ~inside).sum())


def _typical_unit(study: Study) -> tuple[float, str, float] | None:
    """The first seed, the last layer, and the unit closest to the layer's median and width at the end.

    Distances are in units of the layer's scatter, summed over the arms.
    """
    layers, seeds = study.units.names("layer"), study.units["seed"]
    if not layers or not len(seeds):
        return None
    seed = float(seeds.min())
    last = study.units.rows(layer=layers[-1], seed=seed)
    units = np.unique(last["unit"])
    distance, measured = np.zeros(len(units)), np.zeros(len(units))
    for arm in study.arms:
        end = last_step(last.rows(arm=arm))
        place = np.searchsorted(units, end["unit"])
        with np.errstate(invalid="ignore"):  # infinite percentiles of a diverging network
            width = end["out_p85"] - end["out_p15"]
        for values in (end["out_p50"], width):
            finite = np.isfinite(values)
            if finite.any():
                off = np.abs(values[finite] - np.median(values[finite]))
                np.add.at(distance, place[finite], off / (np.median(off) or 1.0))
                np.add.at(measured, place[finite], 1)
    if not measured.any():
        return None
    distance[measured < measured.max()] = np.inf
    return seed, layers[-1], float(units[np.argmin(distance)])
