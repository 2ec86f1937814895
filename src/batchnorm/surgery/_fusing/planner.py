"""Which modules of a model get rewritten methods, so that their batch norms run as one with what follows them.

From the leaves up: whether a module's forward ends in a batch norm decides what its parent can do with its call.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from types import FunctionType

from torch import nn

from batchnorm.surgery._fusing.classes import method_of, refused, sequential, stand_in
from batchnorm.surgery._fusing.expressions import (
    Fusion,
    Known,
    Site,
    Trail,
    place,
)
from batchnorm.surgery._fusing.runtime import TAIL
from batchnorm.surgery._fusing.source import Scope, SourceError, digest, parse
from batchnorm.surgery._fusing.statements import Statements, layers_of
from batchnorm.surgery._shared.activations import activation_of, bypassable
from batchnorm.surgery._shared.layers import original, paths

_NONE: frozenset[nn.Module] = frozenset()


@dataclass
class Plan:
    """What one module's class is to become, which layers that fuses, and which layers its output may come from."""

    cls: type | None = None
    fusions: list[Fusion] = field(default_factory=list)
    # Whose forwards must be able to hold back for these fusions.
    relies_on: list[nn.Module] = field(default_factory=list)
    tail_cls: type | None = None
    tails: frozenset[nn.Module] = _NONE
    tail_relies_on: list[nn.Module] = field(default_factory=list)
    why_not: str | None = None


class Fuser:
    """Plans for every module of a model; `layers` are those that will be ours."""

    def __init__(self, layers: frozenset[nn.Module]) -> None:
        self.layers = layers
        self.plans: dict[nn.Module, Plan] = {}

    def ends_in(self, module: nn.Module) -> frozenset[nn.Module]:
        """The layers whose output the module returns as it is."""
        if not bypassable(module):
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

    def chosen(self) -> tuple[dict[nn.Module, type], list[Fusion]]:
        """The new class of each module that needs one, and all that gets fused."""
        classes: dict[nn.Module, type] = {}
        fusions: list[Fusion] = []
        todo = []
        for module, plan in self.plans.items():
            if plan.cls is not None:
                classes[module] = plan.cls
                fusions += plan.fusions
                todo += plan.relies_on
        while todo:
            module = todo.pop()
            needed = self.plans.get(module)
            if needed is not None and needed.tail_cls is not None and classes.get(module) is not needed.tail_cls:
                classes[module] = needed.tail_cls
                todo += needed.tail_relies_on
        return classes, fusions

    # --- torch.nn.Sequential ------------------------------------------------------------------------------------------

    def _sequential(self, module: nn.Module, cls: type) -> Plan:
        why_not = refused(cls)
        if why_not is not None:
            return Plan(why_not=why_not)
        plan = Plan()
        held: frozenset[nn.Module] = _NONE
        relies_on: list[nn.Module] = []
        for child in module._modules.values():
            if child is None:
                return plan
            activation = activation_of(child, (), {}) if held else None
            if activation is not None:
                if activation.act is not None:
                    plan.fusions.append(Fusion(frozenset(), held, False, activation.act))
                    plan.relies_on += relies_on
                    held = _NONE
                continue
            held, relies_on = self.ends_in(child), [child]
        plan.tails, plan.tail_relies_on = held, [*plan.relies_on, *relies_on]
        if plan.fusions:
            plan.cls = sequential(cls)
        if plan.tails:
            plan.tail_cls = sequential(cls)
        return plan

    # --- classes with methods of their own ----------------------------------------------------------------------------

    def _methods(self, module: nn.Module, cls: type) -> Plan:
        names = [name for name in _method_names(cls) if self._may_concern(module, cls, name)]
        if not names:
            return Plan()
        why_not = refused(cls)
        if why_not is not None:
            return Plan(why_not=why_not)
        plan = Plan()
        recipe: list[tuple[str, str, str, str]] = []
        for name in names:
            try:
                rewritten = self._rewrite(module, cls, name, tail=False)
            except SourceError as error:
                plan.why_not = str(error)
                continue
            if rewritten is not None:
                recipe.append(rewritten.recipe)
                plan.fusions += rewritten.fusions
                plan.relies_on += rewritten.relies_on
        if recipe:
            plan.cls = stand_in(cls, tuple(recipe))
        if "forward" in names and plan.why_not is None:
            tail = self._rewrite(module, cls, "forward", tail=True)
            if tail is not None and tail.tails:
                plan.tails, plan.tail_relies_on = tail.tails, [*plan.relies_on, *tail.relies_on]
                plan.tail_cls = stand_in(cls, (*recipe, tail.recipe))
        return plan

    def _may_concern(self, module: nn.Module, cls: type, name: str) -> bool:
        """Whether a method names a module that ends in a batch norm, or the function; reads no source."""
        found = method_of(cls, name)
        if found is None:
            return False
        names = _names(found[0])
        if "batch_norm" in names:
            return True
        return any(self.ends_in(child) and names.intersection(path.split(".")) for path, child in paths(module))

    def _rewrite(self, module: nn.Module, cls: type, name: str, *, tail: bool) -> _Rewritten | None:
        found = method_of(cls, name)
        assert found is not None
        function = found[0]
        definition = parse(function)
        scope = Scope(module, function, definition)
        if not scope.self_is_fixed or {"locals", "eval", "exec", "vars", "dir"} & _names(function):
            return None
        banned: frozenset[Site] = frozenset()
        while True:
            known = Known(scope, self.ends_in, banned)
            statements = Statements(known, definition, tail=tail)
            new = statements.rewritten()
            wanted = frozenset[Site]().union(*(fusion.sites for fusion in known.fusions))
            wanted = wanted.union(*(trail.sites for trail in statements.tails))
            if not known.begun - wanted:
                break
            banned |= known.begun - wanted
        if not wanted:
            return None
        if tail:
            new.name = TAIL
        text = ast.unparse(new) + "\n"
        calls = [node for node in ast.walk(definition) if isinstance(node, ast.Call) and place(node) in wanted]
        relies_on = [scope.value(call.func) for call in calls]
        return _Rewritten(
            (TAIL if tail else name, text, name, digest(function)),
            known.fusions,
            [m for m in relies_on if isinstance(m, nn.Module)],
            statements.tails,
        )


@dataclass
class _Rewritten:
    recipe: tuple[str, str, str, str]
    fusions: list[Fusion]
    relies_on: list[nn.Module]
    trails: list[Trail]

    @property
    def tails(self) -> frozenset[nn.Module]:
        return layers_of(self.trails)


def _names(function: FunctionType) -> set[str]:
    return set(function.__code__.co_names)


def _method_names(cls: type) -> list[str]:
    """The methods of the class and of those above it that are not PyTorch's."""
    return list(
        dict.fromkeys(
            name
            for base in cls.__mro__
            if not base.__module__.startswith("torch.")
            for name, value in vars(base).items()
            if isinstance(value, FunctionType) and not name.startswith("__")
        )
    )
