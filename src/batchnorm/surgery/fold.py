"""fold(): batch norms go into the weights of the convolutions and linear maps beside them, and prove it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.records import Record
from batchnorm.surgery.conversion import some
from batchnorm.surgery.example import Example
from batchnorm.surgery.fold_rounds import Rounds
from batchnorm.surgery.norms import Skipped, find
from batchnorm.words import plural

__all__ = ["Folded", "Folding", "fold"]


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
            None without an example.
        rms_error: the RMS of that difference, divided by the same magnitude; None without an example.
        bound: the largest `max_error` that is accepted. Where it is exceeded, everything is taken back.
        rounding: the `max_error` that a change of every pair's output in its last digit makes; None where it did not
            set the bound.
    """

    layers: tuple[Folded, ...]
    skipped: tuple[Skipped, ...]
    max_error: float | None = None
    rms_error: float | None = None
    bound: float | None = None
    rounding: float | None = None

    @property
    def taken_back(self) -> bool:
        """Whether the model is as it was because its outputs moved too far."""
        return self.max_error is not None and self.bound is not None and self.max_error > self.bound

    def __str__(self) -> str:
        total = len(self.layers) + len(self.skipped)
        if not total:
            return "no batch norm layers"
        head = f"{len(self.layers)} of {plural(total, 'batch norm layer')} folded"
        if self.max_error is not None:
            error = f"outputs differ by {self.max_error:.1e} (RMS {self.rms_error:.1e}) of their largest magnitude"
            noise = "" if self.rounding is None else f"; rounding alone moves them by {self.rounding:.1e}"
            head += f"; {error}, bound {self.bound:.1g}{noise}"
        groups: dict[str, list[str]] = {}
        for layer in self.layers:
            row = f"{layer.kind}  into the map {'before' if layer.before else 'after'} it"
            groups.setdefault(row, []).append(f"{layer.name} → {layer.into}")
        for skipped in self.skipped:
            groups.setdefault(f"{skipped.kind}  not folded ({skipped.why})", []).append(skipped.name or "(the model)")
        return "\n".join([head, *(f"{len(names):4}  {row}: {some(names)}" for row, names in groups.items())])


def fold(
    model: nn.Module,
    example: Any = None,
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
    module that still adds it (`batchnorm.surgery.epilogue.Epilogue`). It stays the same object. An optimizer must be
    made anew.

    A pair is folded where it runs once, with nothing between its two layers, and where nothing else reads what the
    first of them gives. A run of the example shows which pairs these are. Without an example they are found in the
    model's torch.fx graph, with optional arguments left out. Every other layer is named in `skipped`, with the reason.
    After a norm, a convolution that pads with zeros can only take in a norm without a shift: the border never went
    through the norm.

    Every pair is tried before it is folded, on its own input in the example, or on noise without one; then the whole
    model on the example, in full float32 precision. What moves its output by more than `bound` is not folded.

    The fold is for inference, as the example calls the model: another path through it, in which a folded map's output
    went elsewhere, would compute something else.

    Args:
        model: in eval mode; changed in place, all of it or, where an error is raised, nothing.
        example: a tensor, a tuple of the model's arguments, or a dict of named ones. Linear maps need one, since only
            on 2-d input are their units the channels of the norm.
        bound: of the largest difference relative to the outputs' largest magnitude, for every pair and the whole. By
            default that of the coarsest type: 1e-12 in float64, 1e-5 in float32, 1e-2 in float16, 6e-2 in bfloat16. A
            network in which rounding alone makes more is then held to four times that, at most a hundred times these
            bounds and 0.1: a deep network with random weights can amplify a change of
            the last digit into the third.
        also: subclasses of torch.nn's batch norms that normalize as these do, which the caller vouches for.

    Returns:
        What each layer was folded into, or why not, and the errors; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module, or the example none of the three; ValueError if the model is
    in training mode, compiled or lazy, does not run on the example, gives nothing on it that could be compared, or
    cannot be traced without one, and if `bound` is not a positive number.
    """
    found = find("fold", model, also)
    _check(model, bound)
    rounds = Rounds(model, found.norms, None if example is None else Example.of("fold", example), bound)
    try:
        rounds.all()
    except BaseException:
        rounds.take_back()
        raise
    layers = tuple(
        Folded(pair.norm.name, rounds.kinds[pair.norm], pair.into, pair.before, moved.max, moved.rms)
        for pair, moved in rounds.done
    )
    skipped = (Skipped(norm.name, rounds.kinds[norm], why) for norm, why in rounds.reasons.items())
    everything = (*skipped, *found.skipped)
    if rounds.moved is None:
        return Folding(layers, everything, bound=bound)
    return Folding(layers, everything, rounds.moved.max, rounds.moved.rms, rounds.limit, rounds.rounding)


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
