"""A batch norm becomes another module, the same object still: names, hooks, mode and who refers to it do not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from batchnorm.layers import BatchNorm2d
from batchnorm.records import Record, Skipped, some
from batchnorm.surgery._shared.restoring import become
from batchnorm.words import plural

_OF_ANY_MODULE = vars(nn.Module()).keys()
_STATE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}

# What a batch norm has on its instance and another module has not: its settings, and what `convert` and `watch` add.
_NORMS = nn.SyncBatchNorm(1), BatchNorm2d(1), nn.GroupNorm(1, 1)
_OF_A_NORM = {name for norm in _NORMS for name in vars(norm)} | {"_batchnorm_converted", "_batchnorm_fused", "_tap"}


@dataclass(frozen=True, slots=True)
class Replaced:
    """One layer: all its names, the class that it was of, and what it is now."""

    names: tuple[str, ...]
    was: str
    now: str


@dataclass(frozen=True, slots=True, repr=False)
class Replacing(Record):
    """What `to_group_norm` or `to_torch` did. `renamed` are the keys of the state dict that changed, old to new."""

    layers: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for layer in self.layers:
            groups.setdefault(f"{layer.was} → {layer.now}", []).append(", ".join(layer.names) or "(the model)")
        for skipped in self.skipped:
            groups.setdefault(f"{skipped.kind} left alone ({skipped.why})", []).append(skipped.name or "(the model)")
        head = f"{plural(len(self.layers), 'layer')} replaced"
        if self.renamed:
            old, new = next(iter(self.renamed.items()))
            head += f", {plural(len(self.renamed), 'key')} renamed, as {old} → {new}"
        return "\n".join([head, *(f"{len(names):4}  {row}: {some(names)}" for row, names in groups.items())])


@contextmanager
def turned(changes: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Each layer takes the class, the state and the settings of its template; where anything is raised, none does."""
    before = {layer: (type(layer), layer.__dict__) for layer in changes}
    after = {layer: (type(template), _attributes(layer, template)) for layer, template in changes.items()}
    try:
        _set(after)
        yield
    except BaseException:
        _set(before)
        raise


def _attributes(layer: nn.Module, template: nn.Module) -> dict[str, object]:
    template.train(layer.training)
    kept = {name: value for name, value in vars(layer).items() if name in _OF_ANY_MODULE or name not in _OF_A_NORM}
    new = {name: value for name, value in vars(template).items() if name in _STATE or name not in _OF_ANY_MODULE}
    return kept | new


def _set(wanted: Mapping[nn.Module, tuple[type, dict[str, object]]]) -> None:
    for layer, (cls, attributes) in wanted.items():
        become(layer, cls)
        object.__setattr__(layer, "__dict__", attributes)
