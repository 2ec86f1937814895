"""What differs between two layers, and by how much the output changes with it.

In inference a layer computes y = a·x + b, with a = gamma/sqrt(var + eps) and b = beta - a·mean. A difference changes a
by Δa and b by Δb. For inputs with the first layer's statistics, x = mean + std·z, the output of a unit changes by
|Δa|·std + |Δb + Δa·mean|, the changes of its deviation and of its mean. The effect on a layer is the root mean square
of this over its units, relative to that of gamma, which is the deviation of the output: 1 is as large as the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchnorm.checks.alignment import INITIAL, vector
from batchnorm.checks.findings import Array, LayerData, Mask
from batchnorm.words import plural

CLOSE = 2.0**-21
"""The relative difference of equal values: formats and their exporters round in float32, some of them twice."""
TINY = 1e-30
"""The absolute one: denormal numbers are flushed to 0 by some libraries."""
ALIKE = 1e-5
"""The relative spread of a ratio that is the same in every unit."""
WORDS = {"gamma": "gamma", "beta": "beta", "running_mean": "mean", "running_var": "variance"}
"""The aspects of vectors that differ in value, by role."""

ASPECTS: Mapping[str, str] = {
    "shape": "The layers have different numbers of units: one state cannot be loaded into the other network.",
    "missing": "One network lacks the layer, or a tensor of it: without them a layer has its initial values.",
    "permuted": "The units or layers are in another order: the layers around them must be, too.",
    "variance": "The running variances differ.",
    "biased variance": "One network has the variance divided by m, the other divided by m - 1, which PyTorch stores.",
    "mean": "The running means differ.",
    "gamma": "The scales differ.",
    "beta": "The shifts differ.",
    "eps": "The constant that is added to the variance differs, or one format does not store it.",
    "half precision": "The numbers of one network are those of the other, rounded to 16 bits.",
    "mode": "In training mode a layer normalizes by the batch: its output depends on what else is in the batch.",
    "fused": "One network has the layer in the weights of its neighbor: the outputs are equal if the weights are.",
    "renamed": "The layers have other names: a state loads into the other network only after renaming.",
    "frozen": "One network does not train the layer. Inference is the same.",
    "momentum": "The running statistics follow new batches at another rate. Inference is the same.",
    "count": "The numbers of counted batches differ. Only momentum=None uses them, in training.",
}
"""The aspects in which layers differ, and what a difference means. Of equal effects, the first aspect comes first."""


@dataclass(frozen=True)
class Change:
    """One difference of a layer between two networks.

    Attributes:
        aspect: in which the layers differ, one of `ASPECTS`.
        layer: the layer's name in the first network, or in the second if only that has it.
        other: its name in the second network; empty if it lacks the layer.
        text: the difference in words, with the values of both.
        effect: how much the output changes in inference, relative to its deviation; infinite if it is not finite or
            the layer cannot be loaded, and NaN if it depends on the batch.
        units: the units concerned, from 0; empty for the whole layer.
    """

    aspect: str
    layer: str
    other: str
    text: str
    effect: float
    units: tuple[int, ...] = ()

    @property
    def rank(self) -> tuple[float, int]:
        """The key that sorts the worst first. An effect that depends on the batch counts as 1, the output itself."""
        return -(1.0 if math.isnan(self.effect) else self.effect), [*ASPECTS].index(self.aspect)

    def as_dict(self) -> dict[str, Any]:
        """All fields as a dict for JSON; an infinite or unknown effect is null there."""
        fields = {name: getattr(self, name) for name in ("aspect", "layer", "other", "text", "effect")}
        return fields | {"units": list(self.units), "meaning": ASPECTS[self.aspect]}


@dataclass(frozen=True)
class Affine:
    """What a layer computes in inference, by unit, with the statistics of its input."""

    vectors: dict[str, Array]
    eps: float

    @classmethod
    def of(cls, layer: LayerData) -> Affine:
        return cls({role: vector(layer, role) for role in INITIAL}, float(layer.settings.get("eps", 1e-5)))

    @property
    def line(self) -> tuple[Array, Array]:
        """a and b of y = a·x + b."""
        with np.errstate(all="ignore"):
            slope = self.vectors["gamma"] / np.sqrt(self.vectors["running_var"] + self.eps)
            return slope, self.vectors["beta"] - slope * self.vectors["running_mean"]

    def changes(self, line: tuple[Array, Array]) -> Array:
        """By unit, how much another `line` changes the output, relative to the deviation of the layer's output."""
        slope, shift = self.line
        gamma, mean, var = (self.vectors[role] for role in ("gamma", "running_mean", "running_var"))
        with np.errstate(all="ignore"):
            by = line[0] - slope
            moved = np.abs(by) * np.sqrt(np.maximum(var, 0)) + np.abs(line[1] - shift + by * mean)
            size = float(np.sqrt(np.mean(gamma**2))) if gamma.size else 1.0
        known = np.isfinite(slope) & np.isfinite(shift)
        moved = np.where(known, np.where(np.isnan(moved), np.inf, moved), 0.0)
        return np.asarray(moved / (size if 0 < size < math.inf else 1.0))

    def effect(self, line: tuple[Array, Array]) -> float:
        """The root mean square of `changes` over the units."""
        changes = self.changes(line)
        return float(np.sqrt(np.mean(changes**2))) if changes.size else 0.0


