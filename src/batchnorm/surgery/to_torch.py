"""to_torch(): replace this package's classes, so that a model loads where the package is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from batchnorm import layers as ours
from batchnorm.restoring import all_or_nothing
from batchnorm.surgery._shared.activations import Activation, module_of
from batchnorm.surgery._shared.layers import find, names_of, original, warn_of_none
from batchnorm.surgery._shared.norm import FROZEN
from batchnorm.surgery.convert import revert
from batchnorm.surgery.to_group_norm import GroupNorm, Replaced, Replacing, replace_by
from batchnorm.variants import EVAL_ONLY
from batchnorm.variants.sync import SyncBatchNorm

__all__ = ["to_torch"]

_BASES: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (ours.BatchNorm1d, nn.BatchNorm1d),
    (ours.BatchNorm2d, nn.BatchNorm2d),
    (ours.BatchNorm3d, nn.BatchNorm3d),
    (SyncBatchNorm, nn.SyncBatchNorm),
    (GroupNorm, nn.GroupNorm),
)


def to_torch(model: nn.Module, also: Sequence[type[nn.Module]] = ()) -> Replacing:
    """Turn this package's layers into torch.nn's that compute the same, in place.

    The model can then be loaded where this package is not installed. `convert` is reverted. A layer without an
    activation becomes torch.nn's class of the same name. With an activation it becomes torch.nn.Sequential(norm,
    activation), and its keys change, from name.weight to name.0.weight: see `renamed` of the record. The same holds for
    `GroupNorm`. Every layer stays the same object, with its parameters, buffers, hooks and mode.

    Layers that train differently from torch.nn's (BatchRenorm, GhostBatchNorm, `accumulate`, `batch_of_one`) are
    accepted in eval mode only, in which they compute the same.

    torch.nn's layers take no residual, mask or lengths: calls with one raise TypeError afterwards. Change the calling
    module first.

    Args:
        model: changed in place; nothing if an error is raised.
        also: subclasses that normalize as their base class does, to be included. Their own forward is lost.

    Returns:
        What each layer became.

    Raises TypeError if `model` is not a torch.nn.Module. Raises ValueError, with all names, for layers that cannot be
    replaced: frozen layers (train() would unfreeze torch.nn's: unfreeze them first), lazy layers without a
    shape, subclasses that are not in `also`.
    """
    norms, skipped = find("to_torch", model, also, may_be_empty=True)
    reasons = {layer.name: layer.why for layer in skipped}
    accepted = {norm.layer for norm in norms}
    templates: dict[nn.Module, nn.Module] = {}
    problems, layers = [], []
    renamed: dict[str, str] = {}
    for module, names in names_of(model).items():
        name = names[0] or "the model"
        cls = original(type(module))
        if not any(base.__module__.split(".")[0] == "batchnorm" for base in cls.__mro__):
            continue
        settings = getattr(module, "accumulate", 1), getattr(module, "batch_of_one", "error")
        if type(module) in FROZEN:
            problems.append(f"{name} is frozen: unfreeze it first")
        elif module.training and (isinstance(module, EVAL_ONLY) or settings != (1, "error")):
            problems.append(f"{name} trains differently from all layers of torch.nn: call .eval() first")
        elif module in accepted or cls is GroupNorm:
            templates[module] = template = _template(module)
            children = [type(child).__name__ for child in template.children()]
            now = f"torch.nn.{type(template).__name__}" + (f"({', '.join(children)})" if children else "")
            layers.append(Replaced(tuple(names), cls.__name__, now))
            keys = [pair for pair in zip(module.state_dict(), template.state_dict(), strict=True) if pair[0] != pair[1]]
            prefixes = [f"{known}." if known else "" for known in names]
            renamed |= {prefix + old: prefix + new for prefix in prefixes for old, new in keys}
        else:
            why = reasons.get(names[0], "torch.nn has no such layer")
            problems.append(f"{name} ({cls.__name__}) cannot become torch.nn's: {why}")
    if problems:
        raise ValueError(f"to_torch changed nothing, since this package would still be needed: {'; '.join(problems)}")
    if not (norms or skipped or layers):
        warn_of_none()
    with all_or_nothing(model):
        for layer, template in templates.items():
            replace_by(layer, template)
        revert(model)
    return Replacing(tuple(layers), renamed=renamed)


def _template(layer: Any) -> nn.Module:
    base: Any = next(theirs for ours, theirs in _BASES if isinstance(layer, ours))
    norm = base.__new__(base)
    nn.Module.__init__(norm)
    for name in base.__constants__:
        setattr(norm, name, vars(layer)[name])
    norm._parameters = layer._parameters
    norm._buffers = layer._buffers
    norm._non_persistent_buffers_set = layer._non_persistent_buffers_set
    if isinstance(norm, nn.SyncBatchNorm):
        norm.process_group = layer.process_group
    if layer.act is None:
        return norm  # type: ignore[no-any-return]
    return nn.Sequential(norm, module_of(Activation(layer.act, layer.negative_slope)))
