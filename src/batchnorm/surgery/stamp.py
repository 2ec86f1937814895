"""stamp(): keep eps and momentum with a model's state dict, and verify them when a state is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm.frameworks import STAMP
from batchnorm.records import Record, Skipped
from batchnorm.surgery._shared.layers import find
from batchnorm.words import plural

__all__ = ["Stamping", "stamp"]


@dataclass(frozen=True, slots=True, repr=False)
class Stamping(Record):
    """What `stamp` did.

    Attributes:
        layers: the names of the layers whose eps and momentum are kept.
        skipped: the other batch norm layers, with the reason.
    """

    layers: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    def _head(self) -> list[str]:
        return [f"{plural(len(self.layers), 'layer')} with eps and momentum in the metadata of the state dict"]


def stamp(model: nn.Module, also: Sequence[type[nn.Module]] = ()) -> Stamping:
    """Keep eps and momentum of every batch norm layer with its state dict, and verify them on load.

    A state dict has the tensors of a layer, not eps and momentum: after loading it into a model with another eps, the
    outputs differ, and no error says so. From now on `model.state_dict()` has both in `state_dict._metadata`, without
    a new key, so that models without a stamp load it as before. torch.save keeps the metadata, and `check`, `diff` and
    `explain` read it. safetensors, dict(state) and most other formats drop it.

    Loading a state into the model raises RuntimeError, as for tensors of other shapes, if its eps is another one; it
    warns if its momentum is another one, which changes training only, and if the state has no stamp. Stamp the model
    before both saving and loading. A second call changes nothing. The hooks are copied and pickled with the model.

    Args:
        model: changed in place: hooks are added.
        also: subclasses of batch norm layers to be included, whatever they compute.

    Returns:
        The names of the layers, and those that were skipped; `print` it.

    Raises TypeError if `model` is no torch.nn.Module.
    """
    norms, skipped = find("stamp", model, also)
    for norm in norms:
        if not _has(norm.layer._state_dict_hooks, _write):
            norm.layer.register_state_dict_post_hook(_write)  # type: ignore[no-untyped-call]
            norm.layer.register_load_state_dict_pre_hook(_verify)  # type: ignore[no-untyped-call]
    if norms and not _has(model._load_state_dict_pre_hooks, _expect):
        model.register_load_state_dict_pre_hook(_expect)  # type: ignore[no-untyped-call]
    return Stamping(tuple(norm.name for norm in norms), tuple(skipped))


def _has(hooks: Any, function: Any) -> bool:
    """Whether a function is among a module's hooks, which torch may have wrapped."""
    return any(getattr(hook, "hook", hook) is function for hook in hooks.values())


def _write(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Add the settings to the metadata of one layer's state."""
    settings = vars(module)
    local_metadata[STAMP] = {"eps": settings["eps"], "momentum": settings["momentum"]}


def _verify(
    module: nn.Module,
    state_dict: Any,
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Compare the settings of a layer with those of the state: torch raises what is in `error_msgs`."""
    stored, here = local_metadata.get(STAMP), vars(module)
    if not isinstance(stored, dict):
        return
    name = prefix.removesuffix(".") or "the layer"
    if not _is_same(stored.get("eps"), here["eps"]):
        error_msgs.append(f"eps of {name} is {here['eps']}, the state was saved with {stored.get('eps')}")
    if not _is_same(stored.get("momentum"), here["momentum"]):
        message = f"momentum of {name} is {here['momentum']}, the state was saved with {stored.get('momentum')}"
        warnings.warn(message, UserWarning, stacklevel=2)


def _is_same(stored: Any, here: Any) -> bool:
    numbers = all(isinstance(value, int | float) for value in (stored, here))
    return math.isclose(stored, here, rel_tol=1e-6) if numbers else stored is here


def _expect(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *arguments: Any) -> None:
    """Warn once if the state that is loaded has no stamp: its format dropped the metadata, or it was saved without."""
    metadata = getattr(state_dict, "_metadata", None)
    if "version" not in local_metadata:
        why = "it has no metadata, which safetensors and dict(state) drop"
    elif metadata is not None and not any(STAMP in entry for entry in metadata.values()):
        why = "it was saved without a stamp"
    else:
        return
    warnings.warn(f"eps and momentum of the loaded state are not verified: {why}", UserWarning, stacklevel=2)
