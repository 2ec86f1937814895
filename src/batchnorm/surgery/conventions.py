"""State dicts of batch norms between PyTorch, Keras and Flax: names, which variance, eps and momentum.

|         | names                                        | running variance     | eps  | momentum is the weight of |
|---------|----------------------------------------------|----------------------|------|---------------------------|
| PyTorch | weight, bias, running_mean, running_var      | unbiased, by n - 1   | 1e-5 | the new value, 0.1        |
| Keras   | gamma, beta, moving_mean, moving_variance    | biased, by n         | 1e-3 | the old value, 0.99       |
| Flax    | scale, bias, mean, var                       | biased, by n         | 1e-5 | the old value, 0.99       |

n is the number of values per channel in a training batch: rows times positions. Trained alike, running_var is n/(n - 1)
times the variance of Keras or Flax. In eval mode each divides by its stored variance: for the same outputs the variance
is copied unchanged; to continue training as if from the start, it is multiplied by the factor. eps and momentum are not
part of any state: see `settings`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from batchnorm.frameworks import FRAMEWORKS
from batchnorm.records import Record, format_names
from batchnorm.surgery._shared.layers import warn_of_none
from batchnorm.words import plural

__all__ = ["Converted", "Count", "Statistics", "from_flax", "from_keras", "settings", "to_flax", "to_keras"]

# The state of a batch norm; num_batches_tracked is not converted.
PARTS = ("weight", "bias", "running_mean", "running_var")

# Values per channel in a training batch: of all layers, or by the layer's PyTorch name.
Count = int | Mapping[str, int]


# A framework's names of the parts of a layer, with PyTorch's.
_KERAS, _FLAX, _TORCH = (
    {name: FRAMEWORKS["PyTorch"].names[role] for name, role in FRAMEWORKS[framework].roles.items()}
    for framework in ("Keras", "Flax", "PyTorch")
)
_DEFAULTS = {"torch": FRAMEWORKS["PyTorch"], "keras": FRAMEWORKS["Keras"], "flax": FRAMEWORKS["Flax"]}


@dataclass(frozen=True, slots=True)
class Statistics:
    """One layer of a `Converted`.

    Attributes:
        name: its name in PyTorch.
        channels: C, the number of its channels.
        count: the n that its variance was converted with; None if it was copied unchanged.
    """

    name: str
    channels: int
    count: int | None


@dataclass(frozen=True, slots=True, repr=False)
class Converted(Record):
    """The state of batch norm layers in another framework's convention.

    Attributes:
        state: the converted state, to be loaded by the other framework.
        layers: one record for each batch norm layer.
        left: the keys that belong to no batch norm layer.
        filled: the keys that the source lacks and PyTorch needs: a gamma of ones, or a beta of zeros.
        target: the framework of `state`.
    """

    state: dict[str, Any]
    layers: tuple[Statistics, ...]
    left: tuple[str, ...]
    filled: tuple[str, ...]
    target: str

    def _head(self) -> list[str]:
        if not self.layers:
            return [f"no batch norm layer among {plural(len(self.left), 'key')}"]
        return [f"{plural(len(self.layers), 'batch norm layer')} for {self.target}"]

    def _rows(self) -> Iterable[tuple[str, str]]:
        for layer in self.layers:
            unchanged = "variance unchanged, for equal outputs in eval mode"
            scaled = f"variance scaled with n = {layer.count}, to continue training"
            yield unchanged if layer.count is None else scaled, format_names(layer.name)
        if self.layers:
            yield from (("filled in", name) for name in self.filled)
            yield from (("other keys left unchanged", name) for name in self.left)


def from_keras(weights: Mapping[Any, Any], count: Count | None = None) -> Converted:
    """Turn the weights of Keras's batch norm layers into a state dict of PyTorch's.

    running_var = moving_variance [·n/(n - 1)]; weight, bias, running_mean = gamma, beta, moving_mean. The factor
    n/(n - 1) is applied if `count` is given.

    In names "/" becomes ".": "block/bn/gamma:0" is "block.bn.weight". num_batches_tracked is 0: PyTorch reads it only
    if momentum is None; then the first batch would replace the statistics.

    Args:
        weights: arrays or tensors by name, flat or nested: {w.path: w for w in model.weights}, or an open h5py.File
            with these names. Copied, not changed.
        count: None for the same outputs in eval mode: the variance is copied. n (at least 2), of all layers or by
            PyTorch name, for the variance that PyTorch would have after the same training.

    Returns:
        `.state` is a state dict of the batch norms, for load_state_dict(strict=False) or after renaming: tensors of the
        arrays' types, without eps and momentum: see `settings("keras", "torch")`.

    Raises TypeError without a mapping, or if a norm's array is not of floats; ValueError if a layer's arrays have
    different shapes, two names become equal, or `count` is below 2 or has an unknown layer.
    """
    return _to_torch("from_keras", weights, _KERAS, count)


def to_keras(state: Mapping[Any, Any], count: Count | None = None) -> Converted:
    """Turn a state dict of PyTorch's batch norm layers into the weights of Keras's.

    moving_variance = running_var [·(n - 1)/n]; gamma, beta, moving_mean = weight, bias, running_mean. The factor
    (n - 1)/n is applied if `count` is given.

    In names "." becomes "/". num_batches_tracked is dropped.

    Args:
        state: a state dict of PyTorch's. Copied, not changed.
        count: as of `from_keras`: None for the same outputs in eval mode, n for the variance of Keras after training.

    Returns:
        `.state` has NumPy arrays by flat names such as "block/bn/gamma"; bfloat16 becomes float32.

    Raises as `from_keras` does.
    """
    new, record = _from_torch("to_keras", state, _KERAS, count, "Keras")
    named = {"/".join(filter(None, (*name.split("."), part))): array for name, part, array in new}
    return replace(record, state=named)


def from_flax(variables: Mapping[Any, Any], count: Count | None = None) -> Converted:
    """Turn the variables of Flax's batch norm layers into a state dict of PyTorch's.

    running_var = var [·n/(n - 1)]; weight, bias, running_mean = scale, bias, mean. The factor n/(n - 1) is applied if
    `count` is given. Otherwise as `from_keras`.

    Args:
        variables: of flax.linen, {"params": {…}, "batch_stats": {…}}, or of flax.nnx: a state, or its arrays by dotted
            names. Copied, not changed.
        count: as of `from_keras`.

    Raises as `from_keras` does.
    """
    return _to_torch("from_flax", variables, _FLAX, count)


def to_flax(state: Mapping[Any, Any], count: Count | None = None, nnx: bool = False) -> Converted:
    """Turn a state dict of PyTorch's batch norm layers into the variables of Flax's.

    var = running_var [·(n - 1)/n]; scale, bias, mean = weight, bias, running_mean. The factor (n - 1)/n is applied if
    `count` is given. Otherwise as `to_keras`.

    Args:
        state: a state dict of PyTorch's. Copied, not changed.
        count: as of `to_keras`.
        nnx: return arrays by dotted names, as flax.nnx, instead of flax.linen's {"params": {…}, "batch_stats": {…}}.

    Raises as `from_keras` does.
    """
    new, record = _from_torch("to_flax", state, _FLAX, count, "Flax")
    if nnx:
        return replace(record, state={".".join(filter(None, (name, part))): array for name, part, array in new})
    nested: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, part, array in new:
        inside = nested["params" if part in ("scale", "bias") else "batch_stats"]
        for step in filter(None, name.split(".")):
            inside = inside.setdefault(step, {})
        inside[part] = array
    return replace(record, state=nested)


def settings(
    source: str, target: str, eps: float | None = None, momentum: float | Literal["default"] | None = "default"
) -> dict[str, float]:
    """Convert eps and momentum of a layer to another framework.

    >>> nn.BatchNorm2d(c, **settings("keras", "torch"))

    PyTorch's momentum is the weight of the new value, that of Keras and Flax of the old one: momentum → 1 - momentum.
    eps has the same meaning, but other defaults, and is not part of any state: with the default, a layer with small
    variances computes something else.

    Args:
        source, target: "torch", "keras" or "flax".
        eps: of the source's layer; by default the framework's.
        momentum: of the source's layer, "default" for its framework's.

    Returns:
        {"eps": …, "momentum": …} for the target's layer.

    Raises ValueError for an unknown framework, a negative eps, a momentum outside 0..1, and PyTorch's momentum=None,
    the average over all batches, which the others do not have.
    """
    for framework in (source, target):
        if framework not in _DEFAULTS:
            raise ValueError(f"unknown framework {framework!r}: use one of {', '.join(map(repr, _DEFAULTS))}")
    theirs, weighs_batch = _DEFAULTS[source], _DEFAULTS[target].momentum_weighs_batch
    eps = theirs.eps if eps is None else eps
    if momentum is None:
        raise ValueError("momentum=None is the average over all batches, which only PyTorch has: choose a momentum")
    weight = theirs.momentum if momentum == "default" else momentum
    if not 0 <= weight <= 1:
        raise ValueError(f"momentum must be between 0 and 1, not {weight}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, not {eps}")
    # Rounded, so that 1 - 0.99 is 0.01.
    return {"eps": eps, "momentum": weight if theirs.momentum_weighs_batch is weighs_batch else round(1 - weight, 12)}


def _convert(
    tool: str, arrays: object, names: Mapping[str, str], count: Count | None, target: str
) -> tuple[dict[str, dict[str, Tensor]], Converted]:
    """The batch norms among the arrays, by PyTorch's names, with the target's variance, and their record."""
    layers, left = _group_by_layer(_flatten(tool, arrays, names is _FLAX), names)
    if not layers:
        warn_of_none()
    counts = count if isinstance(count, Mapping) else dict.fromkeys(layers, count)
    unknown = sorted(counts.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"count has {unknown[0]!r}, which is not one of the batch norms: {', '.join(layers) or 'none'}"
        )
    for name, n in counts.items():
        if n is not None:
            if isinstance(n, bool) or not isinstance(n, int) or n < 2:
                raise ValueError(
                    f"count is the values per channel in a training batch, an int of at least 2, not {n!r}"
                )
            var, (above, below) = layers[name]["running_var"], (n, n - 1) if target == "PyTorch" else (n - 1, n)
            layers[name]["running_var"] = (var.double() * above / below).to(var.dtype)
    records = [Statistics(name, len(parts["running_var"]), counts.get(name)) for name, parts in layers.items()]
    return layers, Converted({}, tuple(records), left, (), target)


def _to_torch(tool: str, arrays: object, names: Mapping[str, str], count: Count | None) -> Converted:
    layers, record = _convert(tool, arrays, names, count, "PyTorch")
    state: dict[str, Any] = {}
    filled = []
    for name, parts in layers.items():
        prefix = f"{name}." if name else ""
        absent = {"weight", "bias"} - parts.keys()
        if len(absent) == 1:
            (part,) = absent
            parts[part] = (torch.ones_like if part == "weight" else torch.zeros_like)(parts["running_var"])
            filled.append(prefix + part)
        state |= {prefix + part: parts[part] for part in PARTS if part in parts}
        state[f"{prefix}num_batches_tracked"] = torch.tensor(0)
    return replace(record, state=state, filled=tuple(filled))


def _from_torch(
    tool: str, state: object, names: Mapping[str, str], count: Count | None, target: str
) -> tuple[list[tuple[str, str, Any]], Converted]:
    """(layer, name in the target, array) of every part, and the record without a state."""
    layers, record = _convert(tool, state, _TORCH, count, target)
    new = [
        (layer, name, (parts[part].float() if parts[part].dtype == torch.bfloat16 else parts[part]).numpy())
        for layer, parts in layers.items()
        for name, part in names.items()
        if part in parts
    ]
    return new, record


def _flatten(tool: str, arrays: object, flax: bool) -> dict[str, tuple[str, Any]]:
    """Key and array by dotted name, without Keras's ":0" and Flax's collections."""
    if not isinstance(arrays, Mapping):
        raise TypeError(f"{tool} takes a mapping of arrays by name, got {type(arrays).__name__}")
    flat: dict[str, tuple[str, Any]] = {}
    linen = flax and any(key.startswith("batch_stats.") for key, _ in _leaves(arrays, ""))
    for key, value in _leaves(arrays, ""):
        short = re.sub(r"^(params|batch_stats)\.|:\d+$" if linen else r":\d+$", "", key).replace("/", ".")
        if short in flat:
            raise ValueError(f"{tool}: {key} and {flat[short][0]} are one name, {short}: convert them separately")
        flat[short] = key, value
    return flat


def _leaves(nested: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for step, value in nested.items():
        key = prefix + (".".join(map(str, step)) if isinstance(step, tuple) else str(step))
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _group_by_layer(
    flat: dict[str, tuple[str, Any]], names: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """The parts of each batch norm by PyTorch's names, and all other keys."""
    candidates: dict[str, dict[str, tuple[str, Any]]] = {}
    for dotted, item in flat.items():
        name, _, part = dotted.rpartition(".")
        if part in names:
            candidates.setdefault(name, {})[names[part]] = item
    layers: dict[str, dict[str, Tensor]] = {}
    used: set[str] = set()
    for name, parts in candidates.items():
        if {"running_mean", "running_var"} <= parts.keys():
            used |= {key for key, _ in parts.values()}
            layers[name] = {part: _tensor(*parts[part]) for part in PARTS if part in parts}
            shapes = {tuple(tensor.shape) for tensor in layers[name].values()}
            if len(shapes) > 1 or len(next(iter(shapes))) != 1:
                message = (
                    f"{name or 'the layer'} has arrays of shapes {sorted(shapes)}: expected one number per channel"
                )
                raise ValueError(message)
    return layers, tuple(key for key, _ in flat.values() if key not in used)


def _tensor(name: str, value: Any) -> Tensor:
    """A copy on the CPU, with the array's type."""
    if isinstance(value, Tensor):
        tensor = value.detach().to("cpu", copy=True)
    else:
        array = np.array(value)
        if array.dtype.name == "bfloat16":
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        elif array.dtype.kind == "f" and array.dtype.itemsize <= 8:
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        else:
            raise TypeError(f"{name} must be an array of floats, got {type(value).__name__} of {array.dtype}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be an array of floats, got {tensor.dtype}")
    return tensor
