"""Plan which modules of a model get rewritten methods, in which batch norms fuse with what follows them.

Children first: whether a module's forward ends in a batch norm decides what its parent can fuse.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from types import FunctionType

from torch import nn

from batchnorm.surgery._fusing.classes import Recipe, method_of, sequential, stand_in, why_no_subclass
from batchnorm.surgery._fusing.gates import POOLS
from batchnorm.surgery._fusing.products import definition_of, rewrite_products
from batchnorm.surgery._fusing.rewriting import Fusion, MethodRewrite, rewrite
from batchnorm.surgery._fusing.runtime import TAIL
from batchnorm.surgery._fusing.source import Scope, SourceError, digest, parse
from batchnorm.surgery._shared.activations import activation_of, is_bypassable
from batchnorm.surgery._shared.layers import original, paths

_NONE: frozenset[nn.Module] = frozenset()
_LONGEST = 60  # characters of a statement in a reason


@dataclass(eq=False)
class Version:
    """A new class for a module, what it fuses, and the modules that must return deferred batch norms for it.

    `gated`: whether its methods multiply by a factor that they compute from an average over positions.
    """

    cls: type
    fusions: list[Fusion]
    relies_on: list[nn.Module]
    gated: bool = False


@dataclass
class Plan:
    """The plan of one module: a version that fuses, and a version whose output may be a deferred batch norm of `tails`.

    `why_not` is the reason why a method is not rewritten.
    """

    fusing: Version | None = None
    tail: Version | None = None
    tails: frozenset[nn.Module] = _NONE
    why_not: str | None = None


class Fuser:
    """Plans every module of a model; `layers` are the batch norms that will be ours."""

    def __init__(self, layers: frozenset[nn.Module]) -> None:
        self.layers = layers
        self.plans: dict[nn.Module, Plan] = {}
        self._readers: dict[nn.Module, str] = {}

    def ends_in(self, module: nn.Module) -> frozenset[nn.Module]:
        """The layers whose output the module returns unchanged."""
        if not is_bypassable(module):
            return _NONE
        if module in self.layers:
            return frozenset([module])
        plan = self.plans.get(module)
        return _NONE if plan is None else plan.tails

    def plan(self, module: nn.Module) -> None:
        """Plan one module, after its children."""
        cls = original(type(module))
        if "forward" in vars(module):
            self.plans[module] = Plan(why_not=f"the forward of this {cls.__name__} is replaced on the instance")
        elif method_of(cls, "forward") == (nn.Sequential.forward, nn.Sequential):
            self.plans[module] = self._sequential(module, cls)
        elif not cls.__module__.startswith("torch."):
            self.plans[module] = self._methods(module, cls)

    def result(self) -> tuple[dict[nn.Module, type], list[Fusion], list[nn.Module]]:
        """The new class of each module that needs one, all fusions, and the modules with a gate."""
        chosen = {module: plan.fusing for module, plan in self.plans.items() if plan.fusing is not None}
        fusions = [fusion for version in chosen.values() for fusion in version.fusions]
        todo = [module for version in chosen.values() for module in version.relies_on]
        while todo:
            module = todo.pop()
            plan = self.plans.get(module)
            if plan is not None and plan.tail is not None and chosen.get(module) is not plan.tail:
                chosen[module] = plan.tail
                todo += plan.tail.relies_on
        gated = [module for module, version in chosen.items() if version.gated]
        return {module: version.cls for module, version in chosen.items()}, fusions, gated

    def why_not(self, layer: nn.Module) -> str:
        """Why nothing was fused with a layer."""
        for parent, plan in self.plans.items():
            if plan.why_not is not None and layer in parent.children():
                return plan.why_not
        reader = self._readers.get(layer)
        if reader is not None:
            return f"read by {reader if len(reader) <= _LONGEST else reader[: _LONGEST - 1] + '…'}"
        if any(layer in plan.tails for plan in self.plans.values()):
            return "its module returns the output, and no caller adds to it or activates it"
        return "nothing that follows can be fused with it"

    # --- torch.nn.Sequential ------------------------------------------------------------------------------------------

    def _sequential(self, module: nn.Module, cls: type) -> Plan:
        why_not = why_no_subclass(cls)
        if why_not is not None:
            return Plan(why_not=why_not)
        deferred, relies_on = _NONE, list[nn.Module]()
        fusions, for_fusions = list[Fusion](), list[nn.Module]()
        for child in module._modules.values():
            if child is None:
                return Plan()
            activation = activation_of(child, (), {}) if deferred else None
            if activation is None:
                for layer in deferred:
                    self._readers.setdefault(layer, type(child).__name__)
                deferred, relies_on = self.ends_in(child), [child]
            elif activation.act is not None:
                fusions.append(Fusion(frozenset(), deferred, act=activation.act))
                for_fusions += relies_on
                deferred = _NONE
        fusing = Version(sequential(cls), fusions, for_fusions) if fusions else None
        return Plan(fusing, Version(sequential(cls), [], [*for_fusions, *relies_on]) if deferred else None, deferred)

    # --- other classes ------------------------------------------------------------------------------------------------

    def _methods(self, module: nn.Module, cls: type) -> Plan:
        methods = {name: method[0] for name in _method_names(cls) if (method := method_of(cls, name)) is not None}
        names = [name for name, function in methods.items() if self._may_fuse(module, function)]
        why_not = why_no_subclass(cls)
        if why_not is not None:
            return Plan(why_not=why_not if names else None)
        plan = Plan()
        texts = dict[str, str]()
        fusions, relies_on = list[Fusion](), list[nn.Module]()
        for name in names:
            try:
                new = self._rewrite(module, methods[name], tail=False)
            except SourceError as error:
                plan.why_not = str(error)
                continue
            if new is not None:
                texts[name] = new.text
                fusions += new.fusions
                relies_on += new.relies_on
        is_gated = self._gates(module, methods, texts)
        recipe: Recipe = tuple((name, text, name, digest(methods[name])) for name, text in texts.items())
        if recipe:
            plan.fusing = Version(stand_in(cls, recipe), fusions, relies_on, is_gated)
        if "forward" in names and plan.why_not is None:
            new = self._rewrite(module, methods["forward"], tail=True)
            if new is not None and new.tails:
                plan.tails = new.tails
                tail = (TAIL, new.text, "forward", digest(methods["forward"]))
                plan.tail = Version(stand_in(cls, (*recipe, tail)), [], [*relies_on, *new.relies_on], is_gated)
        return plan

    def _may_fuse(self, module: nn.Module, function: FunctionType) -> bool:
        """Whether a method names a module that ends in a batch norm, or the function; reads no source."""
        names = set(function.__code__.co_names)
        return "batch_norm" in names or any(
            self.ends_in(child) and names.intersection(path.split(".")) for path, child in paths(module)
        )

    def _rewrite(self, module: nn.Module, function: FunctionType, *, tail: bool) -> MethodRewrite | None:
        definition = parse(function)
        scope = _scope(module, function, definition)
        return None if scope is None else rewrite(scope, definition, self.ends_in, tail, self._readers)

    def _gates(self, module: nn.Module, methods: dict[str, FunctionType], texts: dict[str, str]) -> bool:
        """Rewrite the methods' products and averages in `texts`, if they may be those of a gate; whether it did."""
        pools = any(_is_pooling(child) for child in module.children())
        if not (pools or any("mean" in function.__code__.co_names for function in methods.values())):
            return False
        new = dict[str, str]()
        products = averages = 0
        for name, function in methods.items():
            try:
                definition = parse(function)
            except SourceError:
                continue
            scope = _scope(module, function, definition)
            if scope is None:
                continue
            if name in texts:
                definition = definition_of(texts[name])
            text, count_products, count_averages = rewrite_products(scope, definition)
            if count_products or count_averages:
                new[name] = text
            products += count_products
            averages += count_averages
        if not products or not (averages or pools):
            return False
        texts |= new
        return True


def _is_pooling(module: nn.Module) -> bool:
    """Whether a module averages over positions, alone or in a sequence."""
    return type(module) in POOLS or (isinstance(module, nn.Sequential) and any(type(one) in POOLS for one in module))


def _scope(module: nn.Module, function: FunctionType, definition: ast.FunctionDef) -> Scope | None:
    """The scope of a method, or None if it may see or change its variables in ways that the source does not show."""
    scope = Scope(module, function, definition)
    hidden = {"locals", "eval", "exec", "vars", "dir"}.intersection(function.__code__.co_names)
    return scope if scope.self_is_fixed and not hidden else None


def _method_names(cls: type) -> dict[str, None]:
    """The methods of the class and its bases, except PyTorch's."""
    return {
        name: None
        for base in cls.__mro__
        if not base.__module__.startswith("torch.")
        for name, value in vars(base).items()
        if isinstance(value, FunctionType) and not name.startswith("__")
    }
