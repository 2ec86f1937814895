"""Check a model before a fold, and measure how far the fold changes the outputs of a pair or the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.records import Record, Skipped
from batchnorm.restoring import undisturbed
from batchnorm.surgery._folding.weights import Weights
from batchnorm.surgery._shared.calling import Example, leaves
from batchnorm.surgery._shared.layers import Norm

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""The largest difference that rounding explains, relative to the outputs' largest magnitude.

A fold rounds the weights again, by eps/2 each, which a network of fifty layers amplifies about ten times. float32 and
float64 have digits to spare; the 16-bit types get about eight times their eps (2^-10 and 2^-7).
"""

# Where rounding alone exceeds the bound, the limit is a multiple of its effect, up to a multiple of the bound and 0.1.
_ROUNDING_FACTOR = 4
_BOUND_FACTOR = 100
_MAX_LIMIT = 0.1


@dataclass(frozen=True, slots=True, repr=False)
class Compared(Record):
    """Base of the records of tools that change a model and compare its outputs on an example.

    Subclasses name the type of `layers`, and describe the attributes.
    """

    layers: tuple[Any, ...]
    skipped: tuple[Skipped, ...]
    max_error: float = 0.0
    rms_error: float = 0.0
    bound: float = math.inf
    rounding: float | None = None
    made: tuple[int, ...] | None = None

    @property
    def taken_back(self) -> bool:
        """Whether the model was restored because its outputs changed too much."""
        return self.max_error > self.bound

    def _outcome(self) -> str:
        """The difference of the outputs, to follow what was done."""
        if self.bound == math.inf:
            return ""
        error = f"outputs differ by {self.max_error:.1e} (RMS {self.rms_error:.1e}) of their largest magnitude"
        noise = "" if self.rounding is None else f"; rounding alone moves them by {self.rounding:.1e}"
        example = "" if self.made is None else f"; on a random input of shape {[*self.made]}"
        return f"; {error}, bound {self.bound:.1g}{noise}{example}"


@dataclass(frozen=True, slots=True)
class Difference:
    """Maximum and RMS of |after - before|, relative to the largest |before|, and the `BOUNDS` of the coarsest type."""

    max: float
    rms: float
    bound: float


def difference(before: Iterable[Tensor], after: Iterable[Tensor]) -> Difference | None:
    """The largest difference over the tensors, in order; None without a finite floating-point value.

    Infinite if shapes or types differ, or if only one has a NaN or an infinity at a position.
    """
    olds, news = (
        [t for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())] for tensors in (before, after)
    )
    if not any(bool(old.isfinite().any()) for old in olds):
        return None
    bound = max(BOUNDS.get(old.dtype.to_real(), BOUNDS[torch.bfloat16]) for old in olds)
    if len(olds) != len(news):
        return Difference(math.inf, math.inf, bound)
    pairs = [_max_and_rms(old, new) for old, new in zip(olds, news, strict=True)]
    return Difference(max(largest for largest, _ in pairs), max(rms for _, rms in pairs), bound)


def _max_and_rms(old: Tensor, new: Tensor) -> tuple[float, float]:
    if old.shape != new.shape or old.dtype != new.dtype:
        return math.inf, math.inf
    wide = torch.complex128 if old.is_complex() else torch.float64
    a, b = old.detach().to(wide), new.detach().to(wide)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf, math.inf
    if not bool(finite.any()):
        return 0.0, 0.0
    distance, scale = (a[finite] - b[finite]).abs(), float(a[finite].abs().max())
    if scale == 0:
        return (0.0, 0.0) if not bool(distance.any()) else (math.inf, math.inf)
    return float(distance.max()) / scale, float(distance.square().mean().sqrt()) / scale


class HasSecond(Protocol):
    """A change of a model; `second` computes the changed output."""

    @property
    def second(self) -> nn.Module:
        """The module with that output."""


@dataclass(eq=False)
class Pair:
    """A batch norm and the map right before or after it.

    `weights` and `remainder` replace the two, `difference` is the change of the pair's output.
    """

    norm: Norm
    map: nn.Module
    into: str
    before: bool
    weights: Weights
    remainder: nn.Module
    difference: Difference | None = None

    @property
    def first(self) -> nn.Module:
        """The module that runs first."""
        return self.map if self.before else self.norm.layer

    @property
    def second(self) -> nn.Module:
        """The module that reads the output of the first."""
        return self.norm.layer if self.before else self.map

    def run_folded_map(self, *args: Any, **kwargs: Any) -> Any:
        """Run the map with the folded weights."""
        module: Any = self.map
        parameters = module._parameters
        self.weights.put(module)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            module._parameters = parameters


