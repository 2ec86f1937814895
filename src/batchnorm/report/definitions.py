"""How each quantity is defined, for the page: the same definitions as batchnorm.quantities, in plain words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """A quantity: its name, its formula, what it means, and the values it takes."""

    name: str
    formula: str
    meaning: str
    values: str


NOTATION = (
    "For one unit and one batch of m values: x is the unit's input to batch normalization, mean and var its mean and "
    "variance over the batch, s = sqrt(var + eps), x̂ = (x - mean)/s. Batch normalization returns "
    "y = gamma·x̂ + beta; g is the gradient of the loss at y."
)

DEFINITIONS = (
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
        "1: undone; 0: as far away as bare normalization; below 0: farther, without bound",
    ),
    Definition(
        "nearer undone",
        "1 where undo_distance < sqrt((gamma - 1)² + beta²), else 0",
        "Whether y lies nearer to x than to x̂. Its mean over units is the share of units nearer to undone.",
        "0 or 1; as a share 0 to 1",
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
        "|gamma| < 0.01; with ReLU also: no y > 0 in the batch",
        "Units that are probably lost. |gamma| depends on the scale of the weights below: a unit set to undo a small s "
        "counts, and is not lost.",
        "0 or 1",
    ),
)
