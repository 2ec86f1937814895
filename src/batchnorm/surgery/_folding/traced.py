"""What is seen of a model in its torch.fx graph: the calls, and who reads what they return, on any input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from batchnorm.surgery._folding.pairs import (
    Link,
    Seen,
    does_nothing,
    watched,
)
from batchnorm.surgery._shared.example import leaves
from batchnorm.surgery._shared.walk import opaque

# Of a tensor, and not of its values.
_DESCRIPTIONS = ("dtype", "device", "shape", "ndim", "is_cuda")


def seen_in_graph(model: nn.Module) -> Seen:
    """The model called with what it needs, everything optional left out.

    Raises ValueError where torch.fx cannot trace it: where it branches on its input's values or shape, for instance.
    """
    root = _Root(model)
    try:
        graph = root.tracer.trace(root)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"fold: torch.fx cannot trace the model ({reason}): give an example of its input") from error
    return _Reader(root, graph).seen


class _Tracer(fx.Tracer):
    """Whatever may be one of a pair stays one node, and so does every reading of a parameter or a buffer."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return watched(m) or does_nothing(m) or super().is_leaf_module(m, module_qualified_name)


class _Root(nn.Module):
    """Calls the model with as many inputs as it requires."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tracer = _Tracer()
        self.kept: list[fx.Node] = []

    def forward(self) -> Any:
        args, kwargs = [], {}
        for name, parameter in inspect.signature(self.model.forward).parameters.items():
            if parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                made = self.tracer.create_proxy("placeholder", name, (), {})
                if parameter.kind is parameter.KEYWORD_ONLY:
                    kwargs[name] = made
                else:
                    args.append(made)
        outputs = self.model(*args, **kwargs)
        for module in self.model.modules():
            if opaque(module) is None:
                self.kept += [proxy.node for proxy in leaves(list(vars(module).values()), fx.Proxy)]
        return tuple(leaves(outputs, fx.Proxy))


class _Reader:
    """Goes through a graph."""

    def __init__(self, root: _Root, graph: fx.Graph) -> None:
        self.seen = Seen()
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.kept = set(root.kept)
        for node in graph.nodes:
            if node.op == "get_attr":
                self._read(node)
            elif node.op == "call_module":
                self._call(node)

    def _read(self, node: fx.Node) -> None:
        described = all(user.target is getattr and user.args[1] in _DESCRIPTIONS for user in node.users)
        owner = self.modules.get(str(node.target).rpartition(".")[0])
        if owner is not None and not described:
            self.seen.read.add(owner)

    def _call(self, node: fx.Node) -> None:
        module = self.modules[str(node.target)]
        if does_nothing(module):
            return
        for called in module.modules():  # a leaf of the graph may call what is inside it
            self.seen.calls[called] += 1
        if not watched(module):
            return
        self.seen.called_with(module, node.args, node.kwargs)
        uses = list(self._uses(node))
        for position, (_, second) in enumerate(uses):
            if second is not None:
                others = [who for i, (who, _) in enumerate(uses) if i != position]
                self.seen.links.append(Link(module, second, others[0] if others else None))

    def _uses(self, node: fx.Node) -> Iterator[tuple[str, nn.Module | None]]:
        """Who reads what a node gives, by name, and the module of a pair that has it as its input."""
        if node in self.kept:
            yield "kept after the forward", None
        for user in node.users:
            module = self.modules[str(user.target)] if user.op == "call_module" else None
            if module is not None and does_nothing(module):
                yield from self._uses(user)
                continue
            first = user.args[0] if user.args else user.kwargs.get("input")
            who = "returned by the model" if user.op == "output" else _words(module, user)
            arguments: list[fx.Node] = []
            fx.node.map_arg((user.args, user.kwargs), arguments.append)
            whole = first is node and module is not None and watched(module)
            for argument in arguments:
                if argument is node:
                    yield who, module if whole else None


def _words(module: nn.Module | None, node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)) if module is None else type(module).__name__
