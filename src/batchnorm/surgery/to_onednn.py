"""to_onednn(): run convolutions on the CPU as oneDNN primitives, with packed weights and the activation after them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm.records import Skipped
from batchnorm.restoring import all_or_nothing, set_class, undisturbed
from batchnorm.surgery._folding import primitives
from batchnorm.surgery._folding.pairs import RunTrace, runs_base_forward
from batchnorm.surgery._folding.trials import Compared, check_model, difference, finite_outputs, limit_of
from batchnorm.surgery._fusing.classes import why_no_subclass
from batchnorm.surgery._shared.activations import Activation, activation_of, is_bypassable
from batchnorm.surgery._shared.calling import Example, ForwardFn
from batchnorm.surgery._shared.layers import FRESH, check_module, has_generated_code, names_of, warn_of_none
from batchnorm.words import plural

__all__ = ["Packed", "Packing", "to_onednn"]

_ALONE = "no activation module comes directly after it"


@dataclass(frozen=True, slots=True)
class Packed:
    """One convolution of a `Packing`.

    Attributes:
        name: the convolution's name.
        kind: its class.
        act: the activation that it applies; None if it applies none.
        activation: the name of the module that applied it before, now torch.nn.Identity; None without one.
        alone: why no activation is part of it; None if one is.
    """

    name: str
    kind: str
    act: str | None
    activation: str | None
    alone: str | None


@dataclass(frozen=True, slots=True, repr=False)
class Packing(Compared):
    """What `to_onednn` did.

    Attributes:
        layers: one record for each convolution that runs as one primitive; empty if the model was restored.
        skipped: the other convolutions and the linear layers, each with the reason.
        max_error: the largest difference of the model's outputs on the example, divided by their largest magnitude;
            0 if nothing was changed.
        rms_error: the RMS of that difference, divided by the same magnitude; 0 if nothing was changed.
        bound: the largest accepted `max_error`; the model is restored if it is exceeded.
        rounding: the `max_error` from changes of the last digit in every convolution's output; None if the bound does
            not depend on it.
        made: the sizes of the random input on which the model was run, if no example was given.
    """

    layers: tuple[Packed, ...]

    _left = "ordinary operators"

    def _head(self) -> list[str]:
        total = len(self.layers) + len(self.skipped)
        if not total:
            return ["no convolutions"]
        acts = sum(layer.act is not None for layer in self.layers)
        head = f"{len(self.layers)} of {plural(total, 'layer')} run as one oneDNN primitive, {acts} with an activation"
        return [head + self._outcome()]

    def _rows(self) -> Iterable[tuple[str, str]]:
        for layer in self.layers:
            what = f"with {layer.act}" if layer.alone is None else f"alone: {layer.alone}"
            yield f"{layer.kind}  {what}", layer.name


@dataclass(eq=False)
class _Change:
    """A convolution and the activation module after it, if any; `second` computes the result of both."""

    conv: nn.Module
    activation: Activation
    module: nn.Module | None
    alone: str | None

    @property
    def second(self) -> nn.Module:
        return self.conv if self.module is None else self.module

    def make(self) -> None:
        """Change the classes of both."""
        cls: Any = type(self.conv)
        set_class(self.conv, primitives.packed_class(cls, *self.activation))
        if self.module is not None:
            set_class(self.module, nn.Identity, vars(nn.Identity().eval()))


def to_onednn(
    model: nn.Module, example: Any = None, forward_fn: ForwardFn | None = None, *, bound: float | None = None
) -> Packing:
    """Run each convolution, its bias and the activation module after it as one oneDNN primitive, on the CPU, in place.

    For inference without a compiler; call `fold` first, which brings convolution and activation together.

    The weights are packed as oneDNN wants them once, not in every call, and the activation is applied before a result
    is stored. Parameters and the keys of the state dict do not change. A Conv2d gets a subclass of its class; the
    activation module, if it runs once, directly after it, and nothing else reads the result between, becomes
    torch.nn.Identity. A run of the example finds them. ReLU, ReLU6, LeakyReLU, GELU, SiLU, Hardswish, Sigmoid and Tanh
    can be part of a primitive.

    The primitives run in float32, and in bfloat16 where the CPU has it, with gradients off (torch.no_grad() or
    torch.inference_mode()), outside of autocast, except on a single small image, where they would be slower. Anything
    else runs the ordinary operators: training, other devices and types, torch.compile, torch.export, torch.jit.trace
    and torch.func, which see a convolution and an activation.

    Differences from the ordinary operators:

    - Intermediate results are in channels_last memory, whatever the input's: code that calls `view` on them may need
      `reshape`.
    - ReLU and ReLU6 return 0 for NaN.
    - A packed copy of every convolution's weight is kept, made again when the weight changes. A change through `.data`
      or NumPy is seen if it changes most values; after one of single values, change the weight itself once, as by
      `weight.mul_(1)`.

    Args:
        model: in eval mode, on the CPU; changed in place, nothing if an error is raised.
        example: a tensor, a tuple of the model's arguments, a mapping of named ones, or anything that forward_fn
            accepts. Without one, a random input is made that fits the first convolution or linear layer.
        forward_fn: forward_fn(model, example) runs the model on the example and returns the outputs to compare.
        bound: of the largest difference of the model's outputs relative to their largest magnitude; by default that of
            `fold`. If it is exceeded, the model is restored.

    Returns:
        Which convolutions run as one primitive, with which activation, or why not, and the error; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module, the example is none of the three, or none is given and the
    model runs on no random input; ValueError if the model is in training mode, compiled, lazy or on the meta device,
    does not run on the example, or returns nothing that can be compared, and if `bound` is not a positive number.
    """
    check_module("to_onednn", model)
    check_model("to_onednn", model, bound)
    checked = Example("to_onednn", model, example, forward_fn)
    names = names_of(model)
    maps = [m for m in names if isinstance(m, tuple(FRESH)) and not has_generated_code(m)]
    if not maps:
        warn_of_none("convolution")
        return Packing((), ())
    before = finite_outputs("to_onednn", model, checked)
    changes, reasons = _plan(model, maps, checked)
    kinds = {module: type(module).__name__ for module in maps}
    called = {change: None if change.module is None else names[change.module][0] for change in changes}
    moved, limit, noise = None, math.inf, None
    with all_or_nothing(model) as restore:
        for change in changes:
            change.make()
        if changes:
            moved = difference(before, finite_outputs("to_onednn", model, checked))
            assert moved is not None
            limit, noise = limit_of(model, moved, (), bound, changes, checked)
            if not moved.max <= limit:
                restore()
                why = f"restored: the model's outputs differ by {moved.max:.1e}, over the bound of {limit:.1g}"
                reasons |= {change.conv: why for change in changes}
                changes = []
    layers = tuple(
        Packed(names[change.conv][0], kinds[change.conv], change.activation.act, called[change], change.alone)
        for change in changes
    )
    skipped = tuple(Skipped(names[module][0], kinds[module], reasons[module]) for module in maps if module in reasons)
    errors = (0.0, 0.0) if moved is None else (moved.max, moved.rms)
    return Packing(layers, skipped, *errors, limit, noise, checked.made)


def _plan(model: nn.Module, maps: list[nn.Module], example: Example) -> tuple[list[_Change], dict[nn.Module, str]]:
    """The changes that can be made, and why the other maps are skipped."""
    activations = [m for m in model.modules() if activation_of(m, (), {}) not in (None, Activation(None))]
    with undisturbed(model):
        trace = RunTrace(model, (), example.run, activations)
    changes: list[_Change] = []
    reasons = {module: why for module in maps if (why := _why_not(module, trace)) is not None}
    for module in maps:
        if module not in reasons:
            change = _change(module, trace)
            dtype = next(module.parameters()).dtype
            why = primitives.why_unavailable(change.activation.act, dtype)
            if why is None:
                changes.append(change)
            else:
                reasons[module] = why
    return changes, reasons


def _why_not(module: Any, trace: RunTrace) -> str | None:
    """Why a map cannot run as one primitive."""
    if getattr(type(module), "_batchnorm_packed", False):
        return "it is packed already"
    if not isinstance(module, nn.Conv2d):
        return "only a Conv2d is packed"
    if not runs_base_forward(module):
        return "it is of a subclass, which may use its weights differently"
    if not is_bypassable(module):
        return "it has hooks, or a replaced forward or call"
    if not trace.calls[module]:
        return "it is never called"
    return why_no_subclass(type(module)) or primitives.why_not(module)


def _change(conv: nn.Module, trace: RunTrace) -> _Change:
    """The convolution with the activation after it, or alone."""
    link = next((link for link in trace.links if link.first is conv and link.second in trace.activations), None)
    alone = _ALONE if link is None else _why_alone(conv, link.second, link.other_use, trace)
    if link is None or alone is not None:
        return _Change(conv, Activation(None), None, alone)
    activation = activation_of(link.second, (), {})
    assert activation is not None
    return _Change(conv, activation, link.second, None)


def _why_alone(conv: nn.Module, module: nn.Module, other_use: str | None, trace: RunTrace) -> str | None:
    """Why the activation stays a module."""
    activation = activation_of(module, (), {})
    kind = type(module).__name__
    if activation is None or activation.act not in primitives.FUSED:
        return f"no primitive applies {kind}"
    if other_use is not None:
        return f"the tensor before the {kind} has another use ({other_use})"
    for one, words in ((conv, "it"), (module, f"the {kind} after it")):
        if trace.calls[one] != 1:
            return f"{words} is called {trace.calls[one]} times"
    return None
