"""Batch norm layers of other libraries: one row per kind of layer, found by the qualified name of its class.

No library is imported. A row says what the layer normalizes by in training, the names of its tensors and settings, and
what it computes after the normalization. `register_layer` adds a row for a user's class.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.restoring import preserve_random_state

__all__ = ["register_layer"]

Follows = Callable[[nn.Module], Mapping[str, nn.Module]]
"""The modules, by name, that a layer applies to its normalized input, in order."""

Training = Literal["batch", "processes", "other", "frozen"]
"""What a layer normalizes by in training: its batch, as torch.nn's layers; the batches of all processes; something
else, such as a part of the batch; or, as in eval mode, the running statistics."""


def _nothing(layer: nn.Module) -> dict[str, nn.Module]:
    return {}


def _children(*names: str) -> Follows:
    """Children of the layer, as far as it has them."""

    def follows(layer: nn.Module) -> dict[str, nn.Module]:
        children = {name: layer._modules.get(name) for name in names}
        return {name: child for name, child in children.items() if child is not None and type(child) is not nn.Identity}

    return follows


def _named(name: str, parameter: str) -> Follows:
    """An activation that attributes of the layer name: its name, and its slope or alpha."""

    def follows(layer: nn.Module) -> dict[str, nn.Module]:
        made: dict[str, Callable[[float], nn.Module]] = {
            "relu": lambda _: nn.ReLU(),
            "leaky_relu": nn.LeakyReLU,
            "elu": nn.ELU,
        }
        act = getattr(layer, name)
        return {name: made[act](getattr(layer, parameter))} if act in made else {}

    return follows


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One kind of layer.

    Attributes:
        classes: qualified class names; * matches any part.
        training: what it normalizes by in training.
        mean, var, batches, gamma, beta: the names of its tensors; a layer may have none of that name.
        eps: the attribute's name, or the constant in its forward.
        affine: the attribute that says whether its forward uses gamma and beta; None if it always does.
        magnitude: whether its scale is abs(gamma) + eps in place of gamma.
        follows: what it applies after the normalization.
    """

    classes: tuple[str, ...] = ()
    training: Training = "batch"
    mean: str = "running_mean"
    var: str = "running_var"
    batches: str = "num_batches_tracked"
    gamma: str = "weight"
    beta: str = "bias"
    eps: str | float = "eps"
    affine: str | None = None
    magnitude: bool = False
    follows: Follows = _nothing

    def tensor(self, layer: nn.Module, role: str, suffix: str = "") -> Tensor | None:
        """A tensor by its role: "mean", "var", "batches", "gamma" or "beta"; None if the layer uses none."""
        if role in ("gamma", "beta") and self.affine is not None and not getattr(layer, self.affine):
            return None
        return getattr(layer, getattr(self, role) + suffix, None)

    def eps_of(self, layer: nn.Module) -> float:
        """The constant that is added to the variance."""
        return float(vars(layer)[self.eps] if isinstance(self.eps, str) else self.eps)

    def scale(self, layer: nn.Module) -> Tensor | None:
        """The factor of the normalized input; None for 1."""
        gamma = self.tensor(layer, "gamma")
        return gamma.abs() + self.eps_of(layer) if self.magnitude and gamma is not None else gamma

    def normalize(self, layer: Any, x: Tensor, alone: bool = False) -> Tensor:
        """The normalized input, without what follows, as a layer that trains by its batch computes it.

        With `alone` it normalizes by this batch, in eval mode too, and updates nothing.
        """
        mean, var = (None if alone else self.tensor(layer, role) for role in ("mean", "var"))
        momentum = getattr(layer, "momentum", 0.0)
        if layer.training and mean is not None and getattr(layer, "track_running_stats", True):
            batches = self.tensor(layer, "batches")
            if batches is not None:
                batches.add_(1)
                momentum = 1.0 / float(batches) if momentum is None else momentum
        elif layer.training:
            mean = var = None
        by_batch = layer.training or mean is None
        settings = by_batch, 0.0 if momentum is None else momentum, self.eps_of(layer)
        return F.batch_norm(x, mean, var, self.scale(layer), self.tensor(layer, "beta"), *settings)

    def finish(self, layer: nn.Module, z: Tensor) -> Tensor:
        """What the layer computes of its normalized input."""
        for module in self.follows(layer).values():
            z = module(z)
        return z


