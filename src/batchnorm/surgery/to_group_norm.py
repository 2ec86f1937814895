"""to_group_norm(): replace batch norms by group norms, which do not depend on other samples of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from batchnorm.kernels.aten import activate
from batchnorm.layers import BatchNorm2d
from batchnorm.records import Record, Skipped, format_names
from batchnorm.restoring import all_or_nothing, set_class
from batchnorm.running_stats import NAMES
from batchnorm.surgery._shared.activations import Activation
from batchnorm.surgery._shared.layers import OURS, find
from batchnorm.surgery._shared.norm import Norm
from batchnorm.variants.libraries import TORCH
from batchnorm.words import plural

__all__ = ["GroupNorm", "to_group_norm"]

_MODULE_NAMES = vars(nn.Module()).keys()
_STATE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}

# The instance attributes of norm layers only: settings, and marks of `convert` and `watch`.
_NORMS = nn.SyncBatchNorm(1), BatchNorm2d(1), nn.GroupNorm(1, 1)
_NORM_NAMES = {name for norm in _NORMS for name in vars(norm)} | {"_batchnorm_converted", "_batchnorm_fused", "_tap"}


@dataclass(frozen=True, slots=True)
class Replaced:
    """One layer of a `Replacing`.

    Attributes:
        names: all its names in the model.
        was: its class before.
        now: its class now.
    """

    names: tuple[str, ...]
    was: str
    now: str


@dataclass(frozen=True, slots=True, repr=False)
class Replacing(Record):
    """What `to_group_norm` or `to_torch` did.

    Attributes:
        layers: one record for each layer that was replaced.
        skipped: the layers that were not changed, each with the reason.
        renamed: the keys of the state dict that changed, old to new.
    """

    layers: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def _head(self) -> list[str]:
        head = f"{plural(len(self.layers), 'layer')} replaced"
        if self.renamed:
            old, new = next(iter(self.renamed.items()))
            head += f", {plural(len(self.renamed), 'key')} renamed, as {old} → {new}"
        return [head]

    def _rows(self) -> Iterable[tuple[str, str]]:
        return [(f"{layer.was} → {layer.now}", format_names(*layer.names)) for layer in self.layers]


def replace_by(layer: nn.Module, template: nn.Module) -> None:
    """Give the layer, the same object, the class, the state and the settings of a template."""
    template.train(layer.training)
    kept = {name: value for name, value in vars(layer).items() if name in _MODULE_NAMES or name not in _NORM_NAMES}
    new = {name: value for name, value in vars(template).items() if name in _STATE or name not in _MODULE_NAMES}
    set_class(layer, type(template), kept | new)


class GroupNorm(nn.GroupNorm):
    """Group normalization with a fused activation and residual; `to_group_norm` turns this package's layers into it.

    y = act(gamma·(x - mean)/sqrt(var + eps) + beta [+ residual]), with mean and var (biased) of each group of
    channels of each sample.

    Args:
        num_groups: the number of groups of channels.
        num_channels: C, the number of channels; a multiple of num_groups.
        eps: added to the variance.
        affine: learn gamma (`weight`) and beta (`bias`), (C,).
        act: the activation, one of `BatchNorm1d`'s, or None.
        negative_slope: the slope of leaky_relu below 0.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        act: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine)
        self.act = act
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize the input (N, C, *), add the residual, of its shape, and apply the activation."""
        z = super().forward(input)
        return activate(z if residual is None else z + residual, self.act, self.negative_slope)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.act is None else f", act={self.act}")


def to_group_norm(model: nn.Module, groups: int = 32, also: Sequence[type[nn.Module]] = ()) -> Replacing:
    """Replace batch norm layers by group normalization, in place.

    y = gamma·(x - mean)/sqrt(var + eps) + beta, with mean and var (biased) of each group of channels of each sample.

    The network then computes something else: train or fine-tune it afterwards. No sample's output depends on the rest
    of the batch (for DP-SGD, contrastive losses, batches of one), and training and eval mode are the same.

    Each layer becomes a torch.nn.GroupNorm with the largest number of groups, at most `groups`, that divides its
    channels into groups of two or more: a group of one value normalizes to 0, and of two values only their order
    remains. It stays the same object with the same gamma, beta, eps, names and hooks; its running statistics and
    momentum are removed. A layer of this package becomes a `GroupNorm` with the same act and residual, and so does one
    of another library that applies an activation.

    Args:
        model: changed in place; nothing if an error is raised.
        groups: the maximum number of groups, at least 1; 32 in Wu and He, "Group Normalization", 2018.
        also: subclasses that normalize as their base class does, to be included. What else they do goes.

    Returns:
        What each layer became. `skipped` names those left alone: frozen ones, which are independent of the batch
        already, BatchNorm1d of one channel, lazy ones, subclasses that are not in `also`.

    Raises TypeError if `model` is not a torch.nn.Module or `groups` not an int, and ValueError where it is below 1.
    """
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"to_group_norm: groups must be an int, got {type(groups).__name__}")
    if groups < 1:
        raise ValueError(f"to_group_norm: groups must be at least 1, not {groups}")
    norms, skipped = find("to_group_norm", model, also)
    templates = {norm: _template(norm, groups) for norm in norms}
    layers = []
    with all_or_nothing(model):
        for norm, template in templates.items():
            now = f"GroupNorm of {plural(template.num_groups, 'group')}"
            layers.append(Replaced(norm.names, type(norm.layer).__name__, now))
            replace_by(norm.layer, template)
    return Replacing(tuple(layers), tuple(skipped))


def _template(norm: Norm, groups: int) -> nn.GroupNorm:
    layer: Any = norm.layer
    channels, is_torch = norm.channels, norm.kind is TORCH
    divisors = [n for n in range(1, min(groups, channels // 2) + 1) if channels % n == 0]
    number, eps = max(divisors, default=1), norm.eps
    template = nn.GroupNorm(number, channels, eps, affine=False)
    activation = norm.activation or Activation(None)
    is_ours = isinstance(layer, OURS) and "_batchnorm_converted" not in vars(layer)
    if is_ours or activation.act is not None:
        template = GroupNorm(number, channels, eps, False, *activation)
    template.affine = layer.affine
    # Keep all parameters, buffers and children, except the running statistics.
    template._parameters = dict(layer._parameters)
    template._buffers = {name: buffer for name, buffer in layer._buffers.items() if name not in NAMES}
    template._non_persistent_buffers_set = set(layer._non_persistent_buffers_set)
    template._modules = dict(layer._modules) if is_torch else {}
    if "bias" not in template._parameters and "bias" not in vars(layer):
        template.register_parameter("bias", None)
    return template
