"""How the quantities that only a watched training has are defined, for its page."""

from __future__ import annotations

from batchnorm.quantities import CLASS_DEFINITIONS
from batchnorm.report.definitions import CLASS, DEFINITIONS, Definition

# Told otherwise than in a study, which measures on the same rows at every step and sees what the layers return.
_OTHERWISE = {
    "drift in, drift out": Definition(
        "drift in, drift out",
        "per step |Δmean|/s and |Δlog s|; |Δbeta|/|gamma| and |Δlog|gamma||",
        "How far the distribution moved per step since the recorded step before, in location and in scale. The input's "
        "is between two batches and holds their sampling noise, too; the output's is what gamma and beta set.",
        "0 or more; 0 for the output where gamma and beta are held fixed",
    ),
    "dead": Definition(
        "dead",
        f"{CLASS_DEFINITIONS['dead']}; with ReLU or ReLU6 also: no gradient at y although other units of the layer "
        "have one",
        "Units that pass on nothing which depends on the input. Behind a ReLU, no gradient over a whole batch means "
        "that none of the unit's outputs was above 0; where the activation is not inside of the layer, it is taken for "
        "a ReLU.",
        "0 or 1; as a share 0 to 1",
    ),
    "class": Definition(
        CLASS.name,
        CLASS.formula,
        f"{CLASS.meaning} At the last step of a recording that was closed, mean and var are the running ones: the "
        "model as it was left, in inference.",
        CLASS.values,
        CLASS.cases,
    ),
}

OF_TRAINING = (
    *(_OTHERWISE.get(definition.name, definition) for definition in DEFINITIONS),
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
