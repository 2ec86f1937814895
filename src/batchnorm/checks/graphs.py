"""Read the batch norm nodes of a graph: an ExportedProgram of torch.export, or a GraphModule of torch.fx.

The tensors of a layer come from the state dict. The graph adds what only the nodes know: the mode, eps, momentum, and
the convolution or linear map right before. Nothing here imports torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ORDER = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
"""The arguments of torch.batch_norm and torch.native_batch_norm, which have no signature."""
MAPS = ("conv", "linear", "addmm")
"""Beginnings of the names of operators whose weight a batch norm folds into."""
WEIGHTS = ("weight", "mat2")
"""Names of the argument that is the weight of a map."""
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Graph:
    """What the nodes of one graph say.

    Attributes:
        norms: the settings of each batch norm node, by the names of its running statistics.
        others: the names of tensors that no node uses, and of the statistics of instance norms: no batch norm has them.
    """

    norms: Mapping[str, Mapping[str, Any]]
    others: frozenset[str]


def is_program(given: object) -> bool:
    """Whether it is an ExportedProgram of torch.export."""
    return _is_a("ExportedProgram", given)


def of_program(program: Any) -> Graph:
    """The graph of an ExportedProgram, whose inputs are its tensors by the names in its signature."""
    signature = program.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return read(program.graph.nodes, tensors | dict(signature.inputs_to_lifted_tensor_constants), {})


def of_module(model: Any) -> Graph:
    """The graph of a GraphModule; an empty one for every other model."""
    if not _is_a("GraphModule", model):
        return Graph({}, frozenset())
    tensors = {node.name: str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    return read(model.graph.nodes, tensors, dict(model.named_modules()))


def _is_a(name: str, given: object) -> bool:
    return any(base.__name__ == name and base.__module__.startswith("torch.") for base in type(given).__mro__)


def read(nodes: Iterable[Any], tensors: Mapping[str, str], modules: Mapping[str, Any]) -> Graph:
    """The norms among nodes of torch.fx, or objects like them; `tensors` are the names of tensors by node."""
    norms: dict[str, dict[str, Any]] = {}
    others = set()
    for node in nodes:
        name = _operator(node)
        if node.name in tensors and not node.users:
            others.add(tensors[node.name])
        if node.op == "call_module" and hasattr(modules.get(node.target), "running_var"):
            keys = [f"{node.target}.{role}" for role in STATISTICS]
            settings = {} if modules[node.target].training else _before(node.args[0], tensors, modules)
        elif "batch_norm" in name or "instance_norm" in name:
            arguments = _arguments(node)
            keys = [key for role in STATISTICS if (key := _tensor(arguments.get(role), tensors))]
            settings = _settings(node, name, arguments)
            if "instance_norm" in name or settings["class"].startswith("InstanceNorm"):
                others.update(keys)
                continue
            if not settings["training_mode"]:
                settings |= _before(arguments.get("input"), tensors, modules)
        else:
            continue
        for key in keys:
            norms[key] = _both(norms[key], settings) if key in norms else settings
    return Graph(norms, frozenset(others))


def _settings(node: Any, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The mode of a node, its eps, and its momentum if it updates statistics: exporters write 0 or 0.1 otherwise."""
    is_training = arguments.get("training", "with_update" in name) is True
    settings: dict[str, Any] = {"training_mode": is_training, "training": is_training, "operator": name}
    eps = arguments.get("eps", arguments.get("epsilon"))
    rate = arguments.get("momentum", arguments.get("exponential_average_factor"))
    settings |= {"eps": float(eps)} if isinstance(eps, int | float) else {}
    settings |= {"momentum": float(rate)} if is_training and isinstance(rate, int | float) else {}
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = stack[-1][1] if stack else ""
    kind = kind if isinstance(kind, str) else kind.__name__
    return settings | {"class": kind.rpartition(".")[2]}


def _both(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a layer that runs twice: it is in training mode if one node is, and is folded into no map."""
    modes = {key: True for key in ("training_mode", "training") if second.get(key)}
    return {key: value for key, value in first.items() if key != "map_before"} | modes


def _before(node: Any, tensors: Mapping[str, str], modules: Mapping[str, Any]) -> dict[str, Any]:
    """The convolution or linear map whose output the norm alone reads, by the name of its module."""
    if not hasattr(node, "users") or len(node.users) != 1:
        return {}
    if node.op == "call_module":
        bases = {base.__name__ for base in type(modules.get(node.target)).__mro__}
        return {"map_before": str(node.target)} if bases & {"_ConvNd", "Linear"} else {}
    if not _operator(node).startswith(MAPS):
        return {}
    arguments = _arguments(node)
    weight = next((name for role in WEIGHTS if (name := _tensor(arguments.get(role), tensors))), "")
    has_channels_last = "conv" not in _operator(node) and getattr(node.meta.get("val"), "ndim", 2) != 2
    return {"map_before": weight.removesuffix(".weight")} if weight and not has_channels_last else {}


def _operator(node: Any) -> str:
    """The name of the operator or function that a node calls, such as "batch_norm"; empty for other nodes."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name.rpartition("::")[2] if schema else getattr(node.target, "__name__", ""))


def _arguments(node: Any) -> dict[str, Any]:
    """The arguments of a node by name, with the defaults of its operator."""
    schema = getattr(node.target, "_schema", None)
    if schema:
        defaults = {entry.name: entry.default_value for entry in schema.arguments}
    else:
        try:
            parameters = inspect.signature(node.target).parameters
            defaults = {name: None if p.default is p.empty else p.default for name, p in parameters.items()}
        except (ValueError, TypeError):  # a builtin function
            defaults = dict.fromkeys(ORDER)
    return defaults | dict(zip(defaults, node.args, strict=False)) | dict(node.kwargs)


def _tensor(node: Any, tensors: Mapping[str, str]) -> str:
    """The name of the tensor that a node is, or that it casts or transposes; empty if there is no name."""
    while hasattr(node, "all_input_nodes"):
        if node.name in tensors:
            return tensors[node.name]
        node = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
    return ""
