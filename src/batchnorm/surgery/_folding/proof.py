"""What `fold` and `to_onednn` check: the model before, its outputs on the example, and how far these may change."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.restoring import undisturbed
from batchnorm.surgery._folding.trials import Difference, HasSecond, difference, rounding
from batchnorm.surgery._shared.calling import Example, leaves

# Where rounding alone exceeds the bound, the limit is a multiple of its effect, up to a multiple of the bound and 0.1.
_ROUNDING_FACTOR = 4
_BOUND_FACTOR = 100
_MAX_LIMIT = 0.1


def check_model(tool: str, model: nn.Module, bound: float | None) -> None:
    """Raise ValueError if the bound is not positive, or the model is not ready for inference in eager mode."""
    numeric = isinstance(bound, int | float) and not isinstance(bound, bool)
    if bound is not None and not (numeric and 0 < bound < math.inf):
        raise ValueError(f"{tool}: the bound must be a positive number, got {bound!r}")
    if model.training:
        raise ValueError(f"{tool}: the model is in training mode: call model.eval() first")
    for module in model.modules():
        if isinstance(module, LazyModuleMixin):
            raise ValueError(f"{tool}: the model has lazy layers: run a batch through it first")
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            first = "fold it first, then compile it" if tool == "fold" else "pass the model that is not compiled"
            raise ValueError(f"{tool}: the model is compiled: {first}")
        if any(tensor.is_meta for tensor in (*module.parameters(False), *module.buffers(False))):
            raise ValueError(f"{tool}: the model is on the meta device, without values: load the weights first")


def finite_outputs(tool: str, model: nn.Module, example: Example) -> list[Tensor]:
    """The outputs on the example. Raises ValueError if they cannot be compared."""
    with undisturbed(model):
        outputs = list(leaves(example.run()))
    if difference(outputs, outputs) is None:
        raise ValueError(
            f"{tool}: the model returns no finite floating-point number on the example, so nothing can be compared: "
            "use another example, or let bn.check find what is not finite"
        )
    return outputs


def limit_of(
    model: nn.Module,
    moved: Difference,
    bounds: Iterable[float],
    bound: float | None,
    changed: Iterable[HasSecond],
    example: Example,
) -> tuple[float, float | None]:
    """The limit of the change of the outputs, and the effect of rounding if the limit depends on it.

    `bounds` are those of the types of single layers, `bound` is the caller's, and the outputs of `changed` are rounded.
    """
    limit = bound or max(moved.bound, *bounds, 0.0)
    if bound is not None or moved.max <= limit:
        return limit, None
    with undisturbed(model):
        noise = rounding(list(changed), lambda: leaves(example.run()))
    return max(limit, min(_ROUNDING_FACTOR * noise, _BOUND_FACTOR * limit, _MAX_LIMIT)), noise
