"""diff(): the batch norm layers of two models or files, and only what differs between them, the worst first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from batchnorm.checks import sources
from batchnorm.checks.alignment import Pair, align, fingerprint
from batchnorm.checks.differences import ASPECTS, IDENTITY, Affine, Change, change, compare
from batchnorm.checks.findings import Array, LayerData
from batchnorm.checks.readers import CheckpointError
from batchnorm.checks.sources import Network, SourceError
from batchnorm.records import Record, format_names
from batchnorm.words import listing, plural, shortened

__all__ = ["Diff", "diff"]

NAME = 60
NEAR = 1e-4
"""The largest difference of a folded layer's shift to the bias below, relative to its size: folding rounds."""


@dataclass(frozen=True, repr=False)
class Diff(Record):
    """The result of `diff`: what differs, the worst first; `print` it.

    Attributes:
        a: the first network.
        b: the second network.
        pairs: every layer of the first with that of the second, and those that only one has (None for the other).
        changes: the differences, the worst first.
        notes: what was not compared.
    """

    page_kind: ClassVar[str] = "diff"

    a: Network
    b: Network
    pairs: tuple[Pair, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return not self.changes

    @property
    def headline(self) -> str:
        """How many layers differ, and the worst difference, in one line."""
        if not self.pairs:
            return "Neither has a batch norm layer."
        layers = plural(len(self.pairs), "batch norm layer")
        if self.equal:
            return f"{layers}: no difference."
        worst, differing = self.changes[0], len({(one.layer, one.other) for one in self.changes})
        where = shortened(format_names(worst.layer), NAME)
        verb = "differs" if differing == 1 else "differ"
        return f"{differing:,} of {layers} {verb}. The worst difference is {worst.aspect} of {where}: {_effect(worst)}."

    def as_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON, of the layers only those that differ; an infinite effect is null there."""
        about = {
            name: {"source": one.source, "format": one.format, "bytes": one.size, "layers": len(one.layers)}
            for name, one in (("a", self.a), ("b", self.b))
        }
        return about | {
            "equal": self.equal,
            "headline": self.headline,
            "notes": list(self.notes),
            "changes": [one.as_dict() for one in self.changes],
        }

    def __str__(self) -> str:
        return "\n".join([self.headline, *self.notes, *change_lines(self.changes)])


def names(pair: Pair) -> tuple[str, str]:
    """The names of a pair as a `Change` has them: that of the layer, and that in the second network."""
    first, second = pair
    if first is None:
        return ("" if second is None else second.name), ""
    return first.name, "" if second is None else second.name


def size(effect: float) -> str:
    """An effect in words."""
    if not math.isfinite(effect):
        return "by batch" if math.isnan(effect) else "infinite"
    return f"{effect:.3g} times" if effect >= 10 else f"{100 * effect:.3g}%"


def _effect(one: Change) -> str:
    """The effect of a difference as the end of a sentence."""
    if math.isnan(one.effect):
        return "the output depends on the batch"
    if math.isinf(one.effect):
        return "it cannot be loaded" if one.aspect == "shape" else "the output is not finite"
    return f"the output changes by {size(one.effect)} of its deviation" if one.effect else "inference is the same"


def grouped(changes: Sequence[Change]) -> Iterator[tuple[Change, list[str]]]:
    """Neighbors with equal words as one: the worst of them and the names of the layers."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for one in changes:
        groups.setdefault((one.aspect, one.text), []).append(one)
    for same in groups.values():
        yield same[0], [shortened(format_names(one.layer), NAME) for one in same]


def change_lines(changes: Sequence[Change]) -> Iterator[str]:
    """A line for each difference, layers with equal words in one, and what each aspect means."""
    rows = [(size(worst.effect), worst.aspect, layers, worst.text) for worst, layers in grouped(changes)]
    width = max((len(effect) for effect, *_ in rows), default=0)
    for effect, aspect, layers, text in rows:
        where = ", ".join(layers) if len(layers) < 4 else f"{layers[0]}, {layers[1]} … {layers[-1]} ({len(layers)})"
        yield f"{effect:>{width}}  {aspect}  {where}: {text}"
    for aspect in ASPECTS:
        if any(one.aspect == aspect for one in changes):
            yield f"{aspect}: {ASPECTS[aspect]}"


def diff(a: object, b: object) -> Diff:
    """Compare the batch norm layers of two models or files: only what differs, by its effect on the output.

    Layers are paired by name, those without a partner by equal values, then by shape and order. Aspects: eps,
    momentum, mean, variance, biased variance, gamma, beta, count, frozen, mode, missing, permuted,
    renamed, half precision, fused, shape.

    The effect on a layer's output in inference, y = a·x + b with a = gamma/sqrt(var + eps) and b = beta - a·mean, is
    the root mean square over its units of |Δa|·std + |Δb + Δa·mean|, relative to that of gamma, with mean and std of
    A's running statistics: 1 is as large as the output itself. Layers of different frameworks may have different names;
    a format that does not store momentum, mode or the count is not compared in them. If only one stores eps, it is
    compared with the other framework's default.

    Args:
        a: a model, a state dict or the path of a checkpoint, as for `check`; or the result of `check`, for a model
            before a change: before = check(model).
        b: likewise.

    Returns:
        The differences, the worst first; `print` it, or use `.as_dict()`. Nothing is changed.

    Raises CheckpointError if a file cannot be read, and SourceError, a ValueError, if there is nothing to compare.
    """
    return compared(_network(a), _network(b))


def _network(given: object) -> Network:
    """The network of a model, a state dict, a path, or the result of `check`."""
    network = getattr(given, "network", None)
    return network if isinstance(network, Network) else sources.of(given)


def compared(a: Network, b: Network) -> Diff:
    """Compare two networks."""
    first, second, notes = _same_copies(a, b)
    pairs = align(first, second)
    of_values = {key: layer.name for layer in first if (key := fingerprint(layer))}
    changes: list[Change] = []
    for one, other in pairs:
        if one is None or other is None:
            changes.append(_alone(one, other, a, b))
        else:
            changes += _between(one, other, of_values)
    return Diff(a, b, tuple(pairs), tuple(sorted(changes, key=lambda one: one.rank)), notes)


def _between(a: LayerData, b: LayerData, of_values: Mapping[bytes, str]) -> Iterator[Change]:
    """The differences of a pair; `of_values` has the names of the first network's layers by their values."""
    if a.name != b.name and a.settings["framework"] == b.settings["framework"]:
        same_end = b.name.endswith(f".{a.name}") or a.name.endswith(f".{b.name}")
        shorter, longer, which = (a.name, b.name, "B") if len(a.name) < len(b.name) else (b.name, a.name, "A")
        prefix = f"has the prefix {longer.removesuffix(shorter)!r} in {which}"
        yield change("renamed", a, b, prefix if same_end else f"is {format_names(b.name)} in B", 0.0)
    found = list(compare(a, b))
    source = of_values.get(fingerprint(b) or b"") if fingerprint(a) != fingerprint(b) else None
    if a.units == b.units and source is not None:
        affine = Affine.of(a)
        values = replace(Affine.of(b), eps=affine.eps)
        yield change("permuted", a, b, f"has the values of {source} in B", affine.effect(values.line))
        found = [one for one in found if one.aspect not in _OF_VALUES]
    yield from found


_OF_VALUES = {"mean", "variance", "biased variance", "gamma", "beta", "half precision", "permuted"}


def _alone(a: LayerData | None, b: LayerData | None, of_a: Network, of_b: Network) -> Change:
    """The change of a layer that one network lacks: it may be in the weights of its neighbor."""
    layer, lacking, having, which = (a, of_b, of_a, "B") if a is not None else (b, of_a, of_b, "A")
    assert layer is not None
    bias = _folded_into(layer, having, lacking)
    if bias:
        return change("fused", layer, None, f"folded in {which}: its shift is in {bias}", 0.0)
    return change("missing", layer, None, f"missing in {which}", Affine.of(layer).effect(IDENTITY))


def _folded_into(layer: LayerData, having: Network, lacking: Network) -> str:
    """The name of the bias that has the shift of a layer, b = beta - a·mean and with a bias below a·bias more."""
    slope, shift = Affine.of(layer).line
    below = layer["below"][-1]
    wanted = shift if np.isnan(below).all() else shift + slope * below
    if np.ptp(wanted) > 0:
        near = NEAR * float(np.sqrt(np.mean(wanted**2)))
        for name, tensor in lacking.vectors.items():
            values = _values(tensor) if tensor.shape == wanted.shape else None
            if values is not None and np.allclose(values, wanted, NEAR, near):
                return name
    expected = f"{layer.settings.get('producer') or ''}.bias".lstrip(".")
    new = expected in lacking.vectors and expected not in having.vectors
    return expected if new and layer.settings.get("producer") else ""


def _values(tensor: Any) -> Array | None:
    try:
        return np.asarray(tensor.values(), np.float64)
    except (CheckpointError, SourceError):  # not read: too many, or no numbers
        return None


def _same_copies(a: Network, b: Network) -> tuple[list[LayerData], list[LayerData], tuple[str, ...]]:
    """The layers of both, and a note; the first copy of a model's layers where only one network has several copies."""
    sides, notes = [list(a.layers), list(b.layers)], []
    copies = [list(dict.fromkeys(str(layer.settings.get("copy", "")) for layer in side)) for side in sides]
    if not all(copies) or (len(copies[0]) > 1) == (len(copies[1]) > 1):
        return sides[0], sides[1], ()
    for at, (first, *others) in enumerate(copies):
        if others:
            layers = [layer for layer in sides[at] if layer.settings.get("copy") == first]
            sides[at] = [replace(layer, name=layer.name.removeprefix(f"{first}: ")) for layer in layers]
            left = listing(shortened(other) for other in others)
            notes.append(f"{'AB'[at]} has {len(others) + 1:,} copies of the model: {first} is compared, {left} not.")
    return sides[0], sides[1], tuple(notes)