def unit_effects(a: LayerData, b: LayerData) -> Array:
    """By unit, how much all differences of two layers of one shape change the output."""
    affine, other = Affine.of(a), Affine.of(b)
    stores_eps = a.settings.get("eps_known") or b.settings.get("eps_known")
    return affine.changes((other if stores_eps else replace(other, eps=affine.eps)).line)


IDENTITY = (np.ones(1), np.zeros(1))
"""The line of a layer that is not there."""


def compare(a: LayerData, b: LayerData) -> Iterator[Change]:
    """The differences of two layers of one shape or of two, in no order."""
    if a.units != b.units:
        yield change("shape", a, b, f"{plural(a.units, 'unit')} in A, {b.units:,} in B", math.inf)
        return
    yield from _vectors(a, b)
    yield from _settings(a, b)


def change(
    aspect: str, a: LayerData, b: LayerData | None, text: str, effect: float, units: Mask | None = None
) -> Change:
    """A difference of a layer; `units` is a mask of those concerned."""
    concerned = () if units is None or units.all() else tuple(np.flatnonzero(units).tolist())
    return Change(aspect, a.name, "" if b is None else b.name, text, effect, concerned)


def _close(a: Array, b: Array) -> Mask:
    return np.isclose(a, b, CLOSE, TINY, equal_nan=True)


def _vectors(a: LayerData, b: LayerData) -> Iterator[Change]:
    """The differences of gamma, beta and the statistics: each role is in one of them."""
    affine, values = Affine.of(a), {role: (vector(a, role), vector(b, role)) for role in INITIAL}

    def made(aspect: str, roles: list[str], text: str, units: Mask | None = None) -> Change:
        changed = replace(affine, vectors=affine.vectors | {role: values[role][1] for role in roles})
        return change(aspect, a, b, text, affine.effect(changed.line), units)

    unknown = {role for layer in (a, b) for role in str(layer.settings.get("unknown", "")).split(", ")}
    roles = [role for role in INITIAL if role not in unknown]
    if a.settings["framework"] == b.settings["framework"]:  # other formats write a gamma of 1 and a beta of 0
        for layer, which in ((a, "A"), (b, "B")):
            has = [set(one.settings["roles"]) for one in (a, b)]
            lost = [role for role in roles if role not in layer.settings["roles"] and role in has[0] | has[1]]
            if lost:
                initial = ", ".join(f"{role} is {INITIAL[role]:g}" for role in lost)
                yield made("missing", lost, f"{', '.join(lost)} missing in {which}: without, {initial}")
                roles = [role for role in roles if role not in lost]
    roles = [role for role in roles if not _close(*values[role]).all()]

    for aspect, is_so, words in PATTERNS:
        found = {role: how for role in roles if (how := is_so(*values[role]))}
        for how in dict.fromkeys(found.values()):
            named = [role for role in found if found[role] == how]
            yield made(aspect, named, words.format(roles=", ".join(named), how=how))
        roles = [role for role in roles if role not in found]
    if "running_var" in roles and (text := _biased(*values["running_var"])):
        yield made("biased variance", ["running_var"], text)
        roles.remove("running_var")
    for role in roles:
        differs = ~_close(*values[role])
        yield made(WORDS[role], [role], _differing(role, *values[role], differs), differs)


def _rounded(a: Array, b: Array) -> str:
    """Which network has the values of the other rounded to 16 bits; empty if neither does."""
    for name, rounding in (("float16", _float16), ("bfloat16", _bfloat16)):
        for full, half, which in ((a, b, "B"), (b, a, "A")):
            if np.array_equal(rounding(full), half, equal_nan=True):
                return f"{name} in {which}"
    return ""


