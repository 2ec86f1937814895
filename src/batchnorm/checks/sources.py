"""Where the layers to check come from: a model, a state dict, or a file. Each gives a Network.

Nothing here imports torch: a model is asked for its `state_dict` and `named_modules`, a tensor for its numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.checks.findings import Array, Observed
from batchnorm.checks.layers import EPS, Place, find, flattened, merged, unwrapped
from batchnorm.quantities import dead, scale, undoing, unit_class

LARGEST = 2**23
"""Values of all layers together that are read: more than any network has in its norms."""


class SourceError(ValueError):
    """What was given cannot be checked: one line that says why and what to do."""


@dataclass(frozen=True)
class Network:
    """The batch norm layers of one model, state dict or file.

    `settings` of a layer: eps, momentum (the newest batch's weight) and affine, as far as known; eps_known; framework;
    batches (num_batches_tracked, None where there is none); shapes, where its tensors do not fit together; below, the
    name and largest value of a bias right before it; producer, the module whose weight stands right before it and makes
    as many units, empty where unknown; class, of a model's modules; training_mode, of ONNX; unknown, the roles of
    tensors that an ONNX model computes when it runs; stored, whether it comes from a file; aliases, further names of
    the same module.

    Attributes:
        source: where it comes from: the file's name, or the class of the model.
        format: the format of the file, or "model" or "state dict".
        layers: what each batch norm layer holds.
        tensors: how many tensors the source has.
        size: of the file, in bytes; None where there is no file.
        biases: how many layers have a bias right before them, which the normalization takes out.
    """

    source: str
    format: str
    layers: tuple[Observed, ...]
    tensors: int
    size: int | None = None
    biases: int = 0


def of(given: object) -> Network:
    """The network of a model, of a (nested) state dict, or of a file or folder by its path.

    Raises SourceError where it is none of these, or holds no tensors, and CheckpointError where a file is unreadable.
    """
    if isinstance(given, str | os.PathLike):
        return of_file(Path(given))
    if isinstance(given, Mapping):
        return of_state(given)
    if callable(getattr(given, "named_modules", None)) and callable(getattr(given, "state_dict", None)):
        return of_model(given)
    raise SourceError(f"check takes a model, a state dict or a path, got {type(given).__name__}")


def of_file(path: Path) -> Network:
    """From a checkpoint on disk; only the tensors of its norms are read."""
    from batchnorm.checks.readers import CheckpointError, read

    checkpoint = read(path)
    found = find(checkpoint.tensors, lambda stored: stored.shape, checkpoint.settings)
    places = [*checkpoint.norms] or [place for place in found if not _is_instance_norm_name(place)]
    framework = "Keras" if checkpoint.format in ("HDF5", "Keras") else None
    try:
        onnx = checkpoint.format == "ONNX"
        places = merged(places, lambda stored: stored.key, lambda place: onnx and _is_constant(place))
        layers = _observed(places, lambda stored: stored.shape, lambda stored: stored.values(), True, framework)
    except CheckpointError as error:
        error.path = error.path or path
        raise
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    biases = _biases((path[-1], stored.shape) for path, stored in checkpoint.tensors.items())
    return Network(str(path), checkpoint.format, layers, len(checkpoint.tensors), checkpoint.size, biases)


def of_state(state: Mapping[str, Any]) -> Network:
    """From the mapping that a model's state_dict() gives, nested as training scripts nest it."""
    tensors = dict(flattened(state, _is_tensor))
    if not tensors:
        raise SourceError("the mapping holds no tensors: pass model.state_dict(), or what contains it")
    places = merged(find(tensors, _shape), _memory)
    biases = _biases((path[-1], _shape(tensor)) for path, tensor in tensors.items())
    return Network("state dict", "state dict", _observed(places, _shape, _values, True), len(tensors), None, biases)


def of_model(model: Any) -> Network:
    """From a model's own layers, with their eps and momentum."""
    modules = {unwrapped(name): module for name, module in model.named_modules()}
    state: dict[tuple[str, ...], Any] = {(name,): tensor for name, tensor in model.state_dict().items()}
    places = [
        replace(place, settings=_settings(modules[place.name]) | {"class": type(modules[place.name]).__name__})
        for place in merged(find(state, _shape), _memory)
        if place.name in modules and not _is_instance_norm(modules[place.name])
    ]
    layers = _observed(places, _shape, _values, False)
    biases = _biases((path[-1], _shape(tensor)) for path, tensor in state.items())
    return Network(type(model).__name__, "model", layers, len(state), None, biases)


def _observed(
    places: Sequence[Place[Any]],
    shape_of: Callable[[Any], tuple[int, ...]],
    values_of: Callable[[Any], np.ndarray],
    stored: bool,
    framework: str | None = None,
) -> tuple[Observed, ...]:
    total = sum(int(np.prod(shape_of(t), dtype=object)) for p in places for t in p.tensors.values())
    if total > LARGEST:
        raise SourceError(f"its batch norm layers hold {total:,} values, more than the {LARGEST:,} that are read")
    return tuple(_layer(place, shape_of, values_of, stored, framework) for place in places)


def _layer(
    place: Place[Any],
    shape_of: Callable[[Any], tuple[int, ...]],
    values_of: Callable[[Any], np.ndarray],
    stored: bool,
    framework: str | None,
) -> Observed:
    shapes = {role: tuple(shape_of(tensor)) for role, tensor in place.tensors.items() if role != "batches"}
    sizes = {int(np.prod(shape)) for shape in shapes.values()}
    unknown = set(place.settings.get("unknown", "").split(", ")) - {""}
    missing = {"running_mean", "running_var"} - set(shapes) - unknown
    others = next(iter(shapes.values()), (0,)) if unknown else (0,)
    units = int(np.prod(shapes.get("running_var") or shapes.get("running_mean") or others))
    odd = len(sizes) > 1 or any(len(shape) != 1 for shape in shapes.values()) or bool(missing)
    arrays: dict[str, Array] = {
        role: np.asarray(values_of(place.tensors[role]), np.float64).reshape(1, -1)
        for role, shape in shapes.items()
        if int(np.prod(shape)) == units
    }
    made_by = framework or place.framework
    eps = place.settings.get("eps")
    settings: dict[str, Any] = {
        "affine": bool({"gamma", "beta"} & set(shapes)),
        "copy": place.copy,
        "framework": made_by,
        "eps_known": eps is not None,
        "batches": _count(place.tensors.get("batches"), values_of),
        "shapes": shapes | dict.fromkeys(sorted(missing)) if odd else None,
        "below": _below(place.below, values_of),
        "stored": stored,
        "aliases": place.aliases,
        "producer": place.producer,
    }
    settings |= {**place.settings, "eps": EPS.get(made_by, 1e-5) if eps is None else eps}
    if settings["affine"]:
        learned_alone = {"gamma": 1.0, "beta": 0.0}
        arrays |= {
            role: np.full((1, units), value) for role, value in learned_alone.items() if role not in {*shapes, *unknown}
        }
    if "running_var" in arrays:
        arrays["s"] = np.asarray(scale(arrays["running_var"], settings["eps"]))
    if {"gamma", "beta", "running_mean", "running_var"} <= set(arrays):
        mean, var, gamma, beta = (arrays[name] for name in ("running_mean", "running_var", "gamma", "beta"))
        arrays |= undoing(mean, var, settings["eps"], gamma, beta)
        arrays["class"] = unit_class(mean, var, settings["eps"], gamma, beta)
        arrays["dead"] = arrays["flat"] = dead(var, settings["eps"], gamma)
    name = f"{place.copy}: {place.name}" if place.copy else place.name
    return Observed(name, units, arrays, None, settings)


def _is_constant(place: Place[Any]) -> bool:
    """Whether all units have one variance. Exporters to ONNX store equal tensors once, as those of fresh layers."""
    stored = place.tensors.get("running_var")
    return stored is None or 0 in stored.shape or float(np.ptp(stored.values())) == 0


def _settings(module: Any) -> dict[str, Any]:
    """eps and momentum as the module has them, where it has them under PyTorch's names."""
    found = {name: vars(module).get(name) for name in ("eps", "momentum") if name in vars(module)}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _is_instance_norm(module: Any) -> bool:
    return any(base.__name__ == "_InstanceNorm" for base in type(module).__mro__)


def _is_instance_norm_name(place: Place[Any]) -> bool:
    return str(place.settings.get("class", "")).startswith("InstanceNorm")


def _below(below: tuple[str, Any] | None, values_of: Callable[[Any], np.ndarray]) -> tuple[str, float] | None:
    if below is None:
        return None
    values = np.abs(values_of(below[1]))
    return below[0], float(values.max()) if values.size else 0.0


def _count(tensor: Any, values_of: Callable[[Any], np.ndarray]) -> int | None:
    if tensor is None:
        return None
    values = np.asarray(values_of(tensor)).reshape(-1)
    return int(values[0]) if values.size == 1 and np.isfinite(values[0]) else None


def _biases(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """How many tensors are biases: what folding leaves."""
    return sum(name.rsplit(".", 1)[-1].rsplit("/", 1)[-1].startswith("bias") for name, _ in tensors)


def _is_tensor(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape)


def _memory(tensor: Any) -> Hashable:
    """Equal for tensors that are one: the same elements of the same memory."""
    try:
        start = tensor.data_ptr() if hasattr(tensor, "data_ptr") else tensor.__array_interface__["data"][0]
        strides = tensor.stride() if hasattr(tensor, "stride") else tensor.strides
    except (AttributeError, RuntimeError):  # neither torch's nor NumPy's, or without memory
        return id(tensor)
    return (start, strides, _shape(tensor), str(getattr(tensor, "device", ""))) if start else id(tensor)


def _values(tensor: Any) -> np.ndarray:
    if getattr(tensor, "is_meta", False):
        raise SourceError("its tensors are on the meta device and hold no values: load the weights first")
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().double().numpy()
    return np.asarray(tensor, np.float64)
