"""fold(): batch norms go into the weights of the convolutions and linear maps beside them, and prove it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.records import Record, Skipped
from batchnorm.restoring import all_or_nothing, become, undisturbed
from batchnorm.surgery._folding.pairs import Observed
from batchnorm.surgery._folding.trials import Difference, Pair, difference, place, rounding, try_in_run
from batchnorm.surgery._shared.calling import Example, ForwardFn, leaves
from batchnorm.surgery._shared.layers import Norm, find, plain_class
from batchnorm.words import plural

__all__ = ["Folded", "Folding", "fold"]

# A network that makes more of rounding than the bound allows is held to what rounding makes, up to these limits.
_MORE_THAN_ROUNDING = 4
_MORE_THAN_BOUND = 100
_AT_MOST = 0.1


@dataclass(frozen=True, slots=True)
class Folded:
    """One layer of a `Folding`.

    Attributes:
        name: the layer's name.
        kind: its class.
        into: the name of the convolution or linear layer that took it in.
        before: whether that stands before the layer; otherwise it stands after it.
        max_error: the largest difference of the pair's output, divided by its largest magnitude.
        rms_error: the RMS of that difference, divided by the same magnitude.
    """

    name: str
    kind: str
    into: str
    before: bool
    max_error: float
    rms_error: float


@dataclass(frozen=True, slots=True, repr=False)
class Folding(Record):
    """What `fold` did.

    Attributes:
        layers: one record for each layer that was folded; empty where everything was taken back.
        skipped: the layers that were not folded, each with the reason.
        max_error: the largest difference of the model's outputs on the example, divided by their largest magnitude;
            0 where there was nothing to fold.
        rms_error: the RMS of that difference, divided by the same magnitude; 0 where there was nothing to fold.
        bound: the largest `max_error` that is accepted. Where it is exceeded, everything is taken back.
        rounding: the `max_error` that a change of every pair's output in its last digit makes; None where it did not
            set the bound.
    """

    layers: tuple[Folded, ...]
    skipped: tuple[Skipped, ...]
    max_error: float = 0.0
    rms_error: float = 0.0
    bound: float = math.inf
    rounding: float | None = None

    @property
    def taken_back(self) -> bool:
        """Whether the model is as it was because its outputs moved too far."""
        return self.max_error > self.bound

    _left = "not folded"

    def _head(self) -> list[str]:
        total = len(self.layers) + len(self.skipped)
        if not total:
            return ["no batch norm layers"]
        head = f"{len(self.layers)} of {plural(total, 'batch norm layer')} folded"
        if self.bound < math.inf:
            error = f"outputs differ by {self.max_error:.1e} (RMS {self.rms_error:.1e}) of their largest magnitude"
            noise = "" if self.rounding is None else f"; rounding alone moves them by {self.rounding:.1e}"
            head += f"; {error}, bound {self.bound:.1g}{noise}"
        return [head]

    def _rows(self) -> Iterable[tuple[str, str]]:
        for layer in self.layers:
            where = "before" if layer.before else "after"
            yield f"{layer.kind}  into the map {where} it", f"{layer.name} → {layer.into}"


def fold(
    model: nn.Module,
    example: Any = None,
    forward_fn: ForwardFn | None = None,
    *,
    bound: float | None = None,
    also: Sequence[type[nn.Module]] = (),
) -> Folding:
    """Fold batch norm layers into the convolutions and linear layers beside them, for inference, in place.

    W' = W·scale and b' = b·scale + shift, with scale = gamma/sqrt(running_var + eps), shift = beta - mean·scale.

    In eval mode a batch norm is this linear map per channel. Where a convolution or linear layer (a map) stands right
    before it, or else right after it, that map takes it in: its weight and bias become new parameters, computed in
    float64, of the type, device, memory format and requires_grad of the old ones. The norm becomes torch.nn.Identity; a
    layer of this package with an activation becomes torch.nn's activation, and one that is called with a residual a
    module that still adds it (`Epilogue`). It stays the same object. An optimizer must be
    made anew.

    A pair is folded where it runs once, with nothing between its two layers, and where nothing else reads what the
    first of them gives. A run of the example shows which pairs these are. Every other layer is named in `skipped`,
    with the reason.
    After a norm, a convolution that pads with zeros can only take in a norm without a shift: the border never went
    through the norm.

    Every pair is tried on its own input in the example before it is folded; then the whole model on the example, in
    full float32 precision. What moves its output by more than `bound` is not folded.

    The fold is for inference, as the example calls the model: another path through it, in which a folded map's output
    went elsewhere, would compute something else.

    Args:
        model: in eval mode; changed in place, all of it or, where an error is raised, nothing.
        example: what the model is called with: a tensor, a tuple of its arguments, a mapping of named ones, or
            anything that forward_fn takes. Required.
        forward_fn: forward_fn(model, example) runs the model on the example, and returns what is to stay the same.
        bound: of the largest difference relative to the outputs' largest magnitude, for every pair and the whole. By
            default that of the coarsest type: 1e-12 in float64, 1e-5 in float32, 1e-2 in float16, 6e-2 in bfloat16. A
            network in which rounding alone makes more is then held to four times that, at most a hundred times these
            bounds and 0.1: a deep network with random weights can amplify a change of
            the last digit into the third.
        also: subclasses of torch.nn's batch norms that normalize as these do, which the caller vouches for.

    Returns:
        What each layer was folded into, or why not, and the errors; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module, or the example none of the three; ValueError if the model is
    in training mode, compiled, lazy or on the meta device, does not run on the example, or gives nothing on it that
    could be compared, and if `bound` is not a positive number.
    """
    norms, skipped = find("fold", model, also)
    _check(model, bound)
    given = Example("fold", model, example, forward_fn)
    if not norms:
        return Folding((), tuple(skipped))
    kinds = {norm: plain_class(norm.layer).__name__ for norm in norms}
    rounds = _Rounds(model, norms, given, bound)
    with all_or_nothing(model) as restore:
        before = rounds.outputs()
        while rounds.another():
            pass
        moved = difference(before, rounds.outputs())
        assert moved is not None
        limit, noise = rounds.limit(moved)
        if not moved.max <= limit:
            restore()
            rounds.done.clear()
            why = f"taken back: the model's outputs differ by {moved.max:.1e}, over the bound of {limit:.1g}"
            rounds.reasons = {norm: rounds.reasons.get(norm, why) for norm in norms}
    layers = tuple(
        Folded(pair.norm.name, kinds[pair.norm], pair.into, pair.before, error.max, error.rms)
        for pair, error in rounds.done.items()
    )
    left = (Skipped(norm.name, kinds[norm], why) for norm, why in rounds.reasons.items())
    return Folding(layers, (*left, *skipped), moved.max, moved.rms, limit, noise)


def _check(model: nn.Module, bound: float | None) -> None:
    numeric = isinstance(bound, int | float) and not isinstance(bound, bool)
    if bound is not None and not (numeric and 0 < bound < math.inf):
        raise ValueError(f"fold: the bound must be a positive number, got {bound!r}")
    if model.training:
        raise ValueError("fold: the model is in training mode: call model.eval() first")
    for module in model.modules():
        if isinstance(module, LazyModuleMixin):
            raise ValueError("fold: the model has lazy layers: run a batch through it first")
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise ValueError("fold: the model is compiled: fold it first, then compile it")
        if any(tensor.is_meta for tensor in (*module.parameters(False), *module.buffers(False))):
            raise ValueError("fold: the model is on the meta device, without values: load the weights first")


class _Rounds:
    """The folds of a model: those `done` with what they moved, and the reason of every norm that is left."""

    def __init__(self, model: nn.Module, norms: Sequence[Norm], example: Example, bound: float | None) -> None:
        self.model, self.norms, self.example, self.bound = model, norms, example, bound
        self.done: dict[Pair, Difference] = {}
        self.reasons: dict[Norm, str] = {}
        self._refused: dict[tuple[nn.Module, nn.Module], str] = {}

    def outputs(self) -> list[Tensor]:
        """On the example. Raises ValueError where there is nothing to compare in them."""
        with undisturbed(self.model):
            found = list(leaves(self.example.run()))
        if difference(found, found) is None:
            raise ValueError(
                "fold: the model returns no finite floating-point number on the example, so nothing can be compared: "
                "give another example, or see bn.check for what is not finite"
            )
        return found

    def limit(self, moved: Difference) -> tuple[float, float | None]:
        """What bounds the change of the outputs, and how far rounding alone moves them, where that decides."""
        limit = self.bound or max(moved.bound, *(each.bound for each in self.done.values()), 0.0)
        if self.bound is not None or moved.max <= limit:
            return limit, None
        with undisturbed(self.model):
            noise = rounding(list(self.done), lambda: leaves(self.example.run()))
        return max(limit, min(_MORE_THAN_ROUNDING * noise, _MORE_THAN_BOUND * limit, _AT_MOST)), noise

    def another(self) -> bool:
        """Fold what can be folded now: whether there was a pair to try."""
        folded = {pair.norm for pair in self.done}
        left = [norm for norm in self.norms if norm not in folded]
        if not left:
            return False
        with undisturbed(self.model):
            pairs = self._pairs(left, Observed(self.model, self.norms, self.example.run))
            if pairs:
                try_in_run(pairs, self.example.run)
        for pair in pairs:
            moved = pair.found
            if moved is not None and moved.max <= (self.bound or moved.bound):
                pair.weights.put(pair.map)
                become(pair.norm.layer, type(pair.remainder), vars(pair.remainder))
                self.done[pair] = moved
                self.reasons.pop(pair.norm, None)
                continue
            why = "it gives no finite output to compare"
            if moved is not None:
                bound = self.bound or moved.bound
                why = f"its output would differ by {moved.max:.1e}, over the bound of {bound:.1g}"
            self._refused[pair.norm.layer, pair.map] = f"into {place(pair.map, pair.before)}: {why}"
        return bool(pairs)

    def _pairs(self, norms: Sequence[Norm], observed: Observed) -> list[Pair]:
        """For every norm the first pair that can be folded, as long as no two share a map."""
        pairs: list[Pair] = []
        for norm in norms:
            reasons = []
            for option in observed.pairs(norm):
                if isinstance(option, Pair) and (norm.layer, option.map) not in self._refused:
                    if all(option.map is not other.map for other in pairs):
                        pairs.append(option)
                    break
                reasons.append(option if isinstance(option, str) else self._refused[norm.layer, option.map])
            self.reasons[norm] = reasons[0] if reasons else "its map takes in another norm"
        return pairs
