"""Find the frozen batch norms that the map before them can apply, and compare outputs and gradients on the example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.records import Skipped
from batchnorm.restoring import all_or_nothing, in_eval, set_class, undisturbed
from batchnorm.surgery._folding.on_the_fly import (
    apply_through,
    can_use_mask,
    can_use_output,
    run_with,
    save_instead,
)
from batchnorm.surgery._folding.pairs import RunTrace
from batchnorm.surgery._folding.trials import Compared, Difference, Pair, difference, finite_outputs, limit_of
from batchnorm.surgery._shared.activations import Activation, activation_of
from batchnorm.surgery._shared.calling import Example, leaves
from batchnorm.surgery._shared.layers import (
    FROZEN,
    OURS,
    STOCK,
    UNTRACKED,
    Norm,
    act_of,
    describe_subclass,
    made_of,
    original,
    plain_class,
)
from batchnorm.words import plural

# Multiples of the bound of the outputs. A pair's gradients are sums over all positions. In the model, rounding can move
# a value to the other side of an activation's kink, which changes the gradients of all weights below.
_PAIR_FACTOR = 10
_MODEL_FACTOR = 1000
_MAX_LIMIT = 0.1


@dataclass(frozen=True, slots=True)
class Applied:
    """One layer of an `Applying`.

    Attributes:
        name: the layer's name.
        kind: its class before it was frozen.
        through: the name of the convolution or linear layer that applies it.
        activation: the activation of the layer, or the class of the module after it; None if neither is known.
        keeps: what that activation keeps for backward: its "output", which other code keeps too; a "mask", one byte for
            each value, where no other code keeps the output; or its "input". None without an activation.
    """

    name: str
    kind: str
    through: str
    activation: str | None
    keeps: str | None


@dataclass(frozen=True, slots=True, repr=False)
class Applying(Compared):
    """What `freeze` folded.

    Attributes:
        layers: one record for each layer that the map before it applies; empty if all were restored.
        skipped: the other layers, each with the reason.
        max_error: the largest difference of the model's outputs on the example, divided by their largest magnitude;
            0 if nothing was folded.
        rms_error: the RMS of that difference, divided by the same magnitude; 0 if nothing was folded.
        bound: the largest accepted `max_error`; the folds are restored if it is exceeded.
        rounding: the `max_error` from changes of the last digit in every layer's output; None if the bound does not
            depend on it.
        made: the sizes of the random input on which the model was run, if no example was given.
        gradient_error: the largest difference of the gradients of a map and the norm after it, on the map's input in
            the example, divided by the largest magnitude of that gradient; a pair over ten times `bound` is not folded.
        gradient_rms_error: the RMS of the difference of the gradients of all the model's parameters, divided by their
            RMS; the folds are restored over `gradient_bound`. It is larger: rounding can move a value to the other side
            of a kink of an activation.
        gradient_bound: the largest accepted `gradient_rms_error`.
    """

    layers: tuple[Applied, ...]
    gradient_error: float = 0.0
    gradient_rms_error: float = 0.0
    gradient_bound: float = math.inf

    _left = "not folded"

    @property
    def taken_back(self) -> bool:
        """Whether the folds were restored because outputs or gradients changed too much."""
        return self.max_error > self.bound or self.gradient_rms_error > self.gradient_bound

    def _head(self) -> list[str]:
        total = len(self.layers) + len(self.skipped)
        head = f"{len(self.layers)} of {plural(total, 'batch norm layer')} applied by the map before it"
        gradients = ""
        if self.gradient_bound < math.inf:
            gradients = (
                f"; gradients differ by {self.gradient_error:.1e} in a layer, by {self.gradient_rms_error:.1e} (RMS) "
                f"in the model, bound {self.gradient_bound:.1g}"
            )
        return [head + self._outcome() + gradients]

    def _rows(self) -> Iterable[tuple[str, str]]:
        for layer in self.layers:
            keeps = "" if layer.keeps is None else f"; {layer.activation} keeps its {layer.keeps}"
            keeps += ", the next map its output: batchnorm.lean keeps one of them" if layer.keeps == "input" else ""
            yield f"{layer.kind}  applied by the map before it{keeps}", f"{layer.name} → {layer.through}"


@dataclass(eq=False)
class _Fold:
    """A pair to fold, and the activation module after the norm, if any; the errors of its output and gradients."""

    pair: Pair
    module: nn.Module | None
    error: Difference | None = None
    gradient_error: float = 0.0

    @property
    def second(self) -> nn.Module:
        return self.pair.norm.layer


def fold_frozen(
    model: nn.Module,
    norms: Sequence[Norm],
    unknown: Sequence[Skipped],
    example: Example,
    bound: float | None,
    folded: Callable[[type], type],
) -> Applying:
    """Fold the wholly frozen layers; `folded` makes the class of a layer from its class before it was frozen.

    `unknown` are the layers of other classes. The folds are restored, with the reason, if outputs or gradients differ
    by more than the bounds.
    """
    kinds = {norm: plain_class(norm.layer) for norm in norms}
    reasons = {norm: why for norm in norms if (why := _why_not_whole(norm)) is not None}
    wanted = [norm for norm in norms if norm not in reasons]
    folds: list[_Fold] = []
    if wanted:
        outputs, gradients = finite_outputs(example.tool, model, example), _gradients(model, example)
        folds = _tried(_find(model, norms, wanted, reasons, example), model, reasons, example, bound)
    if not folds:
        return Applying((), (*_skipped(norms, kinds, reasons), *unknown), made=example.made)
    with all_or_nothing(model) as restore:
        for fold in folds:
            apply_through(fold.pair.map, fold.second)
            set_class(fold.second, folded(kinds[fold.pair.norm]))
        kept = _choose_what_is_kept(model, folds, example)
        moved = difference(outputs, finite_outputs(example.tool, model, example))
        assert moved is not None
        limit, noise = limit_of(model, moved, (), bound, folds, example)
        turned = _rms_difference(gradients, _gradients(model, example))
        gradient_limit = min(_MODEL_FACTOR * (bound or moved.bound), _MAX_LIMIT)
        worst = max(fold.gradient_error for fold in folds)
        why = None
        if not moved.max <= limit:
            why = f"restored: the model's outputs differ by {moved.max:.1e}, over the bound of {limit:.1g}"
        elif not turned <= gradient_limit:
            why = f"restored: the gradients differ by {turned:.1e} (RMS), over the bound of {gradient_limit:.1g}"
        if why is not None:
            restore()
            reasons |= {fold.pair.norm: why for fold in folds}
            folds = []
    pairs = [fold.pair for fold in folds]
    layers = tuple(Applied(p.norm.name, kinds[p.norm].__name__, p.into, *kept[p]) for p in pairs)
    skipped = (*_skipped(norms, kinds, reasons), *unknown)
    return Applying(layers, skipped, moved.max, moved.rms, limit, noise, example.made, worst, turned, gradient_limit)


def _skipped(
    norms: Sequence[Norm], kinds: Mapping[Norm, type[nn.Module]], reasons: Mapping[Norm, str]
) -> list[Skipped]:
    return [Skipped(norm.name, kinds[norm].__name__, reasons[norm]) for norm in norms if norm in reasons]


def _why_not_whole(norm: Norm) -> str | None:
    """Why a layer is not wholly frozen, or of a class whose forward is not known."""
    layer = norm.layer
    cls = original(plain_class(layer))
    if cls not in STOCK and cls not in OURS:
        return f"{describe_subclass(cls)}, which may compute something else"
    if not norm.has_statistics:
        return UNTRACKED
    if type(layer) not in FROZEN:
        return "its statistics are not frozen"
    names = {"gamma": "weight", "beta": "bias"}
    learning = [part for part, name in names.items() if any(p.requires_grad for p in made_of(layer, name))]
    if learning:
        return f"its {' and '.join(learning)} still learn{'s' if len(learning) == 1 else ''}"
    return None


def _find(
    model: nn.Module, norms: Sequence[Norm], wanted: Sequence[Norm], reasons: dict[Norm, str], example: Example
) -> list[_Fold]:
    """The pairs in the model's mode and in eval mode, each with the activation after it; adds to the reasons."""
    modules = [m for m in model.modules() if activation_of(m, (), {}) not in (None, Activation(None))]
    with undisturbed(model):
        traces = {"": RunTrace(model, norms, example.run, modules)}
        if model.training:
            with in_eval(model):
                traces[" in eval mode"] = RunTrace(model, norms, example.run, modules)
    folds = []
    for norm in wanted:
        options = {mode: next(trace.pairs(norm, after=False)) for mode, trace in traces.items()}
        pairs = [option for option in options.values() if isinstance(option, Pair)]
        why = next((f"{option}{mode}" for mode, option in options.items() if isinstance(option, str)), None)
        if why is None and any(pair.map is not pairs[0].map for pair in pairs):
            why = "another map comes before it in eval mode"
        if why is not None:
            reasons[norm] = why
            continue
        links = [link for trace in traces.values() for link in trace.links if link.first is norm.layer]
        after = [link.second for link in links if link.second in modules]
        folds.append(_Fold(pairs[0], after[0] if after else None))
    return folds


