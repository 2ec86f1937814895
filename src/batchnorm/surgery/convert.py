"""convert(): a model's batch norm layers become ours, in place, and run as one with what follows them; revert()."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.layers import BatchNorm2d
from batchnorm.records import Record, called, some
from batchnorm.restoring import all_or_nothing, become
from batchnorm.surgery._fusing.planner import Fuser
from batchnorm.surgery._fusing.rewriting import Trail
from batchnorm.surgery._shared.activations import bypassable
from batchnorm.surgery._shared.layers import (
    FROZEN,
    OURS,
    STOCK,
    check_module,
    children_first,
    is_scripted_norm,
    names_of,
    not_python,
    opaque,
    original,
    paths,
    subclassed,
    warn_of_none,
)
from batchnorm.surgery.freeze import frozen_class
from batchnorm.variants import DOMAINS, PLAIN
from batchnorm.words import plural

__all__ = ["convert", "revert"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One batch norm layer of a `Conversion`.

    Attributes:
        names: all its names in the model.
        kind: its class before the conversion.
        converted: whether it is this package's layer now.
        act: the activation that is computed with it where it is called; None where there is none.
        residual: whether an addition is computed with it where it is called.
        why_not: why it was not converted, or why nothing was fused; None where there is nothing to say.
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
    """What `convert` did; `print` it for one line for the layers of one kind and outcome.

    Attributes:
        layers: one record for each batch norm layer of the model.
    """

    layers: tuple[Layer, ...]

    @property
    def converted(self) -> int:
        """How many layers are this package's now."""
        return sum(layer.converted for layer in self.layers)

    @property
    def fused(self) -> int:
        """How many of them run as one with an activation or an addition."""
        return sum(layer.fused for layer in self.layers)

    def _head(self) -> list[str]:
        if not self.layers:
            return ["no batch norm layers"]
        return [f"{self.converted} of {plural(len(self.layers), 'batch norm layer')} converted, {self.fused} fused"]

    def _rows(self) -> Iterable[tuple[str, str]]:
        width = max((len(layer.kind) for layer in self.layers), default=0)
        return [(f"{layer.kind:{width}}  {_outcome(layer)}", called(*layer.names)) for layer in self.layers]


@dataclass(frozen=True, slots=True, repr=False)
class Reversion(Record):
    """What `revert` did.

    Attributes:
        layers: the names of the layers that are torch.nn's again.
        modules: the names of the modules that have their own methods again.
    """

    layers: tuple[str, ...]
    modules: tuple[str, ...]

    def _head(self) -> list[str]:
        if not self.layers and not self.modules:
            return ["nothing to revert: no layer was converted"]
        rows = [f"{plural(len(self.layers), 'batch norm layer')} reverted to torch.nn: {some(self.layers)}"]
        if self.modules:
            rows.append(f"{plural(len(self.modules), 'module')} with the original methods: {some(self.modules)}")
        return rows


def _outcome(layer: Layer) -> str:
    if not layer.converted:
        return f"not converted ({layer.why_not})"
    return f"with {_joined(layer)}" if layer.fused else f"alone ({layer.why_not})"


def _joined(layer: Layer | Trail) -> str:
    """ "residual and relu": what is computed with a layer; empty for nothing."""
    return " and ".join(filter(None, ("residual" if layer.residual else None, layer.act)))


_OURS: dict[type, type] = dict(zip(STOCK, PLAIN, strict=False))
_OURS |= {frozen_class(theirs): frozen_class(ours) for theirs, ours in _OURS.items()}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}

# Marks, on the instance, a layer that revert gives back to torch.nn: copies and pickles take it along.
_MARK = "_batchnorm_converted"
# What is fused with a layer, in words, for the model's text.
_FUSED = "_batchnorm_fused"

# What our layers have and torch.nn's do not: an attribute of that name on an instance would change meaning.
_NEW_NAMES = frozenset(dir(BatchNorm2d)) - {*dir(nn.BatchNorm2d), "eps"} | {"forward"}


