"""Rules on a layer as it is kept: in a model at rest, a state dict or a file. They need no steps of a training."""

from __future__ import annotations

import numpy as np

from batchnorm.checks.findings import (
    Finding,
    Kind,
    Observed,
    Rule,
    Severity,
    indices,
)
from batchnorm.checks.rules.state import (
    HALF,
    MANY,
    STARTING_WEIGHT,
    UNTRAINED,
    at_start,
    starting_share,
    why_at_start,
)
from batchnorm.checks.rules.state import RULES as RULES_OF_STATE
from batchnorm.quantities import CLASSES
from batchnorm.quantities import UNDONE as UNDONE_FROM
from batchnorm.words import plural

HALF_MAX = 65504.0
"""The largest float16."""
HALF_MIN = 2.0**-24
"""The smallest float16 above 0."""
HUGE = 1e12
"""A deviation of a million: networks that work stay ten thousand times below."""
EPS_STEP = 0.1
"""A change of an output's scale that a network feels."""

SHAPES = Kind(
    "mismatched-shapes",
    "Tensors that do not fit together",
    "A layer has one gamma, beta, running mean and running variance a channel: these cannot be loaded together.",
    "Look at how the file was made: a renamed or pruned layer, or two layers under one name.",
)
NO_COUNT = Kind(
    "no-batch-count",
    "num_batches_tracked is missing",
    "PyTorch before 0.4.1 and other frameworks do not store it; only momentum=None needs it.",
    "Nothing, if load_state_dict takes it; else add a zero of type int64 under that name.",
)
CONVERTED = Kind(
    "converted",
    "Statistics without a count",
    "They are trained but no batch was counted: they come from another framework, or the count was reset.",
    "Make sure that eps (1e-3 in Keras) and momentum (1 minus the other's) came along: no state dict holds them.",
)
UNTRAINED_INFERENCE = Kind(
    "never-updated",
    "Trained parameters over statistics that never saw data",
    "gamma and beta have been learned, but the running mean and variance are their initial 0 and 1: in eval mode the "
    "network is another one.",
    "Recalibrate with batchnorm.recalibrate(model, batches), or find where the statistics were lost.",
)
BELOW_EPS = Kind(
    "variance-below-eps",
    "Running variance below eps",
    "The unit is divided by about sqrt(eps) and not by its own deviation: eps sets the scale of its output.",
    "Keep eps as it was in training; prune the unit if its input is constant.",
    causes=("dead-units", "constant-channels"),
)
FLOAT16 = Kind(
    "float16-range",
    "Statistics outside the range of float16",
    "Stored or computed in float16 they become infinite or zero; in float32 they are fine.",
    "Keep batch norm in float32 (autocast does), or fold it before casting.",
    causes=("huge-variance", "variance-below-eps", "dead-units", "constant-channels"),
)
HUGE_VARIANCE = Kind(
    "huge-variance",
    "Huge running variance",
    "The input's deviation is a million or more: what comes before has diverged, or one batch was poisoned.",
    "Recalibrate the statistics; if they are as large again, look at the layers below.",
)
EPS = Kind(
    "eps-sensitive",
    "eps would make a difference",
    "The file does not say eps. With 1e-3 (Keras, EfficientNet) in place of 1e-5 (PyTorch's default), or the other way "
    "round, these outputs are scaled differently.",
    "Set the eps that the network was trained with.",
)
TRAINING_MODE = Kind(
    "training-mode",
    "Exported in training mode",
    "The node normalizes by the batch at hand: outputs depend on what else is in the batch.",
    "Export again after model.eval(), or fold the batch norm before the export.",
)
UNDONE = Kind(
    "undone-units",
    "Units that undo their normalization",
    "gamma is near sqrt(running_var + eps) and beta near the running mean: in eval mode the layer nearly returns its "
    "input.",
    "No action needed.",
)


def mismatched_shapes(layer: Observed) -> Finding | None:
    """gamma, beta and the statistics must be vectors of one length, and both statistics must be there."""
    shapes = layer.settings.get("shapes")
    if not shapes:
        return None
    told = ", ".join(f"{role} {'missing' if shape is None else list(shape)}" for role, shape in shapes.items())
    return Finding(SHAPES, "error", layer.name, told, float(len(shapes)))


def statistics_of_no_batch(layer: Observed) -> Finding | None:
    """Learned gamma or beta, but statistics at their start: fatal in inference. Not: a network at its start."""
    gamma, beta = layer["gamma"], layer["beta"]
    if not at_start(layer):
        return None
    learned = np.isfinite(gamma).any() and len(np.unique(gamma)) > 1
    moved = np.isfinite(beta).any() and bool((beta != 0).any())
    if not (learned or moved):
        return None
    text = f"running mean 0 and variance 1{why_at_start(layer)}, gamma and beta learned"
    return Finding(UNTRAINED_INFERENCE, "error", layer.name, text, 1.0)


def hardly_trained(layer: Observed) -> Finding | None:
    """(1 - momentum)^batches of the statistics is still their start; momentum 0.1 where it is not known.

    Not: statistics exactly at their start, which are `untrained_statistics`'.
    """
    weight = starting_share(layer)
    if weight <= STARTING_WEIGHT or at_start(layer) or not _finite(layer):
        return None
    after = f"after {plural(layer.settings['batches'], 'batch', 'batches')}, unless they were recalibrated"
    text = f"{100 * weight:.0f}% of the statistics are still their start {after}"
    return Finding(UNTRAINED, "warning", layer.name, text, weight)


