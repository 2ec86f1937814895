"""to_torch(): a model without any class of this package, so that it loads where the package is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from batchnorm import layers as ours
from batchnorm.restoring import all_or_nothing
from batchnorm.surgery._shared.activations import Activation, module_of
from batchnorm.surgery._shared.layers import FROZEN, find, names_of, original, warn_of_none
from batchnorm.surgery.convert import revert
from batchnorm.surgery.to_group_norm import GroupNorm, Replaced, Replacing, turn
from batchnorm.variants import OTHERWISE
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

    The model can then be loaded where this package is not installed. What `convert` did is taken back. A layer of this
    package without an activation becomes torch.nn's class of its name. One with an activation becomes
    torch.nn.Sequential(norm, activation), so its keys change, from name.weight to name.0.weight: `renamed` of the
    record lists them. The same holds for the `GroupNorm` of `to_group_norm`. Every layer stays the same object, with
    its parameters, buffers, hooks and mode.

    SyncBatchNorm becomes torch.nn.SyncBatchNorm. Layers that train as none of torch.nn's does (BatchRenorm,
    GhostBatchNorm, `accumulate`, `batch_of_one`) compute the same in eval mode only, so they are accepted only in it.

    A residual, a mask or lengths handed to a layer's forward cannot be expressed: such a call raises TypeError
    from then on. Write it into the calling module first.

    Args:
        model: changed in place; all of it or, where an error is raised, nothing.
        also: subclasses of this package's layers that normalize as these do, which the caller vouches for. What else
            they do in their forward is lost.

    Returns:
        What each layer became; nothing is left alone.

    Raises TypeError if `model` is not a torch.nn.Module. Raises ValueError, which names them all, where something of
    this package would be left: frozen layers (torch.nn's would thaw at the next train(): unfreeze them first), lazy
    ones without a shape, subclasses that are not in `also`.
    """
    norms, skipped = find("to_torch", model, also, may_be_empty=True)
    reasons = {each.name: each.why for each in skipped}
    vouched = {norm.layer for norm in norms}
    templates: dict[nn.Module, nn.Module] = {}
    left, layers = [], []
    renamed: dict[str, str] = {}
    for module, known_as in names_of(model).items():
        cls = original(type(module))
        if not any(base.__module__.split(".")[0] == "batchnorm" for base in cls.__mro__):
            continue
        if type(module) in FROZEN:
            left.append(f"{known_as[0] or 'the model'} is frozen: unfreeze it first")
        elif module.training and _trains_otherwise(module):
            left.append(f"{known_as[0] or 'the model'} trains as no layer of torch.nn does: call .eval() first")
        elif module in vouched or cls is GroupNorm:
            templates[module] = template = _template(module)
            inside = [type(each).__name__ for each in template] if isinstance(template, nn.Sequential) else []
            now = f"torch.nn.{type(template).__name__}"
            now += f"({', '.join(inside)})" if inside else ""
            layers.append(Replaced(tuple(known_as), cls.__name__, now))
            keys = [each for each in zip(module.state_dict(), template.state_dict(), strict=True) if each[0] != each[1]]
            prefixes = [f"{name}." if name else "" for name in known_as]
            renamed |= {prefix + old: prefix + new for prefix in prefixes for old, new in keys}
        else:
            why = reasons.get(known_as[0], "not a layer that torch.nn has")
            left.append(f"{known_as[0] or 'the model'} ({cls.__name__}) cannot become torch.nn's: {why}")
    if left:
        raise ValueError(f"to_torch changed nothing, since this package would still be needed: {'; '.join(left)}")
    if not (norms or skipped or layers):
        warn_of_none()
    with all_or_nothing(model):
        for layer, template in templates.items():
            turn(layer, template)
        revert(model)
    return Replacing(tuple(layers), renamed=renamed)


def _trains_otherwise(module: nn.Module) -> bool:
    """Whether torch.nn's layer would be the same function in eval mode alone."""
    settings = (getattr(module, "accumulate", 1), getattr(module, "batch_of_one", "error"))
    return isinstance(module, OTHERWISE) or settings != (1, "error")


def _template(layer: Any) -> nn.Module:
    base: Any = next(torchs for mine, torchs in _BASES if isinstance(layer, mine))
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