def convert(model: nn.Module, fuse: bool = True) -> Conversion:
    """Turn torch.nn's batch norm layers into this package's, in place, and fuse the activations behind them.

    A fused layer computes y = act(BN(x) [+ residual]) in one operation.

    Each torch.nn.BatchNorm1d, 2d and 3d changes its class and nothing else: its parameters, buffers, names, hooks,
    modes and attributes stay the same objects, so optimizers and checkpoints from before keep working. What `freeze`
    froze stays frozen.

    With `fuse`, the methods that call a batch norm are rewritten so that an addition and an activation right behind it
    are computed with it: `act(bn(x))`, `bn(x) + residual`, `act(bn(x) + residual)`, over several statements too, and in
    torch.nn.Sequential. After an addition that is done for relu, sigmoid and tanh, whose derivative follows from their
    output, so that the residual is not saved for backward and may change; any other activation then runs as written.
    A method is only rewritten where its source shows that nothing else reads what is fused; the rest of it stays as
    written. Whether the operations run fused is decided at each call: with hooks, with a residual of another shape or
    type, with a module that was put in another's place, and under torch.compile they run one by one. The module's class
    becomes a subclass of its own, of the same name.

    Not converted, and named with the reason: subclasses (but a subclass that calls torch.nn.functional.batch_norm in
    its own forward is rewritten like any other module), lazy layers without a shape, SyncBatchNorm, TorchScript.

    Args:
        model: changed in place; all of it or, where an error is raised, nothing.
        fuse: also fuse activations and residual additions.

    Returns:
        What became of each layer; print it.

    Raises TypeError if `model` is not a torch.nn.Module. `revert` takes it all back.
    """
    check_module("convert", model)
    names = names_of(model)
    reasons = {m: _why_not(m) for m in names if isinstance(m, _NormBase) or is_scripted_norm(m)}
    swapped = [module for module, why in reasons.items() if why is None and type(module) in _OURS]
    changes: dict[nn.Module, type] = {module: _OURS[type(module)] for module in swapped}
    fuser = Fuser(frozenset(m for m, why in reasons.items() if why is None and (m in changes or m.act is None)))
    if fuse:
        for module in children_first(model):
            if not opaque(module) and module not in changes and type(module) not in FROZEN:
                fuser.plan(module)
    rewritten, fusions = fuser.chosen()
    stale = {module: original(type(module)) for module in names if original(type(module)) is not type(module)}
    changes |= stale | rewritten
    found = {  # what each layer is fused with, at the call with the most of it
        layer: max((each for each in fusions if layer in each.layers), key=lambda each: (each.residual, bool(each.act)))
        for layer in frozenset[nn.Module]().union(*(fusion.layers for fusion in fusions))
    }
    with all_or_nothing(model):
        for module, cls in changes.items():
            become(module, cls)
        for module in swapped:
            module.__dict__[_MARK] = True
        for module in reasons:
            module.__dict__.pop(_FUSED, None)
        for module, best in found.items():
            if reasons.get(module, "") is None and (words := _joined(best)):
                module.__dict__[_FUSED] = words
    layers = []
    for module in (module for module in names if module in reasons or module in found):
        fusion, why_not = found.get(module), reasons.get(module)
        act, residual = (None, False) if fusion is None else (fusion.act, fusion.residual)
        converted = why_not is None or fusion is not None
        if converted:
            why_not = None if act is not None or residual else _why_not_fused(module, fuse, fuser)
        kind = original(type(module)).__name__
        layers.append(Layer(tuple(names[module]), kind, converted, act, residual, why_not))
    if not layers:
        warn_of_none()
    return Conversion(tuple(layers))


def revert(model: nn.Module) -> Reversion:
    """Take `convert` back, in place: torch.nn's classes, and the model's own methods.

    A model that was never converted stays as it is, layers of this package that it was built with included.

    Args:
        model: changed in place; all of it or, where an error is raised, nothing.

    Returns:
        Which layers and modules were given back; print it.

    Raises TypeError if `model` is not a torch.nn.Module, and ValueError, before anything has changed, if a converted
    layer has since been given an activation of its own, which torch.nn's cannot have.
    """
    check_module("revert", model)
    changes: dict[nn.Module, type] = {}
    layers: list[str] = []
    modules: list[str] = []
    for name, module in paths(model):
        if module in changes:
            continue
        if module.__dict__.get(_MARK) and type(module) in _THEIRS:
            if getattr(module, "act", None) is not None:
                raise ValueError(
                    f"{name or 'the layer'} was given act={module.act!r} after the conversion, which "
                    f"{_THEIRS[type(module)].__name__} of torch.nn cannot have: set act = None first"
                )
            changes[module] = _THEIRS[type(module)]
            layers.append(name or "(the model)")
        elif original(type(module)) is not type(module):
            changes[module] = original(type(module))
            modules.append(name or "(the model)")
    with all_or_nothing(model):
        for module, cls in changes.items():
            become(module, cls)
        for module in model.modules():
            module.__dict__.pop(_FUSED, None)
        for module in changes:
            if module.__dict__.pop(_MARK, False):
                for name in _NEW_NAMES - {"forward"}:
                    module.__dict__.pop(name, None)
    return Reversion(tuple(layers), tuple(modules))


def _why_not(module: nn.Module) -> str | None:
    """Why a norm layer is not converted; None where it is, or is ours already."""
    cls = type(module)
    if cls in _THEIRS:
        return None
    if cls in _OURS:
        taken = sorted(_NEW_NAMES & {*vars(module), *module._modules, *module._buffers, *module._parameters})
        return f"the instance has an attribute {taken[0]!r} of its own" if taken else None
    if cls in OURS or cls in DOMAINS:
        return "of this package already, and not fused"
    why = not_python(module)
    if why is not None:
        return why
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm: batchnorm.sync(model) makes it this package's"
    if cls.__module__.startswith("torch.nn.modules.instancenorm"):
        return "InstanceNorm: no batch statistics"
    return subclassed(cls)


def _why_not_fused(module: nn.Module, fuse: bool, fuser: Fuser) -> str:
    if not fuse:
        return "fuse=False"
    if not bypassable(module):
        return "it has hooks"
    if type(module) in _THEIRS and module.act is not None:
        return f"act={module.act!r} of its own"
    for parent, plan in fuser.plans.items():
        if plan.why_not is not None and module in parent.children():
            return plan.why_not
    return "no activation or addition is seen to follow it alone"
