"""convert(): replace a model's batch norm layers with this package's and fuse what follows them; revert()."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.layers import BatchNorm2d
from batchnorm.records import Record, abbreviate, format_names
from batchnorm.restoring import all_or_nothing, set_class
from batchnorm.surgery._fusing.planner import Fuser
from batchnorm.surgery._fusing.rewriting import Fusion
from batchnorm.surgery._shared.activations import is_bypassable
from batchnorm.surgery._shared.layers import (
    OURS,
    STOCK,
    check_also,
    check_module,
    children_first,
    describe_subclass,
    has_generated_code,
    is_norm,
    kind_of_layer,
    names_of,
    original,
    paths,
    plain_class,
    warn_of_none,
    why_not_python,
)
from batchnorm.surgery._shared.norm import FROZEN
from batchnorm.surgery.freeze import folded_class, frozen_class
from batchnorm.variants import DOMAINS, PLAIN
from batchnorm.variants.libraries import why_not_batch
from batchnorm.words import plural

__all__ = ["convert", "revert"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One batch norm layer of a `Conversion`.

    Attributes:
        names: all its names in the model.
        kind: its class before the conversion.
        converted: whether it is this package's layer now.
        act: the fused activation, or None.
        residual: whether a residual addition is fused.
        why_not: why it was not converted, or why nothing was fused; None if it was fused.
    """

    names: tuple[str, ...]
    kind: str
    converted: bool
    act: str | None = None
    residual: bool = False
    why_not: str | None = None

    @property
    def name(self) -> str:
        """Its first name; empty if it is the model itself."""
        return self.names[0]

    @property
    def fused(self) -> bool:
        """Whether an activation or an addition is fused."""
        return self.act is not None or self.residual


@dataclass(frozen=True, slots=True, repr=False)
class Conversion(Record):
    """What `convert` did; `print` shows one line per kind of layer and outcome.

    Attributes:
        layers: one record for each batch norm layer of the model.
        gates: the names of the modules that multiply by a squeeze-and-excite gate, whose gradients are fused.
    """

    layers: tuple[Layer, ...]
    gates: tuple[str, ...] = ()

    @property
    def converted(self) -> int:
        """The number of layers that are this package's now."""
        return sum(layer.converted for layer in self.layers)

    @property
    def fused(self) -> int:
        """The number of layers with a fused activation or addition."""
        return sum(layer.fused for layer in self.layers)

    def _head(self) -> list[str]:
        if not self.layers:
            return ["no batch norm layers"]
        head = f"{self.converted} of {plural(len(self.layers), 'batch norm layer')} converted, {self.fused} fused"
        return [head + (f"; {plural(len(self.gates), 'squeeze-and-excite gate')}" if self.gates else "")]

    def _rows(self) -> Iterable[tuple[str, str]]:
        width = max((len(layer.kind) for layer in self.layers), default=0)
        for layer in self.layers:
            outcome = f"with {_describe_fusion(layer)}" if layer.fused else f"alone ({layer.why_not})"
            outcome = outcome if layer.converted else f"not converted ({layer.why_not})"
            yield f"{layer.kind:{width}}  {outcome}", format_names(*layer.names)


@dataclass(frozen=True, slots=True, repr=False)
class Reversion(Record):
    """What `revert` did.

    Attributes:
        layers: the names of the layers that are torch.nn's again.
        modules: the names of the modules that have their original methods again.
    """

    layers: tuple[str, ...]
    modules: tuple[str, ...]

    def _head(self) -> list[str]:
        if not self.layers and not self.modules:
            return ["nothing to revert: no layer was converted"]
        rows = [f"{plural(len(self.layers), 'batch norm layer')} reverted to torch.nn: {abbreviate(self.layers)}"]
        if self.modules:
            rows.append(f"{plural(len(self.modules), 'module')} with the original methods: {abbreviate(self.modules)}")
        return rows


def _describe_fusion(layer: Layer | Fusion) -> str:
    """What is fused with a layer, such as "residual and relu", or an empty string."""
    return " and ".join(filter(None, ("residual" if layer.residual else None, layer.act)))


