"""fold(): fold batch norms into the weights of adjacent convolutions and linear layers, and check the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from batchnorm.records import Skipped
from batchnorm.restoring import all_or_nothing, set_class, undisturbed
from batchnorm.surgery._folding.leftovers import Affine, Leftover, Replacement, replacement, try_replacements
from batchnorm.surgery._folding.pairs import RunTrace
from batchnorm.surgery._folding.trials import (
    Compared,
    Difference,
    Pair,
    check_model,
    describe_map,
    difference,
    finite_outputs,
    limit_of,
    try_in_run,
)
from batchnorm.surgery._shared.calling import Example, ForwardFn
from batchnorm.surgery._shared.layers import find, plain_class
from batchnorm.surgery._shared.norm import Norm
from batchnorm.words import plural

__all__ = ["Affine", "Folded", "Folding", "fold"]

_WORDS = {"affine": "a factor and a shift", "depthwise": "a depthwise convolution"}


@dataclass(frozen=True, slots=True)
class Folded:
    """One layer of a `Folding`.

    Attributes:
        name: the layer's name.
        kind: its class.
        into: the name of the convolution or linear layer that it was folded into; its own name if it `became` one.
        before: whether that layer comes before it, or after it.
        max_error: the largest difference of the pair's output, divided by its largest magnitude.
        rms_error: the RMS of that difference, divided by the same magnitude.
        became: "affine" or "depthwise" if it was replaced by a module of that kind; None if it was folded.
    """

    name: str
    kind: str
    into: str
    before: bool
    max_error: float
    rms_error: float
    became: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Folding(Compared):
    """What `fold` did.

    Attributes:
        layers: one record for each layer that was folded; empty if the model was restored.
        skipped: the layers that were not folded, each with the reason.
        max_error: the largest difference of the model's outputs on the example, divided by their largest magnitude;
            0 if nothing was folded.
        rms_error: the RMS of that difference, divided by the same magnitude; 0 if nothing was folded.
        bound: the largest accepted `max_error`; the model is restored if it is exceeded.
        rounding: the `max_error` from changes of the last digit in every pair's output; None if the bound does not
            depend on it.
        made: the sizes of the random input on which the model was run, if no example was given.
    """

    layers: tuple[Folded, ...]

    _left = "not folded"

    def _head(self) -> list[str]:
        total = len(self.layers) + len(self.skipped)
        if not total:
            return ["no batch norm layers"]
        replaced = sum(layer.became is not None for layer in self.layers)
        head = f"{len(self.layers) - replaced} of {plural(total, 'batch norm layer')} folded"
        return [head + (f", {replaced} replaced" if replaced else "") + self._outcome()]

    def _rows(self) -> Iterable[tuple[str, str]]:
        for layer in self.layers:
            if layer.became is not None:
                yield f"{layer.kind}  replaced by {_WORDS[layer.became]}", layer.name
                continue
            where = "before" if layer.before else "after"
            yield f"{layer.kind}  into the map {where} it", f"{layer.name} → {layer.into}"


def fold(
    model: nn.Module,
    example: Any = None,
    forward_fn: ForwardFn | None = None,
    *,
    bound: float | None = None,
    also: Sequence[type[nn.Module]] = (),
    leftover: Leftover | None = None,
) -> Folding:
    """Fold batch norm layers into the convolutions and linear layers beside them, for inference, in place.

    W' = W·scale and b' = b·scale + shift, with scale = gamma/sqrt(running_var + eps), shift = beta - mean·scale.

    In eval mode a batch norm is this linear map per channel. It is folded into the convolution or linear layer (the
    map) right before it, or else right after it, whose weight and bias become new parameters: computed in float64, with
    the type, device, memory format and requires_grad of the old ones. The norm, the same object, becomes
    torch.nn.Identity, or its fused activation; if called with a residual, a module that adds it (`Epilogue`). Create
    the optimizer afterwards.

    A pair is folded if it runs once, with nothing between its two layers, and nothing else reads the intermediate
    result. A run of the example finds these pairs. All other layers are in `skipped`, with the reason. A norm with a
    shift cannot be folded into a convolution after it that pads with zeros: the border has not passed the norm.

    Every pair is tried on its input in the example, then the whole model, in full float32 precision. Pairs whose output
    changes by more than `bound` are not folded.

    The result is for inference as in the example: another path through the model, in which a folded map's output goes
    elsewhere, would compute something else.

    Args:
        model: in eval mode; changed in place, nothing if an error is raised.
        example: a tensor, a tuple of the model's arguments, a mapping of named ones, or anything that forward_fn
            accepts. Without one, a random input is made that fits the first convolution or linear layer. A
            model that takes anything else needs an example.
        forward_fn: forward_fn(model, example) runs the model on the example and returns the outputs to compare.
        bound: of the largest difference relative to the outputs' largest magnitude, for every pair and the model. By
            default that of the coarsest type: 1e-12 in float64, 1e-5 in float32, 1e-2 in float16, 6e-2 in bfloat16. If
            rounding alone exceeds it, the bound is four times the effect of rounding, at most a hundred times these
            bounds and 0.1: a deep network with random weights can amplify the last digit into the third.
        also: subclasses of torch.nn's batch norms that normalize as these do, which the caller vouches for.
        leftover: what becomes of a norm that is folded nowhere, for exporters that have no batch norm: "affine", a
            factor and a shift for each channel (`Affine`), or "depthwise", a convolution of size 1 with a group for
            each channel. By default it stays.

    Returns:
        What each layer was folded into, or why not, and the errors; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module, the example is none of the three, or none is
    given and the model runs on no random input; ValueError if `leftover` is neither of the two, the model is
    in training mode, compiled, lazy or on the meta device, does not run on the example, or returns nothing that can be
    compared, and if `bound` is not a positive number.
    """
    if leftover not in (None, *_WORDS):
        raise ValueError(f'fold: leftover must be None, "affine" or "depthwise", got {leftover!r}')
    norms, skipped = find("fold", model, also)
    check_model("fold", model, bound)
    checked = Example("fold", model, example, forward_fn)
    if not norms:
        return Folding((), tuple(skipped))
    kinds = {norm: plain_class(norm.layer).__name__ for norm in norms}
    rounds = _Rounds(model, norms, checked, bound)
    with all_or_nothing(model) as restore:
        before = rounds.outputs()
        while rounds.fold_next():
            pass
        if leftover is not None:
            rounds.replace(leftover)
        moved = difference(before, rounds.outputs())
        assert moved is not None
        limit, noise = rounds.limit(moved)
        if not moved.max <= limit:
            restore()
            rounds.done.clear()
            rounds.replaced.clear()
            why = f"restored: the model's outputs differ by {moved.max:.1e}, over the bound of {limit:.1g}"
            rounds.reasons = {norm: rounds.reasons.get(norm, why) for norm in norms}
    layers = tuple(
        Folded(pair.norm.name, kinds[pair.norm], pair.into, pair.before, error.max, error.rms)
        for pair, error in rounds.done.items()
    )
    layers += tuple(
        Folded(one.norm.name, kinds[one.norm], one.norm.name, False, error.max, error.rms, leftover)
        for one, error in rounds.replaced.items()
    )
    not_folded = (Skipped(norm.name, kinds[norm], why) for norm, why in rounds.reasons.items())
    return Folding(layers, (*not_folded, *skipped), moved.max, moved.rms, limit, noise, checked.made)


class _Rounds:
    """The folded pairs (`done`) and the `replaced` norms with their differences, and the reasons of all other norms."""

    def __init__(self, model: nn.Module, norms: Sequence[Norm], example: Example, bound: float | None) -> None:
        self.model, self.norms, self.example, self.bound = model, norms, example, bound
        self.done: dict[Pair, Difference] = {}
        self.replaced: dict[Replacement, Difference] = {}
        self.reasons: dict[Norm, str] = {}
        self._refused: dict[tuple[nn.Module, nn.Module], str] = {}

    def outputs(self) -> list[Tensor]:
        """The outputs on the example. Raises ValueError if they cannot be compared."""
        return finite_outputs("fold", self.model, self.example)

    def limit(self, moved: Difference) -> tuple[float, float | None]:
        """The limit of the change of the outputs, and the effect of rounding if the limit depends on it."""
        bounds = [error.bound for error in (*self.done.values(), *self.replaced.values())]
        return limit_of(self.model, moved, bounds, self.bound, (*self.done, *self.replaced), self.example)

    def fold_next(self) -> bool:
        """Try the pairs that can be folded now; return whether there were any."""
        folded = {pair.norm for pair in self.done}
        remaining = [norm for norm in self.norms if norm not in folded]
        if not remaining:
            return False
        with undisturbed(self.model):
            pairs = self._pairs(remaining, RunTrace(self.model, self.norms, self.example.run))
            if pairs:
                try_in_run(pairs, self.example.run)
        for pair in pairs:
            moved = pair.difference
            if moved is not None and moved.max <= (self.bound or moved.bound):
                pair.weights.put(pair.map)
                set_class(pair.norm.layer, type(pair.remainder), vars(pair.remainder))
                self.done[pair] = moved
                self.reasons.pop(pair.norm, None)
                continue
            why = "its output has no finite values to compare"
            if moved is not None:
                bound = self.bound or moved.bound
                why = f"its output would differ by {moved.max:.1e}, over the bound of {bound:.1g}"
            self._refused[pair.norm.layer, pair.map] = f"into {describe_map(pair.map, pair.before)}: {why}"
        return bool(pairs)

    def replace(self, how: Leftover) -> None:
        """Replace the norms that were not folded, by modules with the same output on the example."""
        with undisturbed(self.model):
            trace = RunTrace(self.model, self.norms, self.example.run)
            options = {norm: replacement(norm, how, trace) for norm in self.reasons}
            ready = [option for option in options.values() if isinstance(option, Replacement)]
            try_replacements(ready, self.example.run)
        for norm, option in options.items():
            if isinstance(option, str):
                self.reasons[norm] = option
            elif option.difference is None:
                self.reasons[norm] = "its output has no finite values to compare"
            elif not option.difference.max <= (self.bound or option.difference.bound):
                self.reasons[norm] = f"its output would differ by {option.difference.max:.1e} as {_WORDS[how]}"
            else:
                set_class(norm.layer, type(option.module), vars(option.module))
                self.replaced[option] = option.difference
        self.reasons = {norm: why for norm, why in self.reasons.items() if options[norm] not in self.replaced}

    def _pairs(self, norms: Sequence[Norm], trace: RunTrace) -> list[Pair]:
        """For every norm the first pair that can be folded; no two pairs share a map."""
        pairs: list[Pair] = []
        for norm in norms:
            reasons = []
            for option in trace.pairs(norm):
                if isinstance(option, Pair) and (norm.layer, option.map) not in self._refused:
                    if all(option.map is not other.map for other in pairs):
                        pairs.append(option)
                    break
                reasons.append(option if isinstance(option, str) else self._refused[norm.layer, option.map])
            self.reasons[norm] = reasons[0] if reasons else "its map is folded with another norm"
        return pairs
