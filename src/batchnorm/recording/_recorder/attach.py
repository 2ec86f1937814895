"""The layers of a model that can be watched, and a tap on each: put on for a recorded step, taken off after it.

A step that is not recorded runs as if nobody watched: no hook, no class, no tap is on any layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.kernels.contract import Tap
from batchnorm.recording._recorder.observe import OBSERVED, STOCK
from batchnorm.recording._recorder.producers import Producer, producer
from batchnorm.runs.run import RunError
from batchnorm.variants import DOMAINS, ONE_SET
from batchnorm.wrappers import unwrapped

_TAKEN: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
"""The layers that are watched, each with a mark of the attachment that watches it."""


@dataclass(slots=True, eq=False)
class Watched:
    """A layer, the class that listens where the layer's own does not, and the weight below it where known."""

    name: str
    aliases: tuple[str, ...]
    layer: _BatchNorm
    stock: type[nn.Module]
    observed: type[nn.Module] | None
    tap: Tap
    producer: Producer | None = None

    @property
    def units(self) -> int:
        return int(self.layer.num_features)

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        layer = self.layer
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "class": self.stock.__name__,
            "units": self.units,
            "eps": float(layer.__dict__["eps"]),
            "momentum": None if layer.momentum is None else float(layer.momentum),
            "affine": layer.weight is not None,
            "act": getattr(layer, "act", None),
            "ours": self.observed is None,
            "producer": None if self.producer is None else self.producer.name,
        }


class Attachment:
    """Every layer of a model that can be watched; `skipped` are those that cannot, with the reason."""

    def __init__(self, model: nn.Module) -> None:
        self.watched: list[Watched] = []
        self.skipped: list[dict[str, str]] = []
        names: dict[nn.Module, list[str]] = {}
        inner = unwrapped(model)
        for name, module in inner.named_modules(remove_duplicate=False):
            if isinstance(module, _BatchNorm):
                names.setdefault(module, []).append(name)
        for module, found in names.items():
            why = _why_not(module)
            if why is None:
                stock = STOCK.get(type(module), type(module))
                watched = Watched(found[0], tuple(found[1:]), module, stock, OBSERVED.get(stock), Tap())  # type: ignore[arg-type]
                self.watched.append(watched)
            else:
                self.skipped.append({"name": found[0], "class": type(module).__name__, "why": why})
        self._parameters = {id(p): name for name, p in inner.named_parameters()}
        for watched in self.watched:
            watched.tap.look = self._looker(watched)
        self.armed = False
        self._mark = object()

    def arm(self, wanted: bool) -> None:
        """Listen, or do not."""
        if wanted is self.armed:
            return
        for watched in self.watched:
            layer = watched.layer
            if wanted:
                layer.__dict__["_tap"] = watched.tap
            else:
                layer.__dict__.pop("_tap", None)
            now, then = (watched.stock, watched.observed) if wanted else (watched.observed, watched.stock)
            if watched.observed is not None and type(layer) is now:
                layer.__class__ = then  # type: ignore[assignment]
        self.armed = wanted

    def take(self) -> None:
        """Mark the layers as watched. Raises RunError where another recording watches one of them.

        Other threads do the same with their layers: setdefault is one step, and nothing here iterates over `_TAKEN`.
        """
        for watched in self.watched:
            if _TAKEN.setdefault(watched.layer, self._mark) is not self._mark:
                self._give_back()
                raise RunError("this model is being watched already: close the other Run first")

    def release(self) -> None:
        """Leave the layers as they were."""
        self.arm(False)
        self._give_back()

    def _give_back(self) -> None:
        for watched in self.watched:
            if _TAKEN.get(watched.layer) is self._mark:
                del _TAKEN[watched.layer]

    def _looker(self, watched: Watched) -> Any:
        """Look where the layer's input comes from, once, in the first forward that knows."""

        def look(x: Tensor) -> None:
            if x.grad_fn is not None:
                watched.tap.look = None
                watched.producer = producer(x, watched.units, self._parameters)

        return look


def _why_not(module: nn.Module) -> str | None:
    cls = type(module)
    if cls in OBSERVED or cls in STOCK or cls in ONE_SET:
        return None
    if isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if getattr(cls, "_batchnorm_frozen", False):
        return "frozen: it does not normalize by the batch's statistics"
    if isinstance(module, nn.SyncBatchNorm):
        return "torch.nn.SyncBatchNorm does not tell: batchnorm.sync(model) makes it one that does"
    if cls in DOMAINS:
        return "it has statistics for each of several domains, and a recording has room for one"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs its own compiled code"
    return f"a subclass of {next(b.__name__ for b in cls.__mro__[1:] if b.__module__.startswith('torch.'))}"
