"""What became of a model's batch norm layers: a record, and its table in text."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.records import Record, some
from batchnorm.words import plural


@dataclass(frozen=True, slots=True)
class Layer:
    """One batch norm layer: all its names in the model, and what it is now.

    `act` and `residual` say what is computed with it where it is called; `why_not` says why it was not converted, or
    why nothing was fused.
    """

    names: tuple[str, ...]
    kind: str
    converted: bool
    act: str | None = None
    residual: bool = False
    why_not: str | None = None

    @property
    def name(self) -> str:
        """Its first name; empty where it is the model itself."""
        return self.names[0]

    @property
    def fused(self) -> bool:
        """Whether an activation or an addition is computed with it."""
        return self.act is not None or self.residual


@dataclass(frozen=True, slots=True, repr=False)
class Conversion(Record):
    """What `batchnorm.convert` did. `print` it: one line for the layers of one kind and outcome."""

    layers: tuple[Layer, ...]

    @property
    def converted(self) -> int:
        """How many layers are ours now."""
        return sum(layer.converted for layer in self.layers)

    @property
    def fused(self) -> int:
        """How many of them run as one with an activation or an addition."""
        return sum(layer.fused for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "no batch norm layers"
        groups: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, _outcome(layer)), []).append(", ".join(layer.names) or "(the model)")
        width = max(len(kind) for kind, _ in groups)
        rows = [
            f"{len(names):4}  {kind:{width}}  {outcome}: {some(names)}" for (kind, outcome), names in groups.items()
        ]
        head = f"{self.converted} of {plural(len(self.layers), 'batch norm layer')} converted, {self.fused} fused"
        return "\n".join([head, *rows])


@dataclass(frozen=True, slots=True, repr=False)
class Reversion(Record):
    """What `batchnorm.revert` did: the layers that are torch.nn's again, the modules with their own methods again."""

    layers: tuple[str, ...]
    modules: tuple[str, ...]

    def __str__(self) -> str:
        if not self.layers and not self.modules:
            return "nothing to revert: no layer was converted"
        rows = [f"{plural(len(self.layers), 'batch norm layer')} reverted to torch.nn: {some([*self.layers])}"]
        if self.modules:
            rows.append(f"{plural(len(self.modules), 'module')} with the original methods: {some([*self.modules])}")
        return "\n".join(rows)


def _outcome(layer: Layer) -> str:
    if not layer.converted:
        return f"not converted ({layer.why_not})"
    joined = fused_words(layer.act, layer.residual)
    return f"with {joined}" if joined else f"alone ({layer.why_not})"


def fused_words(act: str | None, residual: bool) -> str:
    """ "residual and relu": what is computed with a layer; empty for nothing."""
    return " and ".join([*(["residual"] if residual else []), *([act] if act else [])])