def _tried(
    folds: list[_Fold], model: nn.Module, reasons: dict[Norm, str], example: Example, bound: float | None
) -> list[_Fold]:
    """The folds whose output and gradients agree with those of map and norm, on the map's input in the example."""

    def compare(fold: _Fold, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        old, new = (_trial(fold.pair, apart, args, kwargs) for apart in (True, False))
        fold.error = difference(old[:1], new[:1])
        gradients = [difference([a], [b]) for a, b in zip(old[1:], new[1:], strict=True)]
        fold.gradient_error = max((error.max for error in gradients if error is not None), default=0.0)

    with undisturbed(model), ExitStack() as stack:
        for fold in folds:
            hook = fold.pair.map.register_forward_hook(partial(compare, fold), with_kwargs=True)
            stack.callback(hook.remove)
        example.run()
    agreed = []
    for fold in folds:
        why = None
        if fold.error is None:
            why = "its output has no finite values to compare"
        else:
            limit = bound or fold.error.bound
            if not fold.error.max <= limit:
                why = f"its output would differ by {fold.error.max:.1e}, over the bound of {limit:.1g}"
            elif not fold.gradient_error <= _PAIR_FACTOR * limit:
                error, limit = fold.gradient_error, _PAIR_FACTOR * limit
                why = f"its gradients would differ by {error:.1e}, over the bound of {limit:.1g}"
        if why is None:
            agreed.append(fold)
        else:
            reasons[fold.pair.norm] = why
    return agreed


def _trial(pair: Pair, apart: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The output of the map and the norm, apart or folded, and the gradients of the input and of the map's weights."""
    module, norm = pair.map, pair.norm.layer
    values = [value.detach() if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
    with torch.enable_grad():
        inputs = [value.requires_grad_() for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        inputs += [p for p in module.parameters() if p.requires_grad]
        positional, named = values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))
        if apart:
            z = type(module).forward(module, *positional, **named)
            y = F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=pair.norm.eps)
        else:
            y = run_with(module, norm, *positional, **named)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        gradients = torch.autograd.grad(y, inputs, weights)
    return [y.detach(), *gradients]


def _choose_what_is_kept(
    model: nn.Module, folds: Sequence[_Fold], example: Example
) -> dict[Pair, tuple[str | None, str | None]]:
    """Choose what the activation after each norm saves; return its name and that."""
    modules = [fold.module for fold in folds if fold.module is not None]
    elsewhere = _kept_elsewhere(model, modules, example)
    kept: dict[Pair, tuple[str | None, str | None]] = {}
    chosen: dict[nn.Module, tuple[str, str]] = {}
    for fold in folds:
        act = act_of(fold.second)
        if act is not None:
            by_output = can_use_output(Activation(act, vars(fold.second)["negative_slope"]))
            kept[fold.pair] = act, "output" if by_output else "input"
            continue
        module = fold.module
        if module is None:
            kept[fold.pair] = None, None
            continue
        if module not in chosen:
            activation = activation_of(module, (), {})
            assert activation is not None
            what = "output" if can_use_output(activation) else "input"
            if module not in elsewhere and can_use_mask(activation):
                what = "mask"
            chosen[module] = type(module).__name__, what
            if what != "input":
                save_instead(module, what)
        kept[fold.pair] = chosen[module]
    return kept


def _kept_elsewhere(model: nn.Module, modules: Sequence[nn.Module], example: Example) -> set[nn.Module]:
    """The modules whose output other code saves for backward, in every call."""
    saved: list[int] = []
    outputs: list[tuple[nn.Module, Tensor, int]] = []  # keeps the outputs, so that no other tensor gets their memory

    def pack(tensor: Tensor) -> Tensor:
        saved.append(_address(tensor))
        return tensor.detach()

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output.detach(), len(saved)))

    with undisturbed(model), torch.enable_grad(), ExitStack() as stack:
        for module in set(modules):
            stack.callback(module.register_forward_hook(note).remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            example.run()
    once = {module for module, y, position in outputs if _address(y) not in saved[position:]}
    return set(modules) - once


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _gradients(model: nn.Module, example: Example) -> list[Tensor]:
    """The gradients of the parameters that learn, for fixed random gradients of the outputs; empty without any."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with undisturbed(model), torch.enable_grad():
        outputs = [y for y in leaves(example.run()) if y.requires_grad and y.is_floating_point()]
        if not outputs or not parameters:
            return []
        weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
        try:
            found = torch.autograd.grad(outputs, parameters, weights, allow_unused=True)
        except RuntimeError as error:
            raise ValueError(f"{example.tool}: the model does not run backward on the example: {error}") from error
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _rms_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The RMS of the difference over all values that are finite before, divided by their RMS."""
    distance = size = 0.0
    for old, new in zip(before, after, strict=True):
        a, b = old.double(), new.double()
        finite = a.isfinite()
        distance += float((a - b)[finite].square().sum())
        size += float(a[finite].square().sum())
    if size == 0:
        return 0.0 if distance == 0 else math.inf
    return math.sqrt(distance / size)