TORCH = Kind()
"""The layers of torch.nn and of this package."""

_NORM_ACT = _children("drop", "act")

_ROWS: tuple[Kind, ...] = (
    Kind(("timm.*.BatchNormAct2d",), follows=_NORM_ACT),
    Kind(("timm.*.SyncBatchNormAct",), "processes", follows=_NORM_ACT),
    Kind(("timm.*.SplitBatchNorm2d", "timm.*.SplitBatchNormAct2d"), "other", follows=_NORM_ACT),
    Kind(("timm.*.FrozenBatchNormAct2d",), "frozen", follows=_NORM_ACT),
    Kind(("timm.*.InplaceAbn",), magnitude=True, follows=_named("act_name", "act_param")),
    Kind(
        ("torchvision.ops.*.FrozenBatchNorm2d", "timm.*.FrozenBatchNorm2d", "detectron2.layers.*.FrozenBatchNorm2d"),
        "frozen",
    ),
    # Facebook's DETR and its copies in transformers have the constant in their forward.
    Kind(("models.backbone.FrozenBatchNorm2d", "transformers.models.*FrozenBatchNorm2d"), "frozen", eps=1e-5),
    Kind(("detectron2.layers.*.NaiveSyncBatchNorm",), "processes"),
    Kind(("mmcv.ops.*.SyncBatchNorm",), "processes"),
    Kind(("inplace_abn.*.ABN",), follows=_named("activation", "activation_param")),
    Kind(("inplace_abn.*.InPlaceABN",), magnitude=True, follows=_named("activation", "activation_param")),
    Kind(
        ("inplace_abn.*.InPlaceABNSync",), "processes", magnitude=True, follows=_named("activation", "activation_param")
    ),
    # Its buffer `steps` ends a warm-up: it is no count of batches to replace.
    Kind(
        ("sb3_contrib.*.BatchRenorm", "sb3_contrib.*.BatchRenorm1d"),
        "other",
        mean="ra_mean",
        var="ra_var",
        batches="",
        gamma="scale",
        affine="affine",
    ),
)

# A class in `also` that is no subclass of torch.nn's: its tensors have torch.nn's names.
_ALSO = Kind()

# By qualified class name. Filled by `register_layer`.
_REGISTERED: dict[str, Kind] = {}


def qualified_name(cls: type) -> str:
    """The class's module and name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(cls: type, also: Sequence[type] = ()) -> Kind | None:
    """The kind of a class of another library, or of a user; None if it is unknown and not in `also`."""
    name = qualified_name(cls)
    kind = _REGISTERED.get(name) or _row_of(name)
    if kind is None and cls in also:
        return TORCH if issubclass(cls, _BatchNorm) else _ALSO
    return kind


@cache
def _row_of(name: str) -> Kind | None:
    return next((row for row in _ROWS if any(fnmatchcase(name, pattern) for pattern in row.classes)), None)


def looks_like_batch_norm(module: nn.Module) -> bool:
    """Whether a module of an unknown class has running statistics under torch.nn's names, (C,) each."""
    mean, var = (module._buffers.get(name) for name in (TORCH.mean, TORCH.var))
    if mean is None or var is None or is_lazy(mean) or isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return mean.dim() == 1 and mean.shape == var.shape


def line_to_register(cls: type) -> str:
    """The line that a user writes for a class."""
    return f'batchnorm.register_layer("{qualified_name(cls)}")'


