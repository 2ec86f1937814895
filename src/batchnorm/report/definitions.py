"""How each quantity is defined, for the page: the same definitions as batchnorm.quantities, in plain words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchnorm.quantities import CLASS_DEFINITIONS
from batchnorm.words import CLASS_NAMES, RULE


@dataclass(frozen=True)
class Definition:
    """A quantity: its name, its formula, what it means, and the values it takes; `cases` in place of one formula."""

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
    f"Every unit is in exactly one class, the first of these that holds. The answer in a word: {RULE}",
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
        "How much of the way from bare normalization (gamma = 1, beta = 0) back to the identity (y = x) has been gone.",
        "1: undone; 0: as far away as bare normalization; below 0: farther, without bound; not defined where there is "
        "nothing to undo",
    ),
    Definition(
        "undo_angle, bare_angle",
        "the angle between (gamma, beta) and (s, mean); that between (1, 0) and (s, mean)",
        "How far the output is from the un-normalized input up to a positive factor, which the next layer can absorb. "
        "Multiplying the weights below by c > 0 multiplies s and mean by c, and changes neither angle nor what the "
        "network computes. Their ratio is 1 for bare normalization; it has no meaning where bare_angle is below 1°.",
        "0° to 180°; 0° is undone, up to a factor; bare_angle is at most 90°",
    ),
    Definition(
        "position in, position out",
        "mean/s and beta/gamma",
        "How many deviations the distribution's mean lies above zero, before and after. Unlike gamma against s, "
        "this does not depend on the scale of the weights below, which can change without changing what"
        " the network computes.",
        "any; equal where undone",
    ),
    Definition(
        "positive in, positive out",
        "share of x > 0 and share of y > 0",
        "What a ReLU would let pass without and with batch normalization.",
        "0 to 1",
    ),
    Definition(
        "gradient diverted",
        "(dbeta²/m + dgamma²/(m·var/(var + eps))) / Σg², with dbeta = Σg and dgamma = Σg·x̂",
        "The share of the gradient's energy that goes to beta and gamma and never reaches the layers below: the part "
        "of g along 1 and along x̂. It is taken out whatever gamma and beta are, also where y = x exactly.",
        "0 to 1",
    ),
    Definition(
        "batch noise",
        "Var over batches of mean_B, divided by var; Var over batches of log s_B",
        "How much a batch's own mean and deviation differ from batch to batch at fixed weights: what no constant gamma "
        "and beta can undo.",
        "0 or more; about 1/m and 1/(2m) for independent normal values",
    ),
    Definition(
        "drift in, drift out",
        "per step |Δmean|/s and |Δlog s|; |Δbeta|/|gamma| and |Δlog|gamma||",
        "How far the distribution moves per step of training, in location and in scale: the input's, measured on the "
        "same rows, and the output's, which gamma and beta set.",
        "0 or more; 0 for the output where gamma and beta are held fixed",
    ),
    Definition(
        "linear share",
        "share of the activation's inputs where act' ≥ 0.9·max act'",
        "How much of the data meets the activation where it is nearly a straight line.",
        "0 to 1",
    ),
    Definition(
        "dead",
        f"{CLASS_DEFINITIONS['dead']}; with ReLU or ReLU6 also: no y > 0 in the batch",
        "Units that pass on nothing which depends on the input: the deviation of y is next to nothing against that of "
        "the other units in the layer.",
        "0 or 1",
    ),
)

# A study measures on the same rows at every step and sees what the layers return; a training does not.
_OTHERWISE = {
    "drift in, drift out": "How far the distribution moved per step since the recorded step before, in location and in "
    "scale. The input's is between two batches and holds their sampling noise, too; the output's is what gamma and "
    "beta set.",
    "class": f"{CLASS.meaning} At the last step of a recording that was closed, mean and var are the running ones: the "
    "model as it was left, in inference.",
}
_DEAD = Definition(
    "dead",
    f"{CLASS_DEFINITIONS['dead']}; with ReLU or ReLU6 also: no gradient at y although other units of the layer have "
    "one",
    "Units that pass on nothing which depends on the input. Behind a ReLU, no gradient over a whole batch means that "
    "none of the unit's outputs was above 0; where the activation is not inside of the layer, it is taken for a ReLU.",
    "0 or 1; as a share 0 to 1",
)

OF_TRAINING = (
    *(replace(each, meaning=_OTHERWISE.get(each.name, each.meaning)) for each in DEFINITIONS[:-1]),
    _DEAD,
    Definition(
        "train/eval gap",
        "sqrt(((mean - running_mean)/r)² + (s/r - 1)²), r = sqrt(running_var + eps)",
        "How far inference would be from training on this batch: the root mean square of the difference of the "
        "outputs, in units of |gamma|.",
        "0 or more; about sqrt(1.5/m) by sampling alone, for independent normal values",
    ),
    Definition(
        "effective learning rate",
        "lr/‖w‖², with w the weights that produce the unit",
        "Behind a norm only the direction of w matters, not its length: this is how fast gradient descent turns it.",
        "0 or more; unknown where the weights are not known",
    ),
    Definition(
        "covariate shift",
        "‖G − G′‖, G the gradient of the weights below a layer, G′ the same after the layers below have been updated",
        "How much the update of the layers below changes what a layer is told (Santurkar et al., 2018). Measured by "
        "probes with a loss.",
        "0 or more; the cosine between G and G′ is -1 to 1",
    ),
    Definition(
        "typical unit, band",
        "the median over a layer's units; the 15th to the 85th percentile over them",
        "What lines and bands show.",
        "as the quantity",
    ),
)
