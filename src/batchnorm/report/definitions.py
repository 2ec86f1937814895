"""The definitions of batchnorm.quantities in words, for the pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchnorm.quantities import CLASS_DEFINITIONS
from batchnorm.words import CLASS_NAMES, RULE


@dataclass(frozen=True)
class Definition:
    """A quantity: name, formula (or `cases`), meaning and range."""

    name: str
    formula: str
    meaning: str
    values: str
    cases: tuple[tuple[str, str], ...] = ()


NOTATION = (
    "For one unit and one batch of m values: x is the unit's input to batch normalization, mean and var its mean and "
    "variance over the batch, s = sqrt(var + eps), x̂ = (x - mean)/s. Batch normalization returns "
    "y = gamma·x̂ + beta; g is the gradient of the loss at y."
)

CLASS = Definition(
    "class",
    "; ".join(f"{CLASS_NAMES[name]}: {definition}" for name, definition in CLASS_DEFINITIONS.items()),
    f"Every unit is in exactly one class: the first of these that holds. The answer in a word: {RULE}",
    "one of these words",
    tuple((CLASS_NAMES[name], definition) for name, definition in CLASS_DEFINITIONS.items()),
)

DEFINITIONS = (
    CLASS,
    Definition(
        "undo_distance",
        "sqrt((gamma - s)² + (beta - mean)²)",
        "How far the output is from the un-normalized input: the root mean square of y - x over the batch.",
        "0 or more; 0 is undone",
    ),
    Definition(
        "undo_index",
        "1 - undo_distance / sqrt((1 - s)² + mean²)",
        "How far gamma and beta are on the way from bare normalization (gamma = 1, beta = 0) to the identity (y = x).",
        "1: undone; 0: as far away as bare normalization; below 0: farther, unbounded; not defined if there is nothing "
        "to undo",
    ),
    Definition(
        "undo_angle, bare_angle",
        "the angle between (gamma, beta) and (s, mean); that between (1, 0) and (s, mean)",
        "How far the output is from the un-normalized input up to a positive factor, which the next layer can absorb. "
        "Multiplying the weights below by c > 0 multiplies s and mean by c, and changes neither angle nor the function "
        "of the network. Their ratio is 1 for bare normalization; it has no meaning if bare_angle is below 1°.",
        "0° to 180°; 0° is undone, up to a factor; bare_angle is at most 90°",
    ),
    Definition(
        "position in, position out",
        "mean/s and beta/gamma",
        "How many deviations the mean lies above zero, before and after. Unlike gamma against s, this does not depend "
        "on the scale of the weights below, which is arbitrary.",
        "any; equal where undone",
    ),
    Definition(
        "positive in, positive out",
        "share of x > 0 and share of y > 0",
        "The share that a ReLU would pass without and with batch normalization.",
        "0 to 1",
    ),
    Definition(
        "gradient diverted",
        "(dbeta²/m + dgamma²/(m·var/(var + eps))) / Σg², with dbeta = Σg and dgamma = Σg·x̂",
        "The share of the gradient's energy that goes to beta and gamma and never reaches the layers below: the part "
        "of g along 1 and along x̂. It is removed for all values of gamma and beta, even if y = x exactly.",
        "0 to 1",
    ),
    Definition(
        "batch noise",
        "Var over batches of mean_B, divided by var; Var over batches of log s_B",
        "How much mean and deviation vary between batches at fixed weights. No constant gamma and beta can undo this.",
        "0 or more; about 1/m and 1/(2m) for independent normal values",
    ),
    Definition(
        "drift in, drift out",
        "per step |Δmean|/s and |Δlog s|; |Δbeta|/|gamma| and |Δlog|gamma||",
        "How far the distribution moves per training step, in location and in scale: the input's, measured on the same "
        "rows, and the output's, which gamma and beta set.",
        "0 or more; 0 for the output if gamma and beta are fixed",
    ),
    Definition(
        "linear share",
        "share of the activation's inputs where act' ≥ 0.9·max act'",
        "How much of the data lies where the activation is nearly linear.",
        "0 to 1",
    ),
    Definition(
        "dead",
        f"{CLASS_DEFINITIONS['dead']}; with ReLU or ReLU6 also: no y > 0 in the batch",
        "Units whose output does not depend on the input: the deviation of y is negligible compared with that of the "
        "layer's other units.",
        "0 or 1",
    ),
)

# A study measures on the same rows at every step and sees the outputs of the layers; a training does not.
_MEANINGS = {
    "drift in, drift out": "How far the distribution moved per step since the previous recorded step, in location and "
    "scale. The input's is between two batches and includes their sampling noise; gamma and beta set the output's.",
    "class": f"{CLASS.meaning} At the last step of a closed recording, mean and var are the running ones: the final "
    "model in inference.",
}
_DEAD = Definition(
    "dead",
    f"{CLASS_DEFINITIONS['dead']}; with ReLU or ReLU6 also: no gradient at y although other units have one",
    "Units whose output does not depend on the input. Before a ReLU, no gradient over a whole batch means that no "
    "output of the unit was above 0; an activation outside of the layer is assumed to be a ReLU.",
    "0 or 1; as a share 0 to 1",
)

OF_TRAINING = (
    *(replace(entry, meaning=_MEANINGS.get(entry.name, entry.meaning)) for entry in DEFINITIONS[:-1]),
    _DEAD,
    Definition(
        "train/eval gap",
        "sqrt(((mean - running_mean)/r)² + (s/r - 1)²), r = sqrt(running_var + eps)",
        "How much inference and training differ on this batch: the RMS difference of the outputs, in units of |gamma|.",
        "0 or more; about sqrt(1.5/m) by sampling alone, for independent normal values",
    ),
    Definition(
        "effective learning rate",
        "lr/‖w‖², with w the weights that produce the unit",
        "Before a norm only the direction of w matters, not its length. This is how fast gradient descent turns it.",
        "0 or more; unknown without the weights",
    ),
    Definition(
        "covariate shift",
        "‖G − G′‖, G the gradient of the weights below a layer, G′ the same after the layers below have been updated",
        "How much the update of the layers below changes a layer's gradient (Santurkar et al., 2018). Measured by "
        "probes with a loss.",
        "0 or more; the cosine between G and G′ is -1 to 1",
    ),
    Definition(
        "typical unit, band",
        "the median over a layer's units; the 15th to the 85th percentile over them",
        "The lines and bands of the charts.",
        "as the quantity",
    ),
)