def register_layer(
    layer: type[nn.Module] | str,
    *,
    mean: str = "running_mean",
    var: str = "running_var",
    batches: str = "num_batches_tracked",
    gamma: str = "weight",
    beta: str = "bias",
    eps: str | float = "eps",
    frozen: bool = False,
    follows: Sequence[str] = (),
) -> None:
    """Make all tools, and `watch`, work on a class of batch norm layers that this package does not know.

    y = follows(gamma·(x - mean)/sqrt(var + eps) + beta) is what its forward must compute: with the mean and the biased
    variance of the batch in training mode, and with the running statistics in eval mode.

    The names of tensors and settings are those of torch.nn by default. A later call for the same class replaces the
    row. Subclasses of the class are not included.

    Args:
        layer: the class, or its qualified name, such as "library.layers.norm.BatchNorm", which needs no import.
        mean, var: the names of the buffers with the running statistics.
        batches: the name of the buffer that counts batches; a layer may have none.
        gamma, beta: the names of the scale and the shift, parameters or buffers; a layer may have none.
        eps: the name of the attribute, or the constant.
        frozen: whether it normalizes by the running statistics in training mode too, and has no parameters.
        follows: the names of its child modules that it applies after the normalization, in order.

    Raises TypeError for arguments of a wrong type; ValueError for a name without a module, a class of torch.nn or of
    this package, and an eps that is not positive.
    """
    if isinstance(layer, type) and issubclass(layer, nn.Module):
        name = qualified_name(layer)
    elif isinstance(layer, str):
        name = layer
    else:
        raise TypeError(f"register_layer takes a class of torch.nn.Module or its qualified name, got {layer!r}")
    if "." not in name or not all(part for part in name.split(".")):
        raise ValueError(f"register_layer: {name!r} has no module: write it as 'library.module.Class'")
    if name.split(".")[0] in ("torch", "batchnorm"):
        raise ValueError(f"register_layer: {name} is known already")
    for role, value in {"mean": mean, "var": var, "batches": batches, "gamma": gamma, "beta": beta}.items():
        if not isinstance(value, str):
            raise TypeError(f"register_layer: {role} must be the name of a tensor, got {value!r}")
    if isinstance(eps, bool) or not isinstance(eps, str | int | float):
        raise TypeError(f"register_layer: eps must be the name of an attribute or a number, got {eps!r}")
    if not isinstance(eps, str) and not eps > 0:
        raise ValueError(f"register_layer: eps must be positive, got {eps}")
    if not isinstance(frozen, bool):
        raise TypeError(f"register_layer: frozen must be True or False, got {frozen!r}")
    if isinstance(follows, str) or not all(isinstance(child, str) for child in follows):
        raise TypeError(f"register_layer: follows must be a sequence of names, got {follows!r}")
    training: Training = "frozen" if frozen else "batch"
    _REGISTERED[name] = Kind((), training, mean, var, batches, gamma, beta, eps, follows=_children(*follows))


def why_not_batch(kind: Kind) -> str | None:
    """Why a layer's training statistics are not those of its batch; None if they are."""
    return {
        "batch": None,
        "processes": "its training statistics are those of several processes",
        "other": "its training statistics are not the batch's",
        "frozen": "frozen by its class: its statistics, gamma and beta are constants",
    }[kind.training]


def equals_batch_norm(layer: nn.Module) -> bool:
    """Whether an unknown layer's forward equals batch norm's on random input, in training and in eval mode.

    Copies run, without hooks of the layer. With several processes nothing runs: a forward might wait for them.
    """
    distributed = torch.distributed
    mean = layer._buffers.get(TORCH.mean)
    if mean is None or mean.is_meta or (distributed.is_available() and distributed.is_initialized()):
        return False
    with preserve_random_state(layer), torch.no_grad(), warnings.catch_warnings(action="ignore"):
        return any(_agrees(layer, (8, mean.numel(), *sizes)) for sizes in ((4, 4), (), (5,), (2, 3, 3)))


def _agrees(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    try:
        theirs = copy.deepcopy(layer)
        for role in ("gamma", "beta", "mean", "var"):
            tensor = TORCH.tensor(theirs, role)
            if tensor is not None:
                tensor.copy_(random(shape[1]).square() + 0.5 if role == "var" else random(shape[1]))
        plain = copy.deepcopy(theirs)
        for training in (True, False):
            theirs.training = plain.training = training
            x = (random(*shape) * 2 + 1).to(plain.running_mean)  # type: ignore[arg-type]
            outputs = type(theirs).forward(theirs, x.clone()), TORCH.normalize(plain, x)
            states = zip((*theirs.buffers(), outputs[0]), (*plain.buffers(), outputs[1]), strict=True)
            if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in states):
                return False
    except Exception:  # a user's code: whatever it raises, it is not proved to be a batch norm
        return False
    return True
