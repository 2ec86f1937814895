"""Read the batch norm layers of a model, a state dict or a file into a `Network`.

Nothing here imports torch: it calls a model's `state_dict` and `named_modules`, and a tensor's own methods.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.checks import graphs
from batchnorm.checks.findings import Array, LayerData
from batchnorm.checks.layers import Place, Tensor, find, flattened, merged, unwrapped
from batchnorm.frameworks import FRAMEWORKS, stamped
from batchnorm.quantities import dead, scale, undoing, unit_class

LARGEST = 2**23
"""Values read of all layers together: more than any network has in its norms."""


DEEPEST = 16
"""Mappings inside one another that are searched for the metadata of state dicts."""


class SourceError(ValueError):
    """The argument cannot be checked: one line that says why and what to do."""


@dataclass(frozen=True)
class Network:
    """The batch norm layers of one model, state dict or file.

    `settings` of a layer: eps, momentum (the newest batch's weight) and affine, as far as known; eps_known; framework;
    batches (num_batches_tracked or None); roles, those of its tensors; shapes, if its tensors do not fit together;
    below, the name and largest value of a bias right before it, which is also one of its arrays; producer, the module
    whose weight comes right before it and has as many output channels, or ""; class, training, frozen and cumulative
    (momentum is None), of modules; training_mode, of nodes of ONNX and torch; operator and map_before, the module whose
    output this layer alone reads, of nodes of torch; unused, of a layer that the graph leaves out; unknown, the roles
    of tensors that an ONNX model computes when it runs; stored, whether it comes from a file; aliases, further names of
    the same module.

    Attributes:
        source: where it comes from: the file's name, or the class of the model.
        format: the format of the file, or "model", "program" (of torch.export) or "state dict".
        layers: the arrays and settings of each batch norm layer.
        tensors: how many tensors the source has.
        size: of the file, in bytes; None without a file.
        biases: how many of the tensors are biases.
        vectors: all its tensors with one axis, by name.
    """

    source: str
    format: str
    layers: tuple[LayerData, ...]
    tensors: int
    size: int | None = None
    biases: int = 0
    vectors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)


def of(given: object) -> Network:
    """The network of a model, a program of torch.export, a (nested) state dict, or the path of a file or folder.

    Raises SourceError if it is none of these or holds no tensors, and CheckpointError if a file is unreadable.
    """
    if isinstance(given, str | os.PathLike):
        return of_file(Path(given))
    if isinstance(given, Mapping):
        return of_state(given)
    if graphs.is_program(given):
        return of_program(given)
    if callable(getattr(given, "named_modules", None)) and callable(getattr(given, "state_dict", None)):
        return of_model(given)
    raise SourceError(f"expected a model, a program, a state dict or a path, got {type(given).__name__}")


def of_file(path: Path) -> Network:
    """The network of a file; only the tensors of norms are read. Raises CheckpointError and SourceError."""
    from batchnorm.checks.readers import CheckpointError, read

    checkpoint = read(path)
    places = [*checkpoint.norms] or [
        place
        for place in find(checkpoint.tensors, checkpoint.settings)
        if not str(place.settings.get("class", "")).startswith("InstanceNorm") and not place.settings.get("unused")
    ]
    framework = "Keras" if checkpoint.format in ("HDF5", "Keras") else None
    try:
        is_onnx = checkpoint.format == "ONNX"
        places = merged(places, lambda place: is_onnx and _is_constant(place))
        layers = _observed(places, True, framework)
    except CheckpointError as error:
        error.path = error.path or path
        raise
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
    tensors = checkpoint.tensors
    biases, vectors = _biases(tensors), _vectors(tensors)
    return Network(str(path), checkpoint.format, layers, len(tensors), checkpoint.size, biases, vectors)


def of_state(state: Mapping[str, Any]) -> Network:
    """The network of a state dict, also inside of a training script's mappings. Raises SourceError without tensors."""
    tensors = {path: _InMemory(tensor) for path, tensor in flattened(state, _is_tensor)}
    if not tensors:
        raise SourceError("the mapping holds no tensors: pass model.state_dict(), or a mapping that contains it")
    layers = _observed(merged(find(tensors, dict(_stamps(state)))), True)
    biases, vectors = _biases(tensors), _vectors(tensors)
    return Network("state dict", "state dict", layers, len(tensors), None, biases, vectors)


def of_model(model: Any) -> Network:
    """The network of a model, with its modules' eps and momentum; of a GraphModule with those of its nodes."""
    modules = {unwrapped(name): module for name, module in model.named_modules()}
    tensors: dict[tuple[str, ...], _InMemory] = {
        (name,): _InMemory(tensor) for name, tensor in model.state_dict().items() if _is_tensor(tensor)
    }
    places = [
        replace(place, settings=_settings(modules[place.name]) | {"class": type(modules[place.name]).__name__})
        for place in merged(find(tensors))
        if place.name in modules and all(base.__name__ != "_InstanceNorm" for base in type(modules[place.name]).__mro__)
    ]
    return _in_memory(model, "model", tensors, _with_nodes(places, graphs.of_module(model)))


def of_program(program: Any) -> Network:
    """The network of an ExportedProgram: the layers that its graph uses, with the settings of their nodes."""
    given = {**program.constants, **program.state_dict}
    tensors: dict[tuple[str, ...], _InMemory] = {
        (name,): _InMemory(tensor) for name, tensor in given.items() if _is_tensor(tensor)
    }
    return _in_memory(program, "program", tensors, _with_nodes(merged(find(tensors)), graphs.of_program(program)))


def _in_memory(
    given: object, kind: str, tensors: Mapping[tuple[str, ...], _InMemory], places: Sequence[Place]
) -> Network:
    layers, biases, vectors = _observed(places, False), _biases(tensors), _vectors(tensors)
    return Network(type(given).__name__, kind, layers, len(tensors), None, biases, vectors)


def _with_nodes(places: Sequence[Place], graph: graphs.Graph) -> list[Place]:
    """Add the settings of the nodes, and remove the layers that the graph does not use as batch norms."""
    norms = {unwrapped(name): settings for name, settings in graph.norms.items()}
    others = {unwrapped(name) for name in graph.others}
    kept = []
    for place in places:
        prefixes = [f"{name}.".lstrip(".") for name in (place.name, *place.aliases)]
        keys = [f"{prefix}{role}" for prefix in prefixes for role in graphs.STATISTICS]
        nodes = next((norms[key] for key in keys if key in norms), None)
        if nodes is not None or not others.intersection(keys):
            kept.append(replace(place, settings={**place.settings, **(nodes or {})}))
    return kept


def _observed(places: Sequence[Place], stored: bool, framework: str | None = None) -> tuple[LayerData, ...]:
    total = sum(int(np.prod(tensor.shape, dtype=object)) for place in places for tensor in place.tensors.values())
    if total > LARGEST:
        raise SourceError(f"its batch norm layers hold {total:,} values, more than the {LARGEST:,} that are read")
    return tuple(_layer(place, stored, framework or place.framework) for place in places)


def _layer(place: Place, stored: bool, framework: str) -> LayerData:
    shapes = {role: tensor.shape for role, tensor in place.tensors.items() if role != "batches"}
    sizes = {int(np.prod(shape)) for shape in shapes.values()}
    unknown = set(place.settings.get("unknown", "").split(", ")) - {""}
    missing = {"running_mean", "running_var"} - set(shapes) - unknown
    others = next(iter(shapes.values()), (0,)) if unknown else (0,)
    units = int(np.prod(shapes.get("running_var") or shapes.get("running_mean") or others))
    mismatched = len(sizes) > 1 or any(len(shape) != 1 for shape in shapes.values()) or bool(missing)
    arrays: dict[str, Array] = {
        role: np.asarray(place.tensors[role].values(), np.float64).reshape(1, -1)
        for role, shape in shapes.items()
        if int(np.prod(shape)) == units
    }
    if place.below is not None and np.shape(bias := place.below[1].values()) == (units,):
        arrays["below"] = np.array(bias, np.float64).reshape(1, -1)
    eps = place.settings.get("eps")
    settings: dict[str, Any] = {
        "affine": bool({"gamma", "beta"} & set(shapes)),
        "copy": place.copy,
        "framework": framework,
        "eps_known": eps is not None,
        "batches": _count(place.tensors.get("batches")),
        "roles": tuple(shapes),
        "shapes": shapes | dict.fromkeys(sorted(missing)) if mismatched else None,
        "below": place.below and (place.below[0], float(np.abs(place.below[1].values()).max(initial=0.0))),
        "stored": stored,
        "aliases": place.aliases,
        "producer": place.producer,
    }
    settings |= {**place.settings, "eps": FRAMEWORKS[framework].eps if eps is None else eps}
    if settings["affine"]:
        for role, constant in (("gamma", 1.0), ("beta", 0.0)):  # a layer may have only one of them
            if role not in {*shapes, *unknown}:
                arrays[role] = np.full((1, units), constant)
    if "running_var" in arrays:
        arrays["s"] = np.asarray(scale(arrays["running_var"], settings["eps"]))
    if {"gamma", "beta", "running_mean", "running_var"} <= set(arrays):
        mean, var, gamma, beta = (arrays[name] for name in ("running_mean", "running_var", "gamma", "beta"))
        arrays |= undoing(mean, var, settings["eps"], gamma, beta)
        arrays["class"] = unit_class(mean, var, settings["eps"], gamma, beta)
        arrays["dead"] = arrays["flat"] = dead(var, settings["eps"], gamma)
    name = f"{place.copy}: {place.name}" if place.copy else place.name
    return LayerData(name, units, arrays, None, settings)


def _is_constant(place: Place) -> bool:
    """Whether all units have the same variance. ONNX exporters store equal tensors once, those of new layers too."""
    stored = place.tensors.get("running_var")
    return stored is None or 0 in stored.shape or float(np.ptp(stored.values())) == 0


def _settings(module: Any) -> dict[str, Any]:
    """The module's eps and momentum, if it has them under PyTorch's names, its mode, and whether it is trained."""
    given = {name: vars(module).get(name) for name in ("eps", "momentum")}
    settings: dict[str, Any] = {name: float(value) for name, value in given.items() if isinstance(value, int | float)}
    if given["momentum"] is None and "momentum" in vars(module):
        settings["cumulative"] = True
    parameters = list(module.parameters(recurse=False))
    is_fixed = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
    return settings | {"training": bool(module.training), "frozen": is_fixed or "Frozen" in type(module).__name__}


def _stamps(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """The settings that `batchnorm.stamp` keeps with a state dict, by container and layer, also of nested ones."""
    for name, settings in stamped(getattr(state, "_metadata", None)):
        yield (path, name), settings
    for key, entry in state.items():
        if isinstance(entry, Mapping) and len(path) < DEEPEST:
            yield from _stamps(entry, (*path, str(key)))


def _vectors(tensors: Mapping[tuple[str, ...], Tensor]) -> dict[str, Tensor]:
    return {".".join(path): tensor for path, tensor in tensors.items() if len(tensor.shape) == 1}


def _count(tensor: Tensor | None) -> int | None:
    values = np.zeros(0) if tensor is None else np.asarray(tensor.values()).reshape(-1)
    return int(values[0]) if values.size == 1 and np.isfinite(values[0]) else None


def _biases(tensors: Mapping[tuple[str, ...], Tensor]) -> int:
    """How many tensors are biases: folding leaves them behind."""
    return sum(path[-1].rsplit(".", 1)[-1].rsplit("/", 1)[-1].startswith("bias") for path in tensors)


def _is_tensor(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type)


class _InMemory:
    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.shape = tuple(int(size) for size in tensor.shape)
        self.dtype = str(tensor.dtype)

    @property
    def key(self) -> Hashable:
        """Equal for tensors with the same elements of the same memory."""
        tensor = self.tensor
        try:
            start = tensor.data_ptr() if hasattr(tensor, "data_ptr") else tensor.__array_interface__["data"][0]
            strides = tensor.stride() if hasattr(tensor, "stride") else tensor.strides
        except (AttributeError, RuntimeError):  # neither torch's nor NumPy's, or without memory
            return id(tensor)
        return (start, strides, self.shape, str(getattr(tensor, "device", ""))) if start else id(tensor)

    def values(self) -> np.ndarray:
        tensor = self.tensor
        if getattr(tensor, "is_meta", False):
            raise SourceError("its tensors are on the meta device and hold no values: load the weights first")
        if hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu().double().numpy()
        return np.array(tensor, np.float64)  # a copy: a model may be trained on before its layers are looked at
