"""Rules for the layers of a model, a state dict or a file: per layer, and across layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from batchnorm.checks import findings
from batchnorm.checks.findings import HALF, MANY, UNTRAINED, Finding, Kind, LayerData, Rule, at_start, why_at_start
from batchnorm.checks.sources import Network
from batchnorm.quantities import CLASSES
from batchnorm.quantities import UNDONE as UNDONE_FROM
from batchnorm.words import percent, plural

HALF_MAX = 65504.0
"""The largest float16."""
HALF_MIN = 2.0**-24
"""The smallest float16 above 0."""
HUGE = 1e12
"""A standard deviation of a million; those of working networks are ten thousand times smaller."""
EPS_STEP = 0.1
"""Threshold of the relative change of an output's scale: a smaller one does not matter."""
EPS_LOW, EPS_HIGH = 1e-5, 1e-3
"""The usual values: the default of PyTorch, and that of Keras and of networks that came from there."""

SHAPES = Kind(
    "mismatched-shapes",
    "Tensors that do not fit together",
    "A layer has one gamma, beta, running mean and running variance per channel: these cannot be loaded together.",
    "Look at how the file was made: perhaps a layer was renamed or pruned, or two layers have one name.",
)
NO_COUNT = Kind(
    "no-batch-count",
    "num_batches_tracked is missing",
    "PyTorch before 0.4.1 and other frameworks do not store it; only momentum=None needs it.",
    "No action needed if load_state_dict accepts it; else add a zero of type int64 under that name.",
)
CONVERTED = Kind(
    "converted",
    "Statistics without a count",
    "They are trained but no batch was counted: they come from another framework, or the count was reset.",
    "Make sure that eps (1e-3 in Keras) and momentum (1 minus Keras' value) were converted: no state dict holds them.",
)
UNTRAINED_INFERENCE = Kind(
    "never-updated",
    "Trained parameters with initial running statistics",
    "gamma and beta have been learned, but the running mean and variance are their initial 0 and 1: in eval mode the "
    "network computes something else.",
    "Recalibrate with batchnorm.recalibrate(model, batches), or find where the statistics were lost.",
)
BELOW_EPS = Kind(
    "variance-below-eps",
    "Running variance below eps",
    "The unit is divided by about sqrt(eps) instead of its standard deviation: eps sets the scale of its output.",
    "Keep the eps of training; prune the unit if its input is constant.",
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
    "The input's standard deviation is a million or more: a layer below has diverged, or one batch had huge values.",
    "Recalibrate the statistics; if they are as large again, look at the layers below.",
)
EPS = Kind(
    "eps-sensitive",
    "Outputs depend on the unknown eps",
    "The file does not store eps. With 1e-3 (Keras, EfficientNet) in place of 1e-5 (PyTorch's default), or the other "
    "way round, these outputs are scaled differently.",
    "Set the eps that the network was trained with. batchnorm.stamp(model) keeps eps in the files of torch.save.",
    causes=("variance-below-eps", "dead-units", "constant-channels"),
)
TRAINING_MODE = Kind(
    "training-mode",
    "Exported in training mode",
    "The node normalizes by the current batch: outputs depend on what else is in the batch.",
    "Export again after model.eval(), or fold the batch norm before the export.",
)
SAVED_IN_TRAINING = Kind(
    "saved-in-training-mode",
    "Saved in training mode",
    "The file holds the model itself: as loaded, the layer normalizes by the current batch and updates its running "
    "statistics.",
    "Call model.eval() after loading, before inference.",
)
UNFUSED = Kind(
    "unfused-norm",
    "Left unfused behind a convolution or linear map",
    "In eval mode the layer is one multiplication and one addition per channel, which the weights before it can apply.",
    "Run batchnorm.fold(model, example) before the export, unless the compiler that reads the graph folds it.",
)
UNDONE = Kind(
    "undone-units",
    "Units that undo their normalization",
    "gamma is near sqrt(running_var + eps) and beta near the running mean: in eval mode the layer nearly returns its "
    "input.",
    "No action needed.",
)


def mismatched_shapes(layer: LayerData) -> Finding | None:
    """gamma, beta and the statistics must be vectors of one length, and both statistics must exist."""
    shapes = layer.settings.get("shapes")
    if not shapes:
        return None
    text = ", ".join(f"{role} {'missing' if shape is None else list(shape)}" for role, shape in shapes.items())
    return layer.finding(SHAPES, "error", text, float(len(shapes)))


def statistics_of_no_batch(layer: LayerData) -> Finding | None:
    """Learned gamma or beta with initial statistics: inference is wrong. Not reported: an untrained network."""
    gamma, beta = layer["gamma"], layer["beta"]
    learned = np.isfinite(gamma).any() and len(np.unique(gamma)) > 1
    moved = np.isfinite(beta).any() and (beta != 0).any()
    if not at_start(layer) or not (learned or moved):
        return None
    text = f"running mean 0 and variance 1{why_at_start(layer)}, gamma and beta learned"
    return layer.finding(UNTRAINED_INFERENCE, "error", text, 1.0)