_OURS: dict[type, type] = dict(zip(STOCK, PLAIN, strict=False))
_OURS |= {make(theirs): make(ours) for make in (frozen_class, folded_class) for theirs, ours in _OURS.items()}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}

# The instance attribute that marks converted layers for `revert`; copied and pickled with the layer.
_MARK = "_batchnorm_converted"
# The instance attribute that says what is fused, for repr(model).
_FUSED = "_batchnorm_fused"

# Attributes of our layers that torch.nn's do not have: a user's attribute of that name would change its meaning.
_NEW_NAMES = frozenset(dir(BatchNorm2d)) - {*dir(nn.BatchNorm2d), "eps"} | {"forward"}


def convert(model: nn.Module, fuse: bool = True, also: Sequence[type[nn.Module]] = ()) -> Conversion:
    """Replace torch.nn's batch norm layers with this package's, in place, and fuse the activations after them.

    A fused layer computes y = act(BN(x) [+ residual]) in one operation.

    Only the class of each torch.nn.BatchNorm1d, 2d and 3d changes. Its parameters, buffers, names, hooks, modes and
    attributes stay the same, so existing optimizers and checkpoints keep working. Frozen layers stay frozen.

    With `fuse`, the methods that call a batch norm are rewritten to fuse the addition and activation that follow:
    `act(bn(x))`, `bn(x) + residual`, `act(bn(x) + residual)`, also over several statements, and in torch.nn.Sequential.
    After an addition, relu, sigmoid and tanh are fused: their derivative follows from their output, so the residual is
    not saved and may change. Other activations then run separately. A method is rewritten only if its source shows that
    nothing else reads the intermediate results. Each call decides whether it runs fused: with hooks, with a residual of
    another shape or type and with a replaced module the operations run one by one. Under torch.compile, training on
    large tensors runs fused, and the compiler fuses all else. The module's class becomes a subclass of the same name.

    Squeeze-and-excite gates, x·s with a factor for each sample and channel, get gradients in fewer passes over memory:
    Σ grad·x without a product of x's size, and the gradient of the average as an expanded tensor.

    Not converted, but listed with the reason: lazy layers without a shape, SyncBatchNorm, TorchScript, subclasses, and
    other libraries' layers. A layer whose forward calls torch.nn.functional.batch_norm is rewritten like any other
    module, and fused with the activation that it applies, such as timm's BatchNormAct2d.

    Args:
        model: changed in place; nothing if an error is raised.
        fuse: also fuse activations and residual additions.
        also: subclasses of torch.nn's that normalize as their base class does, to be replaced. What else they do is
            lost until `revert`.

    Returns:
        The outcome of each layer; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module. `revert` undoes the conversion.
    """
    check_module("convert", model)
    check_also("convert", also)
    names = names_of(model)
    reasons = {m: _why_not(m, also) for m in names if isinstance(m, _NormBase) or is_norm(m)}
    swapped = {m: ours for m, why in reasons.items() if why is None and (ours := _our_class(m, also)) is not None}
    changes: dict[nn.Module, type] = dict(swapped)
    fuser = Fuser(frozenset(m for m, why in reasons.items() if why is None and (m in changes or m.act is None)))
    if fuse:
        for module in children_first(model):
            if not has_generated_code(module) and module not in changes and type(module) not in FROZEN:
                fuser.plan(module)
    rewritten, fusions, gated = fuser.result()
    stale = {module: original(type(module)) for module in names if original(type(module)) is not type(module)}
    changes |= stale | rewritten
    best: dict[nn.Module, Fusion] = {}  # per layer the fusion of the most operations
    for fusion in sorted(fusions, key=lambda fusion: (fusion.residual, bool(fusion.act)), reverse=True):
        best = dict.fromkeys(fusion.layers, fusion) | best
    was = {module: plain_class(module) for module in swapped}
    with all_or_nothing(model):
        for module, cls in changes.items():
            set_class(module, cls)
        for module in swapped:
            module.__dict__[_MARK] = True if was[module] in STOCK else was[module]
        for module in reasons:
            module.__dict__.pop(_FUSED, None)
        for module, fusion in best.items():
            if reasons.get(module, "") is None and (words := _describe_fusion(fusion)):
                module.__dict__[_FUSED] = words
    layers = []
    for module in (module for module in names if module in reasons or module in best):
        why_not = reasons.get(module)
        act, residual = (best[module].act, best[module].residual) if module in best else (None, False)
        converted = why_not is None or module in best
        if converted:
            why_not = None if act is not None or residual else _why_not_fused(module, fuse, fuser)
        kind = original(type(module)).__name__
        layers.append(Layer(tuple(names[module]), kind, converted, act, residual, why_not))
    if not layers:
        warn_of_none()
    return Conversion(tuple(layers), tuple(names[module][0] for module in gated))


