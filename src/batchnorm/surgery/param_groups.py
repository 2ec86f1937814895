"""param_groups(): parameter groups for an optimizer: weights, gamma, beta and biases, each with its weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.surgery._shared.layers import check_module, kind_of_layer, made_of, warn_of_none
from batchnorm.variants.libraries import TORCH

__all__ = ["param_groups"]

# _NormBase: batch and instance norms.
_NORMS: tuple[type[nn.Module], ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_ROLES = ("gamma", "beta")


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    gamma_decay: float = 0.0,
    beta_decay: float = 0.0,
    bias_decay: float = 0.0,
    also: Sequence[type[nn.Module]] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """`torch.optim.SGD(param_groups(model, 1e-4), lr=0.1)`: groups "weights", "gamma", "beta" and "biases".

    gamma and beta are `weight` and `bias` of all batch, group, layer, instance and RMS norms, including this package's
    layers, subclasses, and the batch norms of other libraries. "biases" are the vectors named `bias` (or `bias_…`,
    `…_bias`, as in torch.nn.LSTM and MultiheadAttention) of other modules. "weights" are all other parameters. Every
    parameter that requires a gradient is in exactly one group; empty groups are omitted. Add parameters that are
    unfrozen later with `optimizer.add_param_group`.

    Whether gamma and beta should decay depends on the network. Decay pulls a gamma towards 0, which closes its channel;
    of a weight right before a norm it only changes the scale, which the norm removes. See Summers and Dinneen, "Four
    Things Everyone Should Know to Improve Batch Normalization", 2020. By default only the weights decay.

    Args:
        model: not changed.
        weight_decay: of "weights".
        gamma_decay, beta_decay, bias_decay: of those groups.
        also: classes of other norms whose `weight` and `bias` are gamma and beta.
        options: other settings of every group, such as lr.

    Returns:
        For each group a dict with "name", "params", "weight_decay" and the options, for any optimizer of torch.optim.

    Raises TypeError if `model` is not a torch.nn.Module or a decay is no number; ValueError for a decay that is
    negative or not finite, and for lazy parameters without a shape.
    """
    check_module("param_groups", model)
    reserved = sorted({"params", "name"} & options.keys())
    if reserved:
        raise TypeError(f"param_groups sets {reserved[0]!r} of each group itself: leave it out")
    decays = {"weights": weight_decay, "gamma": gamma_decay, "beta": beta_decay, "biases": bias_decay}
    for group, decay in decays.items():
        if isinstance(decay, bool) or not isinstance(decay, int | float):
            raise TypeError(f"the weight decay of {group} must be a number, got {type(decay).__name__}")
        if not (math.isfinite(decay) and decay >= 0):
            raise ValueError(f"the weight decay of {group} must be finite and at least 0, not {decay}")
    norms = (*_NORMS, *also)
    kinds = {module: kind_of_layer(module) or TORCH for module in model.modules() if _is_norm(module, norms)}
    if not kinds:
        warn_of_none("normalization layer")
    roles: dict[nn.Parameter, str] = {}
    for module in model.modules():
        norm_roles: dict[nn.Parameter, str] = {}
        if module in kinds:
            norm_roles = {p: role for role in _ROLES for p in made_of(module, getattr(kinds[module], role))}
        roles |= norm_roles  # for a shared parameter the role in a norm wins
        parametrized: Any = module.parametrizations if is_parametrized(module) else ()
        for name in (*module._parameters, *parametrized):
            if name.startswith("bias_") or name == "bias" or name.endswith("_bias"):
                for parameter in set(made_of(module, name)) - norm_roles.keys():
                    if not isinstance(parameter, UninitializedParameter) and parameter.dim() == 1:
                        roles.setdefault(parameter, "biases")
    groups: dict[str, list[nn.Parameter]] = {group: [] for group in decays}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} is lazy and has no shape yet: run a batch through the model first")
        if parameter.requires_grad:
            groups[roles.get(parameter, "weights")].append(parameter)
    return [
        {"name": group, "params": parameters, "weight_decay": decays[group], **options}
        for group, parameters in groups.items()
        if parameters
    ]


def _is_norm(module: nn.Module, norms: tuple[type[nn.Module], ...]) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return isinstance(module, norms) or (not scripted and kind_of_layer(module) is not None)