def hardly_trained(layer: LayerData) -> Finding | None:
    """The initial values still have weight (1 - momentum)^batches, with momentum 0.1 if unknown.

    Not reported: exactly initial statistics, which `untrained_statistics` reports.
    """
    weight = findings.starting_share(layer)
    if weight <= findings.STARTING_WEIGHT or at_start(layer) or not _has_finite_statistics(layer):
        return None
    after = f"after {plural(layer.settings['batches'], 'batch', 'batches')}, unless they were recalibrated"
    text = f"{100 * weight:.0f}% of the statistics are still the initial values {after}"
    return layer.finding(UNTRAINED, "warning", text, weight)


def converted(layer: LayerData) -> Finding | None:
    """Trained statistics without a counted batch. Not reported if `eps_sensitive` is, which says more."""
    if not _is_converted(layer) or eps_sensitive(layer) is not None:
        return None
    return layer.finding(CONVERTED, "note", "num_batches_tracked is 0, the statistics are trained", 0.0)


def no_batch_count(layer: LayerData) -> Finding | None:
    """A layer with PyTorch's names and without num_batches_tracked."""
    settings = layer.settings
    if not settings.get("stored") or settings.get("framework") != "PyTorch" or settings.get("batches") is not None:
        return None
    return layer.finding(NO_COUNT, "note", "has no num_batches_tracked", 0.0)


def variance_below_eps(layer: LayerData) -> Finding | None:
    """0 < running variance < eps; `running_variance` reports those at 0 or below."""
    var, eps = layer["running_var"][-1], float(layer.settings.get("eps", 1e-5))
    units = np.flatnonzero((var > 0) & (var < eps))
    if not len(units):
        return None
    lowest = float(var[units].min())
    assumed = "" if layer.settings.get("eps_known") else " (eps assumed)"
    text = f"{layer.counted(units)} below eps {eps:g}{assumed}, the smallest {lowest:.2g}"
    share = len(units) / layer.units
    return layer.finding(BELOW_EPS, "warning" if share >= HALF else "note", text, share, units)