def revert(model: nn.Module) -> Reversion:
    """Undo `convert`, in place: restore torch.nn's classes and the model's methods.

    A model that was never converted does not change, even if it has layers of this package.

    Args:
        model: changed in place; nothing if an error is raised.

    Returns:
        The layers and modules that were reverted; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module; ValueError, without changes, if `act` of a converted layer was
    set: torch.nn's layers have none.
    """
    check_module("revert", model)
    changes: dict[nn.Module, type] = {}
    layers, modules = list[str](), list[str]()
    for name, module in paths(model):
        if module in changes:
            continue
        if module.__dict__.get(_MARK) and type(module) in _THEIRS:
            theirs, was = _THEIRS[type(module)], module.__dict__[_MARK]
            if getattr(module, "act", None) is not None:
                raise ValueError(
                    f"{name or 'the layer'} has act={module.act!r}, set after the conversion: "
                    f"torch.nn.{theirs.__name__} has no act, set it to None first"
                )
            if isinstance(was, type):
                theirs = frozen_class(was) if type(module) in FROZEN else was
            changes[module] = theirs
            layers.append(name or "(the model)")
        elif original(type(module)) is not type(module):
            changes[module] = original(type(module))
            modules.append(name or "(the model)")
    with all_or_nothing(model):
        for module, cls in changes.items():
            set_class(module, cls)
        for module in model.modules():
            module.__dict__.pop(_FUSED, None)
        for module in changes:
            if module.__dict__.pop(_MARK, False):
                for name in _NEW_NAMES - {"forward"}:
                    module.__dict__.pop(name, None)
    return Reversion(tuple(layers), tuple(modules))


def _our_class(module: nn.Module, also: Sequence[type[nn.Module]]) -> type | None:
    """This package's class for a layer of torch.nn, or of a subclass in `also`; None without one."""
    if type(module) in _OURS:
        return _OURS[type(module)]
    cls = plain_class(module)
    base = next((base for base in STOCK if cls is base or (cls in also and issubclass(cls, base))), None)
    ours = None if base is None else _OURS.get(base)
    return frozen_class(ours) if ours is not None and type(module) in FROZEN else ours


def _why_not(module: nn.Module, also: Sequence[type[nn.Module]]) -> str | None:
    """Why a norm layer cannot be converted; None if it can, or if it is this package's already."""
    cls = type(module)
    if cls in _THEIRS:
        return None
    if _our_class(module, also) is not None:
        conflicts = sorted(_NEW_NAMES & {*vars(module), *module._modules, *module._buffers, *module._parameters})
        return f"the instance has a custom attribute {conflicts[0]!r}" if conflicts else None
    if cls in OURS or cls in DOMAINS:
        return "already of this package, and not fused"
    why = why_not_python(module)
    if why is not None:
        return why
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm: convert it with batchnorm.sync(model)"
    if cls.__module__.startswith("torch.nn.modules.instancenorm"):
        return "InstanceNorm: no batch statistics"
    kind = kind_of_layer(module)
    why = None if kind is None else why_not_batch(kind)
    if kind is not None and kind.magnitude:
        why = "its scale is the magnitude of gamma, plus eps: no layer of this package has such a scale"
    if kind is not None and why is None:
        why = "its forward has nothing that can be fused"
    return why or describe_subclass(original(cls))


def _why_not_fused(module: nn.Module, fuse: bool, fuser: Fuser) -> str:
    if not fuse:
        return "fuse=False"
    if not is_bypassable(module):
        return "it has hooks"
    if type(module) in _THEIRS and module.act is not None:
        return f"it has act={module.act!r}"
    return fuser.why_not(module)