def _float16(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(np.float16).astype(np.float64)


def _bfloat16(values: Array) -> Array:
    """Rounded to the nearest, to even between two, as hardware does."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.astype(np.uint32).view(np.float32), values).astype(np.float64)


def _reordered(a: Array, b: Array) -> str:
    return "in another order" if _close(np.sort(a), np.sort(b)).all() else ""


PATTERNS: tuple[tuple[str, Callable[[Array, Array], str], str], ...] = (
    ("half precision", _rounded, "{roles} rounded to {how}"),
    ("permuted", _reordered, "{roles}: the same values {how} of the units"),
)
"""Differences that several vectors of a layer have in common: the aspect, a test of two vectors, and words."""


def _biased(a: Array, b: Array) -> str:
    """The words for variances that differ by m/(m - 1) in every unit; empty for other variances."""
    if len(a) < 2 or not ((a > 0) & (b > 0) & np.isfinite(a) & np.isfinite(b)).all():
        return ""
    ratios = b / a
    ratio = float(np.median(ratios))
    if np.ptp(ratios) > ALIKE * ratio or not 0.5 <= ratio <= 2 or ratio == 1:
        return ""
    m = round(1 / (1 - min(ratio, 1 / ratio)))
    which = "B" if ratio < 1 else "A"
    return f"running_var is that of A times {ratio:.5g} in every unit of B: biased in {which}, for m = {m:,} values"


def _differing(role: str, a: Array, b: Array, differs: Mask) -> str:
    """The words for values that differ: where, and the largest difference."""
    for name, values, others in (("B", b, a), ("A", a, b)):
        if (values == INITIAL[role]).all() and not (others == INITIAL[role]).any():
            low, high = float(np.min(others)), float(np.max(others))
            other = "A" if name == "B" else "B"
            return f"{role} is initial in {name}: {INITIAL[role]:g} in every unit, {low:.4g} to {high:.4g} in {other}"
    with np.errstate(all="ignore"):
        apart = np.where(differs, np.nan_to_num(np.abs(b - a), nan=np.inf), -1.0)
    unit = int(apart.argmax())
    where = f"{differs.sum():,} of {plural(len(a), 'unit')}"
    return f"{role} differs in {where}, most in unit {unit}: {a[unit]:.5g} in A, {b[unit]:.5g} in B"


def _settings(a: LayerData, b: LayerData) -> Iterator[Change]:
    """The differences of eps, momentum, the count of batches, the mode and what is frozen, where both are known."""
    yield from _eps(a, b)
    one, other = _rate(a), _rate(b)
    if one is not None and other is not None and not _is_same(one, other):
        is_complement = isinstance(one, float) and isinstance(other, float) and _is_same(one, 1 - other)
        hint = ": 1 minus it, the weight of the old value" if is_complement else ""
        yield change("momentum", a, b, f"momentum {_shown(one)} in A, {_shown(other)} in B{hint}", 0.0)
    yield from _count(a, b)
    modes = [layer.settings.get("training", layer.settings.get("training_mode")) for layer in (a, b)]
    if None not in modes and bool(modes[0]) != bool(modes[1]):
        words = ["training" if mode else "eval" for mode in modes]
        yield change("mode", a, b, f"{words[0]} mode in A, {words[1]} mode in B", math.nan)
    frozen = [layer.settings.get("frozen") for layer in (a, b)]
    if None not in frozen and frozen[0] != frozen[1]:
        yield change("frozen", a, b, f"frozen in {'A' if frozen[0] else 'B'} only", 0.0)


def _eps(a: LayerData, b: LayerData) -> Iterator[Change]:
    """Of a file that does not store eps, the default of its framework counts, unless both do not."""
    values = [float(layer.settings["eps"]) for layer in (a, b)]
    stored = [bool(layer.settings.get("eps_known")) for layer in (a, b)]
    if not any(stored) or math.isclose(*values, rel_tol=1e-6):
        return
    words = [
        f"{value:g} in {which}" if is_stored else f"not stored in {which}, where the default is {value:g}"
        for value, which, is_stored in zip(values, "AB", stored, strict=True)
    ]
    affine = Affine.of(a)
    yield change("eps", a, b, f"eps {', '.join(words)}", affine.effect(replace(affine, eps=values[1]).line))


def _rate(layer: LayerData) -> float | str | None:
    """Momentum; None where it is unknown."""
    value = layer.settings.get("momentum")
    return "None (cumulative)" if layer.settings.get("cumulative") else None if value is None else float(value)


def _shown(rate: float | str) -> str:
    return rate if isinstance(rate, str) else f"{rate:g}"


def _is_same(a: float | str, b: float | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def _count(a: LayerData, b: LayerData) -> Iterator[Change]:
    """The counts of batches; only PyTorch's formats have them."""
    counts: list[int | None] = [layer.settings.get("batches") for layer in (a, b)]
    if counts[0] == counts[1] or any(layer.settings["framework"] != "PyTorch" for layer in (a, b)):
        return
    if counts[0] is None or counts[1] is None:
        which = "A" if counts[0] is None else "B"
        yield change("missing", a, b, f"num_batches_tracked missing in {which}", 0.0)
    else:
        yield change("count", a, b, f"{plural(counts[0], 'batch', 'batches')} counted in A, {counts[1]:,} in B", 0.0)