def eps_sensitive(layer: LayerData) -> Finding | None:
    """A layer of unknown eps whose output's scale differs by a tenth or more between 1e-3 and 1e-5, in many units."""
    if layer.settings.get("eps_known") or at_start(layer) or not _has_finite_statistics(layer):
        return None
    var = layer["running_var"][-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        step = np.where(var > 0, np.sqrt((var + EPS_HIGH) / (var + EPS_LOW)) - 1, 0.0)
    units = np.flatnonzero(step > EPS_STEP)
    if len(units) < MANY * layer.units:
        return None
    typical, most = percent(float(np.median(step[units]))), percent(float(step.max()))
    text = (
        f"the scale of {layer.counted(units)} differs by 10% or more between eps 1e-3 and 1e-5: "
        f"typically by {typical}, at most by {most}"
    )
    return layer.finding(EPS, "note", text, len(units) / layer.units, units)


def outside_float16(layer: LayerData) -> Finding | None:
    """Statistics that are infinite in float16, or a variance that is zero in it."""
    mean, var = np.abs(layer["running_mean"][-1]), layer["running_var"][-1]
    over = (np.isfinite(mean) & (mean > HALF_MAX)) | (np.isfinite(var) & (var > HALF_MAX))
    under = (var > 0) & (var < HALF_MIN / 2)
    units = np.flatnonzero(over | under)
    if not len(units):
        return None
    parts = [f"{int(over.sum()):,} above {HALF_MAX:,.0f}"] * bool(over.any())
    parts += [f"{int(under.sum()):,} below the smallest float16"] * bool(under.any())
    text = f"running statistics of {' and '.join(parts)}, of {plural(layer.units, 'unit')}"
    largest = float(np.nanmax(np.where(np.isfinite(var), var, 0.0)))
    return layer.finding(FLOAT16, "note", text, largest, units)


def huge_variance(layer: LayerData) -> Finding | None:
    """A finite running variance above that of any working network."""
    var = layer["running_var"][-1]
    units = np.flatnonzero(np.isfinite(var) & (var > HUGE))
    if not len(units):
        return None
    largest = float(var[units].max())
    text = f"running variance up to {largest:.2g} in {layer.counted(units)}"
    return layer.finding(HUGE_VARIANCE, "warning", text, largest, units)


def training_mode(layer: LayerData) -> Finding | None:
    """A node of ONNX or of a graph of torch that is in training mode, or a pickled module."""
    if layer.settings.get("training_mode"):
        operator = layer.settings.get("operator")
        text = f"{operator} has training=True" if operator else "training_mode is 1"
        return layer.finding(TRAINING_MODE, "error", text, 1.0)
    if layer.settings.get("stored") and layer.settings.get("training") is True:
        return layer.finding(SAVED_IN_TRAINING, "note", "training is True", 1.0)
    return None


def unfused(layer: LayerData) -> Finding | None:
    """A norm of a graph in eval mode that alone reads the output of a convolution or linear map. Graphs only."""
    before = layer.settings.get("map_before")
    if before is None:
        return None
    return layer.finding(UNFUSED, "note", f"follows {before or 'a map'} directly", 1.0)


def undone_units(layer: LayerData) -> Finding | None:
    """At least half of the units are undone, measured by the running statistics."""
    units = np.flatnonzero(layer["class"][-1] == CLASSES.index("undone"))
    if not len(units) or at_start(layer) or len(units) < HALF * layer.units:
        return None
    index = layer["undo_index"][-1]
    median = float(np.median(index[np.isfinite(index)]))
    text = f"{layer.counted(units)} at undo_index {UNDONE_FROM:g} or more, the median {median:.2f}"
    return layer.finding(UNDONE, "note", text, median, units)


RULES: tuple[Rule, ...] = (
    mismatched_shapes,
    statistics_of_no_batch,
    training_mode,
    unfused,
    *findings.RULES,
    huge_variance,
    hardly_trained,
    variance_below_eps,
    outside_float16,
    converted,
    eps_sensitive,
    no_batch_count,
    undone_units,
)


def _is_converted(layer: LayerData) -> bool:
    return layer.settings.get("batches") == 0 and not at_start(layer) and _has_finite_statistics(layer)


def _has_finite_statistics(layer: LayerData) -> bool:
    """Whether all running statistics are finite: a NaN does not show how they were trained."""
    statistics = layer["running_mean"], layer["running_var"]
    return layer.units > 0 and all(bool(np.isfinite(values).all()) for values in statistics)


DEAD_BIAS = 1e-3
"""Threshold of |bias|: a smaller one counts as 0. It has decayed, or was never used."""

BIAS = Kind(
    "bias-under-norm",
    "A bias right before a batch norm",
    "Without an activation between them, subtracting the mean removes the bias: it changes nothing and gets no "
    "gradient, but costs memory and a pass over it.",
    "In this case build the layer below with bias=False; an existing bias can be subtracted from the running mean.",
)
IDENTICAL = Kind(
    "identical-statistics",
    "Layers with the same running statistics",
    "Two layers that see different inputs do not have the same mean and variance to the last digit: one tensor is "
    "shared, or was copied from one layer to the other.",
    "Unless the layers are shared on purpose, recalibrate the statistics.",
)
MIXED_EPS = Kind(
    "mixed-eps",
    "Layers with different eps",
    "Most networks use one eps: a different one in a few layers often comes from a conversion.",
    "Compare with the network's definition.",
)
NONE_LEFT = Kind(
    "no-norms",
    "No batch norm",
    "There are no running statistics.",
    "No action needed if the norms were folded into the layers before them, or if the network has no norms.",
)

Across = Callable[[Network], Iterator[Finding]]


def bias_under_norm(network: Network) -> Iterator[Finding]:
    """A bias of the norm's length right before it in the order of the tensors."""
    for layer in network.layers:
        below = layer.settings.get("below")
        if below is None:
            continue
        name, largest = below
        state = "at 0" if largest < DEAD_BIAS else f"up to {largest:.2g}"
        yield layer.finding(BIAS, "note", f"{name} is right before it, {state}", largest)


def identical_statistics(network: Network) -> Iterator[Finding]:
    """Layers with statistics that are equal in every unit and not the initial ones. Copies of a model do not count."""
    first: dict[tuple[str, bytes, bytes], str] = {}
    for layer in network.layers:
        mean, var = layer["running_mean"], layer["running_var"]
        constant = layer.units < 2 or (np.ptp(mean) == 0 and np.ptp(var) == 0)  # initial values, or set by hand
        if constant or not (np.isfinite(mean).all() and np.isfinite(var).all()):
            continue
        key = (str(layer.settings.get("copy", "")), mean.tobytes(), var.tobytes())
        if key in first:
            text = f"running mean and variance equal to the last digit to those of {first[key]}"
            yield layer.finding(IDENTICAL, "warning", text, float(layer.units))
        first.setdefault(key, layer.name)


def mixed_eps(network: Network) -> Iterator[Finding]:
    """Layers whose known eps differs from the most frequent one."""
    known = [layer for layer in network.layers if layer.settings.get("eps_known")]
    values = [float(layer.settings["eps"]) for layer in known]
    if len({float(np.float32(value)) for value in values}) < 2:
        return
    common = max(dict.fromkeys(values), key=values.count)
    for layer, eps in zip(known, values, strict=True):
        if np.float32(eps) != np.float32(common):
            yield layer.finding(MIXED_EPS, "note", f"eps {eps:g}, others have {common:g}", eps)


def no_norms(network: Network) -> Iterator[Finding]:
    """A network without batch norm."""
    if not network.layers:
        biases = plural(network.biases, "is a bias", "are biases")
        text = f"none among {plural(network.tensors, 'tensor')}, of which {biases}"
        yield Finding(NONE_LEFT, "note", "", text, float(network.biases))


ACROSS: tuple[Across, ...] = (bias_under_norm, identical_statistics, mixed_eps, no_norms)