def converted(layer: Observed) -> Finding | None:
    """No batch counted, but statistics that are not the initial ones. Not: where `eps_sensitive` says more."""
    if not _is_converted(layer) or eps_sensitive(layer) is not None:
        return None
    return Finding(CONVERTED, "note", layer.name, "num_batches_tracked is 0, the statistics are trained", 0.0)


def no_batch_count(layer: Observed) -> Finding | None:
    """PyTorch's names without PyTorch's count."""
    settings = layer.settings
    if not settings.get("stored") or settings.get("framework") != "PyTorch" or settings.get("batches") is not None:
        return None
    return Finding(NO_COUNT, "note", layer.name, "has no num_batches_tracked", 0.0)


def variance_below_eps(layer: Observed) -> Finding | None:
    """0 < running variance < eps; those at 0 or below are `running_variance`'s."""
    var, eps = layer["running_var"][-1], float(layer.settings.get("eps", 1e-5))
    units = np.flatnonzero((var > 0) & (var < eps))
    if not len(units):
        return None
    lowest = float(var[units].min())
    assumed = "" if layer.settings.get("eps_known") else " (eps assumed)"
    text = f"{len(units):,} of {plural(layer.units, 'unit')}, the least {lowest:.2g}, below eps {eps:g}{assumed}"
    return _shared(BELOW_EPS, layer, units, text, "warning", HALF)


def eps_sensitive(layer: Observed) -> Finding | None:
    """A converted layer in many of whose units 1e-3 against 1e-5 changes the output's scale by a tenth and more."""
    if layer.settings.get("eps_known") or not _is_converted(layer):
        return None
    var = layer["running_var"][-1]
    with np.errstate(invalid="ignore"):
        changed = np.sqrt((var + 1e-3) / (var + 1e-5)) > 1 + EPS_STEP
    units = np.flatnonzero(changed & (var > 0))
    if len(units) < MANY * layer.units:
        return None
    text = (
        f"{len(units):,} of {plural(layer.units, 'unit')} are scaled by 10% or more differently with eps 1e-3 and 1e-5"
    )
    return Finding(EPS, "note", layer.name, text, len(units) / layer.units, indices(units))


def outside_float16(layer: Observed) -> Finding | None:
    """Statistics that float16 would make infinite, or a variance that it would make zero."""
    mean, var = np.abs(layer["running_mean"][-1]), layer["running_var"][-1]
    over = (np.isfinite(mean) & (mean > HALF_MAX)) | (np.isfinite(var) & (var > HALF_MAX))
    under = (var > 0) & (var < HALF_MIN / 2)
    units = np.flatnonzero(over | under)
    if not len(units):
        return None
    parts = [f"{int(over.sum()):,} above {HALF_MAX:,.0f}"] * bool(over.any())
    parts += [f"{int(under.sum()):,} below the smallest float16"] * bool(under.any())
    text = f"running statistics of {' and '.join(parts)}, of {plural(layer.units, 'unit')}"
    return Finding(
        FLOAT16, "note", layer.name, text, float(np.nanmax(np.where(np.isfinite(var), var, 0.0))), indices(units)
    )


def huge_variance(layer: Observed) -> Finding | None:
    """Finite, and beyond anything that a network works with."""
    var = layer["running_var"][-1]
    units = np.flatnonzero(np.isfinite(var) & (var > HUGE))
    if not len(units):
        return None
    largest = float(var[units].max())
    text = f"running variance up to {largest:.2g} in {len(units):,} of {plural(layer.units, 'unit')}"
    return Finding(HUGE_VARIANCE, "warning", layer.name, text, largest, indices(units))


def training_mode(layer: Observed) -> Finding | None:
    """ONNX's attribute of the node."""
    if not layer.settings.get("training_mode"):
        return None
    return Finding(TRAINING_MODE, "error", layer.name, "training_mode is 1", 1.0)


def undone_units(layer: Observed) -> Finding | None:
    """Half of the units or more undone, by the running statistics."""
    units = np.flatnonzero(layer["class"][-1] == CLASSES.index("undone"))
    if not len(units) or at_start(layer) or len(units) < HALF * layer.units:
        return None
    index = layer["undo_index"][-1]
    median = float(np.median(index[np.isfinite(index)]))
    share = f"{len(units):,} of {plural(layer.units, 'unit')}"
    text = f"{share} at undo_index {UNDONE_FROM:g} or more, the median {median:.2f}"
    return Finding(UNDONE, "note", layer.name, text, median, indices(units))


RULES: tuple[Rule, ...] = (
    mismatched_shapes,
    statistics_of_no_batch,
    training_mode,
    *RULES_OF_STATE,
    huge_variance,
    hardly_trained,
    variance_below_eps,
    outside_float16,
    converted,
    eps_sensitive,
    no_batch_count,
    undone_units,
)


def _is_converted(layer: Observed) -> bool:
    return layer.settings.get("batches") == 0 and not at_start(layer) and _finite(layer)


def _finite(layer: Observed) -> bool:
    """Whether there are running statistics, all of them finite: those with a NaN say nothing about their history."""
    statistics = layer["running_mean"], layer["running_var"]
    return layer.units > 0 and all(bool(np.isfinite(values).all()) for values in statistics)


def _shared(kind: Kind, layer: Observed, units: np.ndarray, text: str, worst: Severity, from_share: float) -> Finding:
    share = len(units) / layer.units
    return Finding(kind, worst if share >= from_share else "note", layer.name, text, share, indices(units))