def describe_map(module: nn.Module, before: bool) -> str:
    """A pair's map, in words."""
    return f"the {type(module).__name__} {'before' if before else 'after'} it"


def try_in_run(pairs: Sequence[Pair], run: Callable[[], Any]) -> None:
    """Measure the `difference` of every pair, on its inputs while the model runs."""
    outputs: dict[Pair, Tensor] = {}

    def after_first(pair: Pair, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs[pair] = pair.run_folded_map(*args, **kwargs) if pair.before else (args[0] if args else kwargs["input"])

    def after_second(pair: Pair, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if pair in outputs:  # the model may not run the same way twice
            value = outputs.pop(pair)
            args, kwargs = ((value, *args[1:]), kwargs) if args else ((), {**kwargs, "input": value})
            rest = pair.remainder if pair.before else pair.run_folded_map
            pair.difference = difference([output], [rest(*args, **kwargs)])

    with ExitStack() as stack:
        for pair in pairs:
            first = pair.first.register_forward_hook(partial(after_first, pair), with_kwargs=True)
            second = pair.second.register_forward_hook(partial(after_second, pair), with_kwargs=True)
            stack.callback(first.remove)
            stack.callback(second.remove)
        run()


def rounding(pairs: Sequence[HasSecond], run: Callable[[], Iterable[Tensor]]) -> float:
    """The change of the model's outputs if each pair's output changes by its last digit, up or down at random."""
    generator = torch.Generator().manual_seed(0)

    def perturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        up = torch.rand(output.shape, generator=generator).to(output.device) < 0.5
        eps = torch.finfo(output.dtype).eps
        return output * (1 + eps * (2.0 * up - 1).to(output.dtype))

    before = list(run())
    with ExitStack() as stack:
        for pair in pairs:
            stack.callback(pair.second.register_forward_hook(perturb).remove)
        change = difference(before, run())
    return 0.0 if change is None else change.max


def check_model(tool: str, model: nn.Module, bound: float | None) -> None:
    """Raise ValueError if the bound is not positive, or the model is not ready for inference in eager mode."""
    check_ready(tool, model, bound)
    if model.training:
        raise ValueError(f"{tool}: the model is in training mode: call model.eval() first")


def check_ready(tool: str, model: nn.Module, bound: float | None) -> None:
    """Raise ValueError if the bound is not positive, or the model does not run in eager mode."""
    numeric = isinstance(bound, int | float) and not isinstance(bound, bool)
    if bound is not None and not (numeric and 0 < bound < math.inf):
        raise ValueError(f"{tool}: the bound must be a positive number, got {bound!r}")
    for module in model.modules():
        if isinstance(module, LazyModuleMixin):
            raise ValueError(f"{tool}: the model has lazy layers: run a batch through it first")
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            first = "fold it first, then compile it" if tool == "fold" else "pass the model that is not compiled"
            raise ValueError(f"{tool}: the model is compiled: {first}")
        if any(tensor.is_meta for tensor in (*module.parameters(False), *module.buffers(False))):
            raise ValueError(f"{tool}: the model is on the meta device, without values: load the weights first")


def finite_outputs(tool: str, model: nn.Module, example: Example) -> list[Tensor]:
    """The outputs on the example. Raises ValueError if they cannot be compared."""
    with undisturbed(model):
        outputs = list(leaves(example.run()))
    if difference(outputs, outputs) is None:
        raise ValueError(
            f"{tool}: the model returns no finite floating-point number on the example, so nothing can be compared: "
            "use another example, or let bn.check find what is not finite"
        )
    return outputs


def limit_of(
    model: nn.Module,
    moved: Difference,
    bounds: Iterable[float],
    bound: float | None,
    changed: Iterable[HasSecond],
    example: Example,
) -> tuple[float, float | None]:
    """The limit of the change of the outputs, and the effect of rounding if the limit depends on it.

    `bounds` are those of the types of single layers, `bound` is the caller's, and the outputs of `changed` are rounded.
    """
    limit = bound or max(moved.bound, *bounds, 0.0)
    if bound is not None or moved.max <= limit:
        return limit, None
    with undisturbed(model):
        noise = rounding(list(changed), lambda: leaves(example.run()))
    return max(limit, min(_ROUNDING_FACTOR * noise, _BOUND_FACTOR * limit, _MAX_LIMIT)), noise
